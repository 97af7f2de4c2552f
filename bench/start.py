"""python bench/start.py [--samples 1000000] [--ranks 2] [--form llava|own] [--order random|images]

What a run costs before its model is loaded: `train.py` with so many drawn samples (of a few images) on several ranks of
this machine. Three starts, each stopped after a step: without a cache, the first one that builds it, and one that
resumes the first from its checkpoint and finds the cache.

seconds: from the command to where the slowest rank loads the weights. PSS: a page that several processes map counts in
parts, so that the ranks add up. Peaks are of the time before; "same order" compares ids and order of the first epoch
with the first start.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the modules at the root

IMAGES, QUESTIONS_PER_IMAGE = 64, 9
WORDS = "the polyp lies in upper left region with a smooth surface and no visible bleeding near an instrument".split()


def write_data(folder: Path, samples: int, form: str) -> None:
    from PIL import Image

    generator = random.Random(0)
    for number in range(IMAGES):
        color = tuple(generator.randrange(256) for _ in range(3))
        Image.new("RGB", (320, 240), color).save(folder / f"{number}.png")

    def text(words: int) -> str:
        return " ".join(generator.choices(WORDS, k=words))

    def said(number: int) -> dict:
        if form == "own":
            candidates = ["polyp", "ulcer", "none"]
            return {"question": text(10), "answer": "polyp; ulcer", "candidates": candidates, "stage": 1 + number % 3}
        turns = [f"<image>\n{text(12)}", text(30), text(10), text(20)]
        return {"conversations": [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]}

    with open(folder / "train.json", "w", encoding="utf-8") as file:
        for number in range(samples):
            sample = {"id": f"{number:09d}", "image": f"{number // QUESTIONS_PER_IMAGE % IMAGES}.png", **said(number)}
            file.write(("[" if number == 0 else ",\n") + json.dumps(sample))
        file.write("]\n")


def write_config(folder: Path, order: str) -> Path:
    import yaml

    from toy.tiny_model import write_tiny_model

    write_tiny_model(folder / "model", "qwen3_vl")
    values = {
        "experiment": "START", "model_name": str(folder / "model"), "task": "vqa", "output_dir": str(folder / "out"),
        "data": {"train": str(folder / "train.json"), "image_root": str(folder)}, "results_dir": str(folder / "res"),
        "learning_rate": 1e-4, "image_size": 768, "order": order, "max_tokens": 4096, "dataloader_num_workers": 0,
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


class Peaks(threading.Thread):
    """Samples this process's memory; kilobytes of PSS, RSS and of what it shares with nobody."""

    def __init__(self):
        super().__init__(daemon=True)
        self.kilobytes, self.ended = {"Pss": 0, "Rss": 0, "Private_Dirty": 0}, False

    def look(self) -> None:
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
            name, value = line.split()[0].rstrip(":"), int(line.split()[1])
            if name in self.kilobytes:
                self.kilobytes[name] = max(self.kilobytes[name], value)

    def run(self) -> None:
        while not self.ended:
            self.look()
            time.sleep(0.25)


def worker(folder: Path, in_memory: bool) -> None:
    import samples
    import train
    from config import load_config
    from distributed import end_process

    peaks = Peaks()
    peaks.start()
    samples.IN_MEMORY_BYTES = 2**62 if in_memory else 0
    found, planned = {}, []

    def recorded(config, samples, *rest):
        planned[:] = [make_plan(config, samples, *rest), samples]
        return planned[0]

    def reached(*arguments):
        peaks.ended = True
        peaks.look()
        found.update(reached=time.time(), cpu=sum(os.times()[:2]), **peaks.kilobytes)
        return load_model(*arguments)

    def last_step(*arguments):
        os.kill(os.getpid(), signal.SIGUSR1)
        return training_step(*arguments)

    make_plan, train.make_plan = train.make_plan, recorded
    load_model, train.load_model = train.load_model, reached
    training_step, train.training_step = train.training_step, last_step
    path = str(folder / "config.yaml")
    train.train(load_config(path), path)
    plan, split = planned
    digest = hashlib.sha256(split.sha256.encode())
    for row in plan.epoch_order(0)[:: max(1, len(split) // 10_000)]:
        digest.update(split[int(row)]["id"].encode())
    found["order"] = digest.hexdigest()
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))
    end_process()


def start(folder: Path, ranks: int, in_memory: bool, resumes: bool) -> dict:
    """Numbers of one start, over its ranks."""
    if not resumes:
        shutil.rmtree(folder / "out", ignore_errors=True)
    started = time.time()
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", __file__]
    command += ["--worker", str(folder), *["--in-memory"] * in_memory]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    output = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    assert ("Resuming from" in output) == resumes, output
    found = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    assert len({one["order"] for one in found}) == 1, "the ranks would train in different orders"
    return {
        "seconds": max(one["reached"] for one in found) - started,
        "cpu": [one["cpu"] for one in found],
        "order": found[0]["order"],
        **{name: [one[name] / 1e6 for one in found] for name in ("Pss", "Rss", "Private_Dirty")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--form", choices=["llava", "own"], default="llava")
    parser.add_argument("--order", choices=["sequential", "random", "images"], default="random")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--in-memory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.in_memory)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, args.samples, args.form)
        write_config(folder, args.order)
        size = (folder / "train.json").stat().st_size
        print(f"{args.samples:,} samples, {args.form}, {size / 1e6:.0f} MB, order {args.order}, {args.ranks} ranks\n")
        print("| start | seconds | CPU s of each rank | peak PSS GB | of it private | peak RSS GB | same order |")
        print("|---|--:|--:|--:|--:|--:|---|")
        first = None
        starts = [("without a cache", True, False), ("the first", False, False), ("a resumed run", False, True)]
        for title, *how in starts:
            found = start(folder, args.ranks, *how)
            first = first or found
            cells = [f"{found['seconds']:.1f}", *(" + ".join(f"{value:.1f}" for value in found["cpu"]),)]
            for key in ("Pss", "Private_Dirty", "Rss"):
                cells.append(" + ".join(f"{value:.2f}" for value in found[key]))
            same = "yes" if found["order"] == first["order"] else "NO"
            print(f"| {title} | {' | '.join(cells)} | {same} |", flush=True)


if __name__ == "__main__":
    main()
