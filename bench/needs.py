"""python bench/needs.py [--metadata metadata.csv] [--model HUB_NAME=FOLDER ...] [--tflops 300]

What each shipped config needs of every GPU, of the disk and of time, as `train.py --check` counts it: from shapes,
without weights or data. Nothing is measured.

--metadata: Kvasir-VQA's rows (img_id, question, answer, source); default: drawn rows with as many questions an image.
--model: a folder with config.json, tokenizer and image processor in place of a hub name; may be given several times.
"""

import argparse
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules at the root

import torch
import workload as work
from PIL import Image

from config import load_config
from dataset import SampleEncoder
from errors import UserError, exit_on_user_error
from family import load_family
from forecast import USABLE, Operations, PassMemory, count_run, held_bytes, meta_loss
from images import upright_size
from model import load_tokenizer
from preflight import make_plan
from samples import SampleList

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
# config, GPUs of its job file, stage of its training file (0: all)
SHIPPED = [
    ("exp1", 1, 0), ("exp1_qwen3_4gpu", 4, 0), ("exp2", 2, 0), ("exp3_stage1", 1, 1), ("exp3_stage2", 1, 2),
    ("exp3_stage3", 1, 3), ("exp5_sequential_cot", 1, 0), ("click_rank16", 8, 0), ("click_rank32", 8, 0),
    ("click_rank64", 8, 0), ("lr_text_2e5", 2, 0), ("lr_vision_2e5", 2, 0),
]  # fmt: skip
CARDS = (24, 40, 48, 80, 141)  # GB
SIZES = {"vqa": (1856, 1600), "click": (1920, 1080), "cls": (1240, 1754)}  # of an image, in pixels


def drawn_samples(config, rows: list[dict], stage: int, folder: Path) -> SampleList:
    """Kvasir-VQA's questions; clicks, one an image; documents as long as max_tokens allows, or of four pages."""
    if config.task == "vqa":
        samples = [sample for sample in rows if stage in (0, sample["stage"])]
    elif config.task == "click":
        samples = [{"id": str(n), "image": f"{n}.png", "instruction": "Open the settings of this page",
                    "point": [9, 9]} for n in range(64)]  # fmt: skip
    elif load_family(config.model_name).has_vision:
        samples = [{"id": str(n), "images": [f"{n}-{page}.png" for page in range(4)], "label": n % 2} for n in range(8)]
    else:
        samples = [{"id": str(n), "text": "word " * (config.max_tokens - 200), "label": n % 2} for n in range(8)]
    if config.template == "sequential_cot":
        from templates import as_conversations

        samples = list(as_conversations(samples))
    page = folder / f"{config.task}.png"
    if not page.exists():
        Image.new("RGB", SIZES[config.task], "white").save(page)
    return SampleList(samples, config.experiment)


class OneImage(SampleEncoder):
    """Every image is the same file, under names of its own."""

    file: Path

    def load_image(self, path: str):
        return replace(super().load_image(self.file.name), path=path)

    def placement(self, path: str, size=None):
        return super().placement(path, upright_size(self.file))


def row(name: str, gpus: int, stage: int, rows: list[dict], models: dict[str, str], folder: Path, tflops: float) -> str:
    config = load_config(CONFIGS / f"{name}.yaml")
    model_name = config.model_name
    config = replace(
        config, model_name=models.get(model_name, model_name), data=replace(config.data, image_root=str(folder))
    )
    samples = drawn_samples(config, rows, stage, folder)
    encoder = OneImage(config, load_family(config.model_name), load_tokenizer(config.model_name))
    encoder.file = folder / f"{config.task}.png"
    loss = meta_loss(config, encoder.family, torch.bfloat16)
    held = held_bytes(loss, config, gpus, torch.bfloat16)
    longest = max(range(len(samples)), key=lambda row: len(str(samples[row])))
    memory = PassMemory(loss, samples[longest], encoder)
    fixed = sum(held.values())
    card = next((card for card in CARDS if fixed + memory.bytes(memory.row) <= USABLE * card * 1e9), None)
    tokens = memory.fitting(USABLE * card * 1e9 - fixed) if card else memory.row
    plan = make_plan(config, samples, encoder, gpus)
    counts = count_run(config, plan, samples, encoder, tokens, gpus, Operations.of(loss.model))
    minutes = 1000 * counts["operations"] / counts["questions"] / (gpus * tflops * 1e12) / 60
    trained = held["trained"] * (gpus if config.parallel == "fsdp" else 1) / 16  # parameters
    base = sum(p.numel() for p in loss.model.parameters()) - (trained if config.finetuning == "lora" else 0)
    shown = f"{card} GB" if card else f"more than {CARDS[-1]} GB"
    return (
        f"| {name} | {model_name.partition('/')[2]} | {gpus} | {fixed / 1e9:.1f} | {memory.bytes(tokens) / 1e9:.1f} in "
        f"{tokens:,} tokens | {shown} | {2 * base / 1e9:.1f} | {12 * trained / 1e9:.2f} | {minutes:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metadata", help="metadata.csv of Kvasir-VQA; default: drawn rows")
    parser.add_argument("--model", action="append", default=[], metavar="HUB_NAME=FOLDER")
    parser.add_argument("--only", nargs="*", help="these configs alone")
    parser.add_argument("--tflops", type=float, default=300, help="10¹² operations per second that each GPU reaches, a "
                        "stated rate (default: %(default)s)")  # fmt: skip
    args = parser.parse_args()
    models = dict(model.split("=", 1) for model in args.model)
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        rows = work.kvasir_samples(args.metadata)
        heads = ["config", "model", "GPUs", "weights and optimizer, GB a GPU", "largest pass, GB", "smallest card",
                 "base on disk, GB", "a checkpoint, GB", "min per 1,000 samples"]  # fmt: skip
        print(f"| {' | '.join(heads)} |")
        print("|---|---|--:|--:|--:|--:|--:|--:|--:|")
        for name, gpus, stage in SHIPPED:
            if args.only and name not in args.only:
                continue
            try:
                print(row(name, gpus, stage, rows, models, folder, args.tflops), flush=True)
            except UserError as error:
                print(f"| {name} | not counted: {error} |", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
