"""python bench/chunks.py [--size 33m|tiny] [--questions 4] [--image-tokens 576] [--seed 0]

How exact the adapter's gradients of a Qwen3.5 are in float32 on the CPU, with the same model in float64 as the truth:
questions of one image behind their shared prefix, and each in a sequence of its own, as transformers runs it, with the
recurrent rule in chunks of several sizes. A tensor's error is the norm of the difference over the norm of its gradient.
Without dropout.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: more threads add up in another order
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import contextlib
import functools
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules at the root

import workload as work

import recurrent
from config import Lora
from dataset import StepDataset
from errors import exit_on_user_error
from model import AnswerLoss, trainable_parameters
from preflight import make_plan

CHUNKS = (64, 48, 32, 16)  # the first is transformers' own


@contextlib.contextmanager
def in_float64():
    """Parts of the model that compute in float32 whatever they are given, compute in float64."""
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


def gradients(model, workload: work.Workload, share: bool, chunk: int = CHUNKS[0]) -> tuple[float, dict]:
    """(loss, {name: gradient in float64}) of all questions. chunk: where none share a prefix."""
    pass_tokens = sum(len(item.input_ids) for item in workload.items) if share else 1
    plan = make_plan(workload.config, workload.samples, workload.encoder, 1)
    rules, nll = recurrent.transformers_rules(), 0.0
    in_chunks = functools.partial(rules.torch_chunk_gated_delta_rule, chunk_size=chunk)
    loss = AnswerLoss(model, workload.family)
    for batch in StepDataset(workload.samples, workload.encoder, share, plan, pass_tokens, 0, 1)[0]["passes"]:
        if not share:  # one row would else run as one with a single question behind its prefix
            batch["shared_prefix"] = None
        with contextlib.nullcontext() if share else mock.patch.object(rules, "torch_chunk_gated_delta_rule", in_chunks):
            value = loss(batch)
            value.backward()
        nll += value.item()
    found = {name: parameter.grad.double() for name, parameter in trainable_parameters(model).items()}
    model.zero_grad(set_to_none=True)
    return nll, found


def errors(found: dict, truth: dict) -> dict[str, float]:
    """Of each tensor."""
    return {name: float((found[name] - truth[name]).norm() / truth[name].norm()) for name in truth}


def table(results: dict[str, tuple[float, dict]], exact: tuple[float, dict]) -> list[str]:
    """Lines of Markdown."""
    loss, truth = exact
    norm = torch.stack([gradient.norm() for gradient in truth.values()]).norm()
    lines = [
        "| float32 | loss | worst tensor | median tensor | all tensors as one | the worst, its share of the norm |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for title, (nll, found) in results.items():
        of = errors(found, truth)
        worst = max(of, key=of.get)
        every = torch.stack([(found[name] - truth[name]).norm() for name in truth]).norm() / norm
        short = worst.partition(".layers.")[2].removesuffix(".default.weight")
        lines.append(
            f"| {title} | {abs(nll / loss - 1):.1e} | {of[worst]:.1e} | {statistics.median(of.values()):.1e} "
            f"| {every:.1e} | {short}; {truth[worst].norm() / norm:.1e} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="33m", choices=["33m", "tiny"])
    parser.add_argument("--questions", type=int, default=4, help="of one image")
    parser.add_argument("--image-tokens", type=int, default=576)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        model_folder = work.write_folder(folder / "model", work.SIZES_OF["qwen3_5"][args.size], None, "qwen3_5")
        base = work.build_base(model_folder, torch.device("cpu"), args.seed)
        lora = Lora(16, 32, 0.0)
        workload = work.make_workload(
            model_folder, folder / "data", [args.questions], args.image_tokens, 1, lora, args.seed
        )
        model = work.adapted(base, lora, args.seed, stock=False).eval()
        results = {f"alone, chunks of {chunk}": gradients(model, workload, False, chunk) for chunk in CHUNKS}
        results["shared"] = gradients(model, workload, True)
        model.double()
        with in_float64():
            exact = gradients(model, workload, False)
        print(
            f"### {args.size}, {args.questions} questions on an image of {args.image_tokens} tokens, seed {args.seed}\n"
        )
        print("\n".join(table(results, exact)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
