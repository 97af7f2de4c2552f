"""python bench/speed.py [--family qwen3_vl|qwen3_5] [--size 33m|8b|9b] [--questions-per-image 1,4,9,real,exp2]
       [--image-tokens 576,2900] [--steps N]

Training speed, side by side in one process: the same weights, samples, seed and LoRA targets, one optimizer step of
each variant in turn, so that whatever else the machine does hits all alike. Prints one table per setting.

(A) the Hugging Face Trainer with a plain collator, one question a pass; (T) the same at its best: --best-batch
questions a pass, and flash attention where it is installed; (K) as T, with all questions of an image as one
conversation: nearly the cost of D, but a later question sees the gold answers of the earlier ones, so another task is
trained; (B) this repo's loop with A's layout and A's work: every question its own sequence, logits at every position,
an image's vision once per question, Conv3d patches, PEFT's own LoRA; (C) without the unused work; (D) with shared
prefixes, as train.py runs uncompiled; (E) D with the varlen attention path (CUDA only); (F) D with compiled layers, as
train.py runs on a GPU. The setting `exp2` has steps of that config, in its order of questions (--metadata: of real
ones): (S) with its train_bs 4 and grad_accum 8, (L) with train_bs 32 and grad_accum 1. Gradients are compared without
dropout.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; on a CPU one thread gives stable ratios
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import contextlib
import importlib.util
import shutil
import statistics
import sys
import tempfile
import types
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules at the root

import workload as work
from measuring import Measured, largest_difference, measure_step
from workload import Workload

from batches import vision_inputs
from config import Lora
from dataset import StepDataset, load
from distributed import Ranks
from errors import UserError, exit_on_user_error
from forecast import FULL_PASS, Operations, count_step
from model import AnswerLoss, forward_logits, optimizer_groups, text_layers, to_device, trainable_parameters
from preflight import make_plan
from templates import IGNORE
from train import backward

warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing` is deprecated.*")
TITLES = {
    "A": "Hugging Face Trainer",
    "B": "ours, A's layout and work",
    "C": "+ unused work removed",
    "D": "+ shared prefixes",
    "E": "+ varlen attention",
    "F": "+ compiled layers",
    "T": "Trainer at its best",
    "K": "Trainer, an image's questions as one conversation (sees gold answers)",
    "S": "exp2 as shipped",
    "L": "train_bs as large as the step",
}


class FullWork(torch.nn.Module):
    """B's loss: `AnswerLoss` with the unused work put back in."""

    def __init__(self, model, family):
        super().__init__()
        self.model, self.family = model, family

    def forward(self, batch: dict) -> torch.Tensor:
        counts = [grid[1] * grid[2] for grid in batch["image_grid_thw"].tolist()]
        patches = batch["patches"].split(counts)
        occurrences = {
            **batch,
            "patches": torch.cat([patches[i] for i in batch["image_index"]]),
            "image_grid_thw": batch["image_grid_thw"][batch["image_index"]],
            "image_index": list(range(len(batch["image_index"]))),
        }
        occurrences |= to_device(
            vision_inputs(batch["input_ids"], occurrences["image_grid_thw"], self.family), batch["input_ids"].device
        )
        everywhere = torch.arange(batch["targets"].numel(), device=batch["targets"].device)
        logits = forward_logits(self.model, occurrences, self.family, everywhere)
        return F.cross_entropy(logits.float(), batch["targets"].flatten(), ignore_index=IGNORE, reduction="sum")


class Ours:
    """All variants but A: the training step of train.py."""

    def __init__(self, variant: str, model, workload: Workload, device: torch.device, micro_batch: int):
        """micro_batch: questions of a pass where none share a prefix; else tokens decide, as in a run."""
        self.variant, self.workload, self.device, self.model = variant, workload, device, model
        self.share = variant not in "BC"
        self.loss = (FullWork if variant == "B" else AnswerLoss)(model, workload.family)
        self.optimizer = torch.optim.AdamW(optimizer_groups(model, workload.config))
        longest = max(len(item.input_ids) for item in workload.items)
        self.pass_tokens = FULL_PASS if self.share else micro_batch * longest
        config = workload.config
        if variant == "L":
            config = replace(config, train_bs=workload.questions, grad_accum=1)
        self.dataset = self._steps_of(make_plan(config, workload.samples, workload.encoder, 1))
        self._steps = None

    def _steps_of(self, plan) -> StepDataset:
        return StepDataset(
            self.workload.samples, self.workload.encoder, self.share, plan, self.pass_tokens, rank=0, world_size=1
        )

    @contextlib.contextmanager
    def path(self):
        before = os.environ.get("SHARED_ATTENTION")
        if self.variant == "E":
            os.environ["SHARED_ATTENTION"] = "varlen"
        yield
        if self.variant == "E":
            os.environ.pop("SHARED_ATTENTION") if before is None else os.environ.update(SHARED_ATTENTION=before)

    def backward(self, step: dict) -> None:
        with self.path():
            ranks = Ranks(0, 1, self.device)
            backward(self.loss, step["passes"], step["answer_tokens"], ranks, "ddp", contextlib.nullcontext)

    def gradients(self, rows: list[int]) -> dict:
        self.model.eval()  # without dropout
        self.backward(self._steps_of(types.SimpleNamespace(questions=lambda step: rows))[0])
        gradients = {name: p.grad.float().cpu().numpy() for name, p in trainable_parameters(self.model).items()}
        self.model.zero_grad(set_to_none=True)
        self.model.train()
        return gradients

    def step(self) -> None:
        if self._steps is None:
            workers = self.workload.config.dataloader_num_workers
            self._steps = load(self.dataset, range(self.workload.steps), workers, self.device)
        self.backward(next(self._steps))
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        torch.nn.utils.clip_grad_norm_(parameters, self.workload.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def build(
    variant: str, base, workload: Workload, device: torch.device, folder: Path, micro_batch: int, best_batch: int
):
    """A runnable variant on a copy of the base that shares its frozen weights. All start from the same adapter."""
    model = work.adapted(base, workload.config.lora, workload.config.seed, stock=variant in "ABTK").train()
    for layer in text_layers(model) if variant == "F" else ():
        layer.compile(dynamic=True)
    if variant in "ATK":
        from trainer import HuggingFace

        if variant != "A" and device.type == "cuda" and importlib.util.find_spec("flash_attn"):
            model.get_base_model().set_attn_implementation("flash_attention_2")
        sequences = {"A": micro_batch, "T": best_batch, "K": max(1, best_batch // 4)}[variant]
        return HuggingFace(model, workload, folder / f"trainer-{variant}", device, sequences, variant == "K")
    if workload.config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Ours(variant, model, workload, device, micro_batch)


# ------------------------------------------------------------------------------------------------------- measuring


def final_loss(model, workload: Workload, device: torch.device) -> float:
    """Mean loss over the answers of the first step after training, by the same code for all variants."""
    plan = make_plan(workload.config, workload.samples, workload.encoder, 1)
    dataset = StepDataset(workload.samples, workload.encoder, True, plan, FULL_PASS, 0, 1)
    loss, nll, tokens = AnswerLoss(model, workload.family), 0.0, 0
    with torch.no_grad():
        for batch in dataset[0]["passes"]:
            nll += float(loss(to_device(batch, device)))
            tokens += batch["answer_tokens"]
    return nll / tokens


def measure(
    variants: str, base, workload: Workload, device: torch.device, folder: Path, micro_batch: int, best_batch: int
) -> dict:
    """Every variant: gradient check, one step for its memory, then the timed ones in rounds, all side by side."""
    runs, results, reference = {}, {variant: Measured() for variant in variants}, None

    def guarded(variant, action):
        try:
            return action()
        except torch.OutOfMemoryError:
            results[variant].failure = "out of memory"
            runs.pop(variant, None)
            torch.cuda.empty_cache()

    for variant in variants:
        runs[variant] = build(variant, base, workload, device, folder, micro_batch, best_batch)
        rows = list(range(min(4, workload.questions)))
        gradients = guarded(variant, lambda run=runs[variant]: run.gradients(rows))  # noqa: B023
        reference = gradients if reference is None else reference
        if gradients is not None and reference is not None and variant != "K":  # which has another loss
            results[variant].gradient_difference = largest_difference(gradients, reference)
    for step in range(workload.steps):
        for variant in list(runs):
            guarded(variant, lambda: measure_step(runs[variant], results[variant], device, memory=step == 0))  # noqa: B023
            took = results[variant].seconds[-1:]
            print(
                f"  step {step}/{workload.steps - 1} {variant} {', '.join(f'{s:.2f} s' for s in took)}", file=sys.stderr
            )
    for variant, run in list(runs.items()):
        results[variant].loss = guarded(variant, lambda: final_loss(run.model, workload, device))  # noqa: B023
    return results


# ------------------------------------------------------------------------------------------------------------ table


def ceilings(workload: Workload, operations: Operations) -> tuple[float, float, float]:
    """Of the timed steps: (tokens laid out without sharing / with all of a step's, operations of A's step / of D's, D's
    useful operations per step)."""
    items, size, image_token_id = workload.items, workload.questions, workload.family.image_token_id
    tokens, useful, full = Counter(), 0.0, 0.0
    for start in range(size, len(items), size):
        step = items[start : start + size]
        count = count_step(step, True, sys.maxsize, 1, operations, image_token_id)
        tokens.update(count)
        useful += count["operations"]
        for item in step:  # logits at every position, the image for each question
            images = [int((item.input_ids == image_token_id).sum())]
            full += operations.useful([[len(item.input_ids)]], len(item.input_ids), images)
    return tokens["tokens_alone"] / tokens["tokens"], full / useful, useful / (workload.steps - 1)


def table(results: dict, workload: Workload, operations: Operations, rate: float, on_gpu: bool) -> list[str]:
    """Lines of Markdown. Ratios are medians over the rounds of the ratio in a round. CPU time is this process's,
    without the loader workers; on a CPU it is what MFU and the share of the ceiling go by, on a GPU the clock."""
    token_ceiling, operation_ceiling, useful = ceilings(workload, operations)
    lines = [
        f"| variant | questions/s | × {next(iter(results))} | × in CPU time | s/step | CPU s/step | peak GB | loss "
        "| gradient differs by | useful GFLOP/s | MFU | 3 epochs, h | of the token ceiling |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    first = next(iter(results.values()))

    def ratio(clock: str, result: Measured) -> float:
        pairs = zip(getattr(first, clock), getattr(result, clock), strict=False)
        return statistics.median([a / b for a, b in pairs] or [float("nan")])

    for variant, result in results.items():
        title = f"({variant}) {TITLES[variant]}"
        if result.failure or not result.seconds:
            lines.append(f"| {title} | {result.failure or 'not run'} |" + " |" * 11)
            continue
        seconds, cpu_seconds = statistics.median(result.seconds), statistics.median(result.cpu_seconds)
        speed = workload.questions / seconds
        rate_reached = useful / (seconds if on_gpu else cpu_seconds)
        difference = "–" if result is first or variant == "K" else f"{result.gradient_difference:.1e}"
        hours = work.EPOCHS * work.QUESTIONS_IN_TRAINING / speed / 3600
        cpu_ratio = ratio("cpu_seconds", result)
        clock = "seconds" if on_gpu else "cpu_seconds"
        reached = sum(getattr(first, clock)) / sum(getattr(result, clock)) / token_ceiling
        ceiling = f"{reached:.0%}" if variant not in "ABCTK" and "A" in results else ""
        lines.append(
            f"| {title} | {speed:.3g} | {ratio('seconds', result):.2f} | {cpu_ratio:.2f} | {seconds:.2f} "
            f"| {cpu_seconds:.2f} | {result.peak_gb:.2f} | {result.loss:.5f} | {difference} "
            f"| {rate_reached / 1e9:.4g} | {rate_reached / rate:.1%} | {hours:.2f} | {ceiling} |"
        )
    summary = f"Token ceiling {token_ceiling:.2f}, operations of A's step / D's {operation_ceiling:.2f}"
    for one, other in ("CD", "SL"):
        if {one, other} <= results.keys() and results[one].seconds and results[other].seconds:
            clock = "seconds" if on_gpu else "cpu_seconds"
            pairs = zip(getattr(results[one], clock), getattr(results[other], clock), strict=True)
            summary += f", {other} {statistics.median(a / b for a, b in pairs):.2f} × {one}"
    lines += ["", summary + "."]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="qwen3_vl", choices=work.SIZES_OF, help="whose proportions the model has")
    parser.add_argument("--size", default="33m", choices=["33m", "8b", "9b", "tiny"])
    parser.add_argument("--questions-per-image", default="real", help="comma-separated: 1, 4, 9, ... real, or exp2")
    parser.add_argument("--metadata", help="metadata.csv of Kvasir-VQA, for 'exp2'; default: drawn rows")
    parser.add_argument("--image-tokens", default="576", help="comma-separated")
    parser.add_argument("--images", type=int, default=2, help="images in an optimizer step")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each variant, after one for its memory")
    parser.add_argument("--variants", default=None, help="the first is what the others are compared with")
    parser.add_argument("--micro-batch", type=int, default=1, help="questions per pass of A, B and C")
    parser.add_argument(
        "--best-batch", type=int, default=8, help="questions per pass of T; a quarter as many images for K"
    )
    parser.add_argument("--lora-r", type=int, default=16)
    parser.add_argument(
        "--dropout", type=float, default=0.05, help="of LoRA, as the configs have it (default: %(default)s)"
    )
    parser.add_argument("--gradient-checkpointing", action="store_true", help="in all variants")
    parser.add_argument("--workers", type=int, default=8 if torch.cuda.is_available() else 1,
                        help="DataLoader workers of each variant; on a GPU one would starve A")  # fmt: skip
    parser.add_argument("--tokenizer", help="folder of a real tokenizer; the embedding then has 151,936 rows")
    parser.add_argument("--histogram", help="csv with a column img_id, for 'real'; default: numbers in workload.py")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_image = "ATKBCDEF" if device.type == "cuda" else "ABCD"
    if not set(args.variants or "") <= set(TITLES):
        raise UserError(f"--variants {args.variants}: choose letters of {''.join(TITLES)}")
    if args.size not in work.SIZES_OF[args.family]:
        raise UserError(f"--size {args.size}: {args.family} has {', '.join(work.SIZES_OF[args.family])}")
    if args.size in ("8b", "9b") and device.type != "cuda":
        raise UserError(f"--size {args.size} needs a CUDA device of 80 GB; use --size 33m here")
    torch.set_float32_matmul_precision("high")
    histogram = work.read_histogram(args.histogram)
    sizes = dict(work.SIZES_OF[args.family][args.size])
    if args.tokenizer:
        sizes["rows"] = max(sizes["rows"], work.EIGHT_B["rows"])
    rate = work.matrix_rate(device)
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        model_folder = work.write_folder(folder / "model", sizes, args.tokenizer, args.family)
        base = work.build_base(model_folder, device, args.seed)
        operations = work.operations_of(model_folder)
        parameters = sum(p.numel() for p in base.parameters())
        name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
        print(f"{name}; torch {torch.__version__}; {parameters / 1e6:,.0f}M parameters; matrix product {rate / 1e12:.3g} TFLOP/s")  # fmt: skip  # noqa: E501
        for image_tokens in map(int, args.image_tokens.split(",")):
            for k in args.questions_per_image.split(","):
                data, lora = folder / f"data-{image_tokens}-{k}", Lora(args.lora_r, 2 * args.lora_r, args.dropout)
                common = (image_tokens, args.steps + 1, lora, args.seed)
                if k == "exp2":
                    variants, title = args.variants or "ASL", "steps of exp2"
                    if "K" in variants:
                        raise UserError(
                            "--variants K takes whole images, which the steps of exp2 are not; leave it out"
                        )
                    workload = work.exp2_workload(model_folder, data, args.metadata, *common)
                else:
                    per_step = work.questions_of_step(k, histogram, args.images)
                    variants, title = args.variants or on_image, f"questions per image: {k} {per_step}"
                    workload = work.make_workload(model_folder, data, per_step, *common)
                config = replace(
                    workload.config,
                    gradient_checkpointing=args.gradient_checkpointing,
                    dataloader_num_workers=args.workers,
                )
                workload = replace(workload, config=config)
                results = measure(variants, base, workload, device, folder, args.micro_batch, args.best_batch)
                print(f"\n### {args.family} {args.size}, {image_tokens} image tokens, {title}\n")
                print("\n".join(table(results, workload, operations, rate, device.type == "cuda")), flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    # One GPU: with more in view, the Trainer would spread over all of them.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    with exit_on_user_error():
        main()
