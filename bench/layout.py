"""python bench/layout.py [--metadata metadata.csv] [--tokenizer FOLDER] [--image-size 1856x1600]

How the steps of the shipped configs are laid out: questions behind each prefix, tokens, padding, and what sharing saves
at most within a step; and how evenly whole images load the ranks. Everything is counted, nothing is trained.

--metadata: Kvasir-VQA's rows (img_id, question, answer, source); their images need not be there. Without it, drawn rows
with as many questions an image as real ones have.
"""

import argparse
import functools
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules at the root

import workload as work

from batches import Item
from config import load_config
from dataset import SampleEncoder
from errors import UserError, exit_on_user_error
from family import load_family
from forecast import FULL_PASS, count_step
from model import load_tokenizer
from preflight import make_plan
from samples import SampleList
from toy.tiny_model import write_tiny_model

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
# title, config, GPUs, changes, stage of its training file (0: all)
SHIPPED = [
    ("exp1", "exp1", 1, [], 0),
    ("exp2, 2 GPUs", "exp2", 2, [], 0),
    ("exp2, 1 GPU, 64 a step", "exp2", 1, ["grad_accum=16"], 0),
    ("exp2 inside train_all, 16 a step", "exp2", 1, ["grad_accum=4"], 0),
    ("exp3, exp4: stage 1", "exp3_stage1", 1, [], 1),
    ("exp3, exp4: stage 2", "exp3_stage2", 1, [], 2),
    ("exp3, exp4: stage 3", "exp3_stage3", 1, [], 3),
    ("exp2 with order: images", "exp2", 2, ["order=images"], 0),
    ("exp1_qwen3_4gpu", "exp1_qwen3_4gpu", 4, [], 0),
    ("exp1_qwen3_4gpu with order: images", "exp1_qwen3_4gpu", 4, ["order=images"], 0),
]
RANKS, QUESTIONS_A_RANK = (2, 4, 8), (32, 64)


class OfOneSize(SampleEncoder):
    """Every image is of this size, in pixels, wherever it is."""

    size: tuple[int, int]

    def placement(self, path: str, size: tuple[int, int] | None = None):
        return super().placement(path, self.size)


class Counted:
    """The steps of a config, laid out for so many GPUs."""

    def __init__(self, folder: Path, samples: list[dict], size: tuple[int, int], tokenizer: str | None):
        self.folder, self.size, self.tokenizer, self.all_samples = folder, size, tokenizer, samples
        self._items: dict[tuple, list[Item]] = {}

    @functools.cache  # noqa: B019 - it lives as long as the command
    def model_folder(self, family: str) -> str:
        return str(write_tiny_model(self.folder / family, family, tokenizer_from=self.tokenizer))

    def count(self, config: str, world_size: int, changes: list[str], stage: int) -> Counter:
        loaded = load_config(CONFIGS / f"{config}.yaml", changes)
        families = {"Qwen3.5": "qwen3_5", "Qwen3-VL": "qwen3_vl"}
        family = next((family for part, family in families.items() if part in loaded.model_name), "qwen2_vl")
        loaded = replace(loaded, model_name=self.model_folder(family))
        samples = SampleList([s for s in self.all_samples if stage in (0, s["stage"])], config)
        if not len(samples):
            raise UserError(f"--metadata: no question of stage {stage}")
        encoder = OfOneSize(loaded, load_family(loaded.model_name), load_tokenizer(loaded.model_name))
        encoder.size = self.size
        key = (loaded.model_name, loaded.template, loaded.resize, loaded.image_size, stage)
        if key not in self._items:
            paths = functools.cache(encoder.size_only)
            self._items[key] = [encoder.encode(s, [paths(path) for path in encoder.images_of(s)]) for s in samples]
        items, plan, counts = self._items[key], make_plan(loaded, samples, encoder, world_size), Counter()
        pass_tokens = loaded.pass_tokens or FULL_PASS
        for step in range(plan.steps_per_epoch):
            rows = plan.questions(step)
            counts.update(count_step([items[row] for row in rows], loaded.share_prefix, pass_tokens, world_size))
        return counts


def table(counted: Counted) -> list[str]:
    lines = [
        "| config | questions per prefix | padded tokens a question | padding | token ceiling of a step | reached |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for title, *setting in SHIPPED:
        n, one = counted.count(*setting), counted.count(setting[0], 1, together(setting), setting[3])
        ceiling, reached = n["tokens_alone"] / one["tokens"], n["tokens_alone"] / n["padded"]
        lines.append(
            f"| {title} | {n['questions'] / n['rows']:.2f} | {n['padded'] / n['questions']:.0f} "
            f"| {1 - n['tokens'] / n['padded']:.1%} | {ceiling:.2f} | {reached / ceiling:.0%} |"
        )
    return lines


def together(setting: list) -> list[str]:
    """Changes that lay the whole step out on one rank and without a limit: no image's tokens stand there twice."""
    config, world_size, changes, _ = setting
    loaded = load_config(CONFIGS / f"{config}.yaml", changes)
    return [*changes, f"grad_accum={loaded.grad_accum * world_size}", "pass_tokens=1000000000"]


def balance(counted: Counted) -> list[str]:
    lines = ["| questions a rank | " + " | ".join(f"{ranks} ranks" for ranks in RANKS) + " |", "|--:|" + "--:|" * 3]
    for questions in QUESTIONS_A_RANK:
        cells = []
        for ranks in RANKS:
            n = counted.count("exp2", ranks, ["train_bs=1", f"grad_accum={questions}"], 0)
            cells.append(f"{n['tokens'] / (ranks * n['slowest']):.1%}")
        lines.append(f"| {questions} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metadata", help="metadata.csv of Kvasir-VQA; default: drawn rows")
    parser.add_argument("--tokenizer", help="folder of a real tokenizer; default: the demo's")
    parser.add_argument("--image-size", default="1856x1600", metavar="WIDTHxHEIGHT",
                        help="of every image, in pixels, for native resizing (default: %(default)s)")  # fmt: skip
    args = parser.parse_args()
    try:
        width, height = map(int, args.image_size.split("x"))
    except ValueError:
        raise UserError(f"--image-size {args.image_size}: write it as 1856x1600") from None
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        counted = Counted(folder, work.kvasir_samples(args.metadata), (width, height), args.tokenizer)
        print("\n".join(table(counted)))
        print("\nHow busy the ranks are on average while the slowest works, by tokens, in exp2's order:\n")
        print("\n".join(balance(counted)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
