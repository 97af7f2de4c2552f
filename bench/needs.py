"""python bench/needs.py [--metadata metadata.csv] [--model HUB_NAME=FOLDER ...] [--tflops 300]

What each shipped config needs of every GPU, of the disk and of time, as `train.py --check` counts it: from shapes,
without weights or data. Nothing is measured. BENCHMARKS.md holds what this prints; by its last line the tests
notice that configs or job files have changed since.

--metadata: Kvasir-VQA's rows (img_id, question, answer, source); default: drawn rows with as many questions an image.
--model: a folder with config.json, tokenizer and image processor in place of a hub name; may be given several times.
"""

import argparse
import hashlib
import re
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
from forecast import USABLE, Operations, PassMemory, count_run, held_bytes, meta_loss, most_questions
from images import upright_size
from model import load_tokenizer
from preflight import make_plan
from samples import SampleList

ROOT = Path(__file__).resolve().parent.parent
# The keys of a config that decide what it needs; configs that agree in them, and in GPUs and stage, share a row.
DECIDING = """model_name task template image vision_frozen projector_frozen finetuning lora quantization parallel
    image_size resize max_pixels order max_samples max_tokens num_train_epochs train_bs grad_accum
    gradient_checkpointing share_prefix pass_tokens num_labels""".split()
CARDS = (24, 40, 48, 80, 141)  # GB
SIZES = {"vqa": (1856, 1600), "click": (1920, 1080), "cls": (1240, 1754)}  # of an image, in pixels


def gpus_of_jobs() -> dict[str, int]:
    """Config -> the GPUs of its Slurm file; where several name it, of the one that runs the fewest configs."""
    jobs = []
    for path in sorted(ROOT.glob("slurm/*.slurm")):
        text = path.read_text(encoding="utf-8")
        named = re.findall(r"configs/(\w*)(?:\{([\w,]+)\}(\w*))?\.yaml", text)  # configs/lr_text_{2e5,2e6}.yaml
        configs = {head + middle + tail for head, inner, tail in named for middle in inner.split(",")}
        if configs:
            jobs.append((configs, int(re.search(r"^#SBATCH --gres=gpu:(?:\w+:)?(\d+)", text, re.MULTILINE)[1])))
    return {config: gpus for configs, gpus in sorted(jobs, key=lambda job: -len(job[0])) for config in configs}


def shipped() -> dict[str, list[str]]:
    """What decides a row, hashed -> the configs that share it, of those with a job file: a user's own have none."""
    found = {}
    for name, gpus in sorted(gpus_of_jobs().items()):
        config = load_config(ROOT / "configs" / f"{name}.yaml")
        deciding = [repr(getattr(config, key)) for key in DECIDING]
        deciding += [str(config.backbone_learning_rate == 0), str(stage_of(config)), str(gpus)]
        found.setdefault(hashlib.sha256("\n".join(deciding).encode()).hexdigest()[:8], []).append(name)
    return found


def stage_of(config) -> int:
    """The stage of its training file; 0: all."""
    named = re.search(r"_stage(\d)", config.data.train)
    return int(named[1]) if named else 0


def drawn_samples(config, rows: list[dict], folder: Path) -> SampleList:
    """Kvasir-VQA's questions; clicks, one an image; documents as long as max_tokens allows, or of four pages."""
    if config.task == "vqa":
        samples = [sample for sample in rows if stage_of(config) in (0, sample["stage"])]
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


def row(names: list[str], rows: list[dict], models: dict[str, str], folder: Path, tflops: float) -> str:
    config, gpus = load_config(ROOT / "configs" / f"{names[0]}.yaml"), gpus_of_jobs()[names[0]]
    model_name = config.model_name
    config = replace(
        config, model_name=models.get(model_name, model_name), data=replace(config.data, image_root=str(folder))
    )
    samples = drawn_samples(config, rows, folder)
    encoder = OneImage(config, load_family(config.model_name), load_tokenizer(config.model_name))
    encoder.file = folder / f"{config.task}.png"
    loss = meta_loss(config, encoder.family, torch.bfloat16)
    held = held_bytes(loss, config, gpus, torch.bfloat16)
    longest = max(range(len(samples)), key=lambda row: len(str(samples[row])))
    memory = PassMemory(loss, samples[longest], encoder, most_questions(samples, encoder.family))
    fixed = sum(held.values())
    card = next((card for card in CARDS if fixed + memory.bytes(memory.row) <= USABLE * card * 1e9), None)
    tokens = memory.fitting(USABLE * card * 1e9 - fixed) if card else memory.row
    plan = make_plan(config, samples, encoder, gpus)
    counts = count_run(config, plan, samples, encoder, tokens, gpus, Operations.of(loss.model))
    minutes = 1000 * counts["operations"] / counts["questions"] / (gpus * tflops * 1e12) / 60
    trained = held["trained"] * (gpus if config.parallel == "fsdp" else 1) / 16  # parameters
    base = sum(p.numel() for p in loss.model.parameters()) - (trained if config.finetuning == "lora" else 0)
    model = f"{model_name.partition('/')[2].removesuffix('-Instruct')}, {gpus}"
    shown = f"{card} GB" if card else f"more than {CARDS[-1]} GB"
    return (
        f"| {', '.join(names)} | {model} | {fixed / 1e9:.1f} + "
        f"{memory.bytes(tokens) / 1e9:.1f} ({tokens:,} tokens) | {shown} | {2 * base / 1e9:.1f} | "
        f"{12 * trained / 1e9:.2f} | {minutes:.2f} |"
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
        heads = ["config", "model, GPUs", "GB of each GPU: held + largest pass", "smallest card", "base, GB",
                 "a checkpoint, GB", "min per 1,000 samples"]  # fmt: skip
        print(f"| {' | '.join(heads)} |")
        print("|---|---|--:|--:|--:|--:|--:|")
        for names in shipped().values():
            if args.only and not set(args.only) & set(names):
                continue
            try:
                print(row(names, rows, models, folder, args.tflops), flush=True)
            except UserError as error:
                print(f"| {', '.join(names)} | not counted: {error} |", flush=True)
        print(f"<!-- counted from {' '.join(shipped())} -->")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
