"""python bench/scaling.py [--size 33m] [--questions-per-image real] [--image-tokens 576] [--rounds N]

Two DDP processes against one, with one thread each, on the training step of train.py with shared prefixes. In every
round first rank 0 works alone while rank 1 waits, then both work, each on a step of its own: what two processes do in
the time of one. (Two GPUs: `torchrun --nproc_per_node=2 train.py`, and compare QA/s in the logs.)
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch
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
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules at the root

import workload as work

from batches import BatchPlan
from config import Lora
from dataset import StepDataset
from distributed import Ranks, end_process, stop_ranks, sum_gradients
from errors import exit_on_user_error
from forecast import FULL_PASS
from model import AnswerLoss, optimizer_groups, trainable_parameters
from train import backward

WORLD = 2


def worker(rank: int, folder: Path, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    device, lora = torch.device("cpu"), Lora(16, 32, 0.0)
    per_step = work.questions_of_step(args.questions_per_image, work.read_histogram(args.histogram), args.images)
    # Both ranks have questions of the same lengths, as two large random halves would have on average.
    setting = work.make_workload(
        folder / "model", folder / f"data-{rank}", per_step, args.image_tokens, args.rounds + 1, lora, args.seed
    )
    model = work.adapted(work.build_base(folder / "model", device, args.seed), lora, args.seed, stock=False).train()
    loss, trainable = AnswerLoss(model, setting.family), trainable_parameters(model)
    optimizer = torch.optim.AdamW(optimizer_groups(model, setting.config))
    plan = BatchPlan(len(setting.samples), setting.questions, 1, "sequential", 0)
    dataset = StepDataset(setting.samples, setting.encoder, True, plan, FULL_PASS, 0, 1)

    def step(loaded: dict, ranks: Ranks) -> float:
        began = time.perf_counter()
        backward(loss, loaded["passes"], loaded["answer_tokens"], ranks, "ddp", contextlib.nullcontext)
        if ranks.world_size > 1:
            sum_gradients(trainable, [True] * len(trainable))
        torch.nn.utils.clip_grad_norm_(trainable.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - began

    ratios = []
    for index in range(args.rounds + 1):
        loaded = dataset[index]
        dist.barrier()
        one = step(loaded, Ranks(0, 1, device)) if rank == 0 else 0.0
        dist.barrier()
        both = step(loaded, Ranks(rank, WORLD, device))
        if rank == 0 and index:  # the first round warms up
            ratios.append(WORLD * one / both)
            print(f"one process {setting.questions / one:.3g} questions/s, two {WORLD * setting.questions / both:.3g}, "
                  f"ratio {ratios[-1]:.2f}", flush=True)  # fmt: skip
    if rank == 0:
        print(f"median ratio of {args.rounds} rounds: {statistics.median(ratios):.2f}")
    stop_ranks()
    end_process()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="33m", choices=["33m", "tiny"])
    parser.add_argument("--questions-per-image", default="real")
    parser.add_argument("--image-tokens", type=int, default=576)
    parser.add_argument("--images", type=int, default=2, help="images in a step of each process")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--histogram", help="csv with a column img_id; default: numbers in workload.py")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        work.write_folder(folder / "model", work.SIZES[args.size], None)
        torch.multiprocessing.spawn(worker, (folder, args), nprocs=WORLD)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
