"""python bench/evaluation_speed.py [--size 33m|8b] [--questions-per-image 9] [--image-tokens 576] [--rounds N]

Answering speed: one question at a time with transformers' `generate`, one at a time with this repo, and all questions
of an image from one cache, as evaluate.py does. Side by side in one process, image by image; the answers must be
the same, token for token.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; on a CPU one thread gives stable ratios
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules at the root

import workload as work
from trainer import Questions

from config import Lora
from dataset import EvalDataset
from errors import exit_on_user_error
from inference import greedy
from model import to_device


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
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lora, batch = Lora(16, 32, 0.0), args.questions_per_image * args.images
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        model_folder = work.write_folder(folder / "model", work.SIZES[args.size], args.tokenizer)
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
