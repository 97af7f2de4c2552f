"""python bench/evaluation_speed.py [--size 33m|8b] [--questions-per-image 9] [--image-tokens 576] [--rounds N]
python bench/evaluation_speed.py --count --size 8b --images 17

Answering speed: one question at a time with transformers' `generate`, one at a time with this repo, and all questions
of an image from one cache, as evaluate.py does. Side by side in one process, image by image; the answers must be
the same, token for token. --count: kernels and copied bytes of one token of every answer, from shapes alone.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; on a CPU one thread gives stable ratios
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import contextlib
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules at the root

import workload as work
from torch.utils._python_dispatch import TorchDispatchMode
from trainer import Questions
from transformers import DynamicCache

from attention import SharedRows
from config import Config, Data, Lora
from dataset import EvalDataset
from errors import exit_on_user_error
from family import load_family
from forecast import _OnMeta, meta_loss
from inference import answers_cache, greedy
from model import adapter_in_the_bases_type, to_device


class OneByOne:
    """transformers' own loop: the image is processed and the prompt read anew for every question."""

    def __init__(self, model, setting: work.Workload, device: torch.device, new_tokens: int, end_id: int):
        self.model, self.questions, self.device, self.new_tokens = model, Questions(setting), device, new_tokens
        self.setting, self.end_id = setting, end_id

    def answer(self, rows: range) -> list[list[int]]:
        answers = []
        for row in rows:
            sample = self.questions[row]
            ids = sample["input_ids"][sample["labels"] == -100][None].to(self.device)
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=sample["pixel_values"].to(self.device),
                image_grid_thw=sample["image_grid_thw"].to(self.device),
                mm_token_type_ids=(ids == self.setting.family.image_token_id).int(),
                do_sample=False,
                max_new_tokens=self.new_tokens,
                eos_token_id=self.end_id,
                pad_token_id=self.end_id,
            )
            tokens = output[0, ids.shape[1] :].tolist()
            answers.append(tokens[: tokens.index(self.end_id)] if self.end_id in tokens else tokens)
        return answers


class Ours:
    def __init__(
        self, model, setting: work.Workload, device: torch.device, new_tokens: int, end_id: int, together: bool
    ):
        self.model, self.setting, self.device, self.new_tokens = model, setting, device, new_tokens
        self.end_id, self.together = end_id, together

    def answer(self, rows: range) -> list[list[int]]:
        setting, answers = self.setting, {}
        size = len(rows) if self.together else 1
        dataset = EvalDataset(setting.samples, setting.encoder, self.together, size, True, rows)
        for index in range(len(dataset)):
            batch = to_device(dataset[index], self.device)
            tokens = greedy(self.model, batch, setting.family, {self.end_id}, self.new_tokens)
            answers.update(zip(batch["rows"], (ids for ids, _ in tokens), strict=True))
        return [answers[row] for row in rows]


class Kernels(TorchDispatchMode):
    """How many operations but views there are, and bytes that concatenations and copies read and write."""

    count = copied = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.count += not (function.is_view or "empty" in str(function) or "view" in str(function))
        if function in (torch.ops.aten.cat.default, torch.ops.aten.copy_.default):
            written = result if function is torch.ops.aten.cat.default else args[1]
            self.copied += 2 * written.numel() * written.element_size()
        return result


@torch.no_grad()
def count_a_token(model_folder: Path, rows: int, questions: int, tokens: int) -> None:
    """Of one token of every answer, in bfloat16: `questions` in each row, behind `tokens` of prefix and questions."""
    config = Config("-", str(model_folder), "vqa", Data("-"), "-", "-", learning_rate=1e-4)
    model = meta_loss(config, load_family(str(model_folder)), torch.bfloat16).model.eval()
    text = model.config.get_text_config()
    groups = text.num_attention_heads // text.num_key_value_heads  # as on CUDA
    print(f"{rows} rows of {tokens} tokens, {questions} answers each\n\n| cache | kernels | GB copied |\n|---|--:|--:|")
    for name, cache, adapter in (
        ("transformers', adapter cast in every layer", DynamicCache(config=model.config), contextlib.nullcontext()),
        ("transformers'", DynamicCache(config=model.config), adapter_in_the_bases_type(model)),
        ("ours", answers_cache(model), adapter_in_the_bases_type(model)),
    ):
        with torch.device("meta"), adapter:
            held = torch.empty(rows, text.num_key_value_heads, tokens, text.head_dim, dtype=torch.bfloat16)
            for layer in range(text.num_hidden_layers):
                cache.update(held, held, layer)
            mask = torch.ones(rows, 1, questions, tokens + questions, dtype=torch.bool)
            with Kernels() as counted, _OnMeta():
                logits = model(
                    input_ids=torch.zeros(rows, questions, dtype=torch.long),
                    attention_mask=mask,
                    shared_rows=SharedRows(None, mask, 0, torch.bfloat16, groups, "two_part"),
                    position_ids=torch.zeros(3, rows, questions, dtype=torch.long),
                    past_key_values=cache,
                    use_cache=True,
                ).logits
                logits.argmax(-1)
        print(f"| {name} | {counted.count:,} | {counted.copied / 1e9:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="33m", choices=work.SIZES)
    parser.add_argument("--questions-per-image", type=int, default=9)
    parser.add_argument("--image-tokens", type=int, default=576)
    parser.add_argument("--images", type=int, default=1, help="images in a batch")
    parser.add_argument("--rounds", type=int, default=3, help="timed batches, after one to warm up")
    parser.add_argument("--new-tokens", type=int, default=8, help="a random model never ends an answer by itself")
    parser.add_argument("--tokenizer", help="folder of a real tokenizer; the embedding then has 151,936 rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", action="store_true", help="count one token of every answer; nothing is run")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lora, batch = Lora(16, 32, 0.0), args.questions_per_image * args.images
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        model_folder = work.write_folder(folder / "model", work.SIZES[args.size], args.tokenizer)
        if args.count:
            tokens = args.image_tokens + 36 * args.questions_per_image
            return count_a_token(model_folder, args.images, args.questions_per_image, tokens)
        base = work.build_base(model_folder, device, args.seed)
        setting = work.make_workload(
            model_folder, folder / "data", [args.questions_per_image] * args.images, args.image_tokens,
            args.rounds + 1, lora, args.seed,
        )  # fmt: skip
        end_id = setting.encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")
        stock, own = (work.adapted(base, lora, args.seed, stock).eval() for stock in (True, False))
        common = (setting, device, args.new_tokens, end_id)
        runs = {
            "generate, one by one": OneByOne(stock, *common),
            "ours, one by one": Ours(own, *common, together=False),
            "ours, an image's questions together": Ours(own, *common, together=True),
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        cpu_seconds: dict[str, list[float]] = {name: [] for name in runs}
        answers: dict[str, list[list[int]]] = {name: [] for name in runs}
        for start in range(0, batch * (args.rounds + 1), batch):
            for name, run in runs.items():
                began, cpu_began = time.perf_counter(), time.process_time()
                answers[name] += run.answer(range(start, start + batch))  # ends with a copy to the host
                if start:  # the first warms up
                    seconds[name].append(time.perf_counter() - began)
                    cpu_seconds[name].append(time.process_time() - cpu_began)
        first = next(iter(runs))
        print(f"{args.size}, {args.image_tokens} image tokens, {args.questions_per_image} questions per image, "
              f"{args.new_tokens} new tokens, {args.images} image(s) a batch, {args.rounds} rounds\n")  # fmt: skip
        print("| answers | questions/s | × generate | × in CPU time | same answers |\n|---|--:|--:|--:|--:|")
        for name in runs:
            ratio = statistics.median(a / b for a, b in zip(seconds[first], seconds[name], strict=True))
            cpu_ratio = statistics.median(a / b for a, b in zip(cpu_seconds[first], cpu_seconds[name], strict=True))
            same = sum(a == b for a, b in zip(answers[first], answers[name], strict=True))
            speed = batch / statistics.median(seconds[name])
            print(f"| {name} | {speed:.3g} | {ratio:.2f} | {cpu_ratio:.2f} | {same}/{len(answers[name])} |")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
