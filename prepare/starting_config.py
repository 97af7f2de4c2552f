"""A config to start from: every key that matters with its comment, sizes that fit the model family and the data."""

import json
import re
from collections.abc import Mapping, Sized
from pathlib import Path

import yaml

from errors import UserError
from files import refuse_unusable_folder, write_text

MODEL = "Qwen/Qwen3-VL-8B-Instruct"
LARGEST_SIDE = 768  # pixels; larger images are shrunk to it
# Pixels a side of one image token -> the fewest tokens a side, to which smaller images are enlarged. The published
# image processors of Qwen3-VL and Qwen3.5 enlarge any image of fewer than 65,536 pixels (256 × 256) themselves.
SMALLEST_TOKENS = {28: 7, 32: 8}
MIXTURE = re.compile(r"-a\d+(\.\d+)?b(-|$)")  # in the name of a mixture of experts, such as Qwen3-VL-30B-A3B
FACTORS = {r"qwen2(\.5)?-vl": 28, r"qwen3-vl|qwen3\.5": 32}  # model name -> pixels a side of one image token
GPUS = 2  # of the README's command
TRAIN_BS = 4


def size_factor(model_name: str) -> int:
    """What image sizes must be multiples of: read from a model folder, known by name for a hub's.

    Raises: `UserError` where the name tells no family."""
    if Path(model_name).is_dir():
        from family import load_family

        if factor := load_family(model_name).factor:
            return factor
        raise UserError(f"--model-name {model_name} is a text model; give one that sees images")
    if MIXTURE.search(model_name.lower()):
        raise UserError(f"--model-name {model_name} is a mixture of experts, which this repo does not train; give a "
                        f"dense model, such as {MODEL}")  # fmt: skip
    found = next((factor for name, factor in FACTORS.items() if re.search(name, model_name.lower())), None)
    if found is None:
        raise UserError(f"--model-name {model_name}: no folder here, and no name of a family that this repo trains "
                        f"(Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5)")  # fmt: skip
    return found


def fitting_size(largest_side: int, factor: int) -> int:
    """The side of the letterbox, a multiple of the factor that holds the largest image, within bounds."""
    return max(SMALLEST_TOKENS.get(factor, 8), min(-(-largest_side // factor), LARGEST_SIDE // factor)) * factor


def write(
    config: str | None,
    data: Path,
    image_root: Path,
    by_split: Mapping[str, Sized],
    model_name: str,
    image_size: int | None,
    task: str = "vqa",
    template: str = "plain",
    shared_images: bool = False,
) -> None:
    """Write the config of a prepared set, unless there is one; then say what to type next. config: where; None: to
    configs/, under the name of the data's folder. by_split: the samples. image_size: for letterbox; None: native
    resolution, as small targets need. shared_images: train and test have some in common, on purpose."""
    path = Path(config or f"configs/{data.absolute().name}.yaml")
    samples = {split: len(of_split) for split, of_split in by_split.items()}
    refuse_unusable_folder(path.parent, "--config")
    if path.exists() and (other := _other_data(path, data)):
        print(f"\n{path} is there already, stays as it is, and is about other data ({other}); run again with --config "
              f"and another name, to have one about {data}")  # fmt: skip
        return
    if path.exists():
        print(f"\n{path} is there already and stays as it is; remove it to have a fresh one")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text(path, data, image_root, samples, model_name, image_size, task, template, shared_images))
        print(f"\n{path} is a config to start from; read it, then:")
    if samples["train"]:
        print(f"  torchrun --nproc_per_node={GPUS} train.py --config {path} --check")
        print(f"  torchrun --nproc_per_node={GPUS} train.py --config {path}")
    if samples["test"]:
        base = "" if samples["train"] else " --checkpoint base"
        print(f"  python evaluate.py --config {path}{base}")


def _other_data(path: Path, data: Path) -> str | None:
    """A split's file that the config of this path names, where none that it names lies in `data`."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))["data"]
        named = [found[split] for split in ("train", "val", "test") if isinstance(found.get(split), str)]
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError, AttributeError):
        return None  # `--check` says what is wrong with it
    in_data = any(Path(name).resolve().parent == data.resolve() for name in named)
    return named[0] if named and not in_data else None


def text(path: Path, data, image_root, samples, model_name, image_size, task, template, shared_images) -> str:
    name, train = path.stem, samples["train"]
    steps, grad_accum = steps_an_epoch(train)
    lines = [
        f"  {split}: {_quoted(data / f'{split}.json')} # {number:,} samples"
        for split, number in samples.items()
        if number
    ]
    if shared_images:
        lines.append(
            "  shared_images: allowed # the published split shows images of train in test; every result says so"
        )
    size = (
        f"resize: letterbox\nimage_size: {image_size} # pixels a side; a multiple of {size_factor(model_name)} for "
        "this model. Larger shows more and costs more"
        if image_size
        else "resize: native # small targets need their pixels\nmax_pixels: 2097152 # a larger image is shrunk to it"
    )
    told = (
        f"how much better does {model_name} answer the questions of {name} after this training?"
        if train
        else f"how does {model_name} do on {name}?"
    )
    run = f"torchrun --nproc_per_node={GPUS} train.py --config {path}"
    evaluate = f"python evaluate.py --config {path}"
    cost = f"{3 * steps:,} steps with {GPUS} GPUs; `--check` counts memory and time." if train else "answers only."
    every = "epoch" if steps < 400 else "200"
    evaluated = every if samples["val"] and train else "null"
    return f"""# Question: {told}
# Cost:     {cost}
# Result:   not run yet.
# Run:      {run if train else evaluate + " --checkpoint base"}

experiment: {json.dumps(name.upper(), ensure_ascii=False)} # the banner of the log
model_name: {_quoted(model_name)} # a hub name, or the folder of a downloaded model
task: {task}
template: {template} # {TEMPLATES.get(template, "")}; no say over `messages` and `conversations`

data: # written by prepare_data.py; report.md beside them says what is in them
{chr(10).join(lines)}
  image_root: {_quoted(image_root)} # image paths in the samples are relative to this folder
order: images # images shuffled, the questions of one image together: they share its tokens

vision_frozen: true
projector_frozen: true
finetuning: lora
lora: {{ r: 16, alpha: 32, dropout: 0.05 }} # every linear layer of the language model
quantization: none # nf4: a 4-bit base, for small GPUs (pip install -r requirements-extra.txt)

{size}
max_tokens: 4096 # of one sample, with its image tokens; `--check` names samples that are longer

num_train_epochs: 3
train_bs: {TRAIN_BS}
grad_accum: {grad_accum} # {TRAIN_BS} × {grad_accum} × {GPUS} GPUs = {TRAIN_BS * grad_accum * GPUS} questions of a step
learning_rate: 1.0e-4
lr_scheduler_type: cosine
warmup_steps: {max(1, 3 * steps // 20)}
weight_decay: 0.0
max_grad_norm: 1.0
dataloader_num_workers: 4 # per GPU; more where `data` in the log is above 2 %

logging_steps: {10 if steps >= 20 else 1}
eval_steps: {evaluated} # steps, or epoch: loss and answers on val; null: never
eval_max_samples: 200 # questions, of whole images; the last evaluation takes all of val
save_steps: {every} # steps, or epoch: at most so much is lost when a run is killed
save_total_limit: 3
seed: 42

output_dir: {_quoted(f"outputs/{name}")}
results_dir: {_quoted(f"results/{name}")}
"""


TEMPLATES = {
    "plain": "the bare question",
    "candidates": "the question, then its candidates; plain: the bare question",
}


def _quoted(text) -> str:
    """A path as YAML has it: in quotes where it could be read as anything but this text (no, null, 1e5)."""
    text = str(text)
    is_plain = re.fullmatch(r"[A-Za-z_./][\w./-]*", text) and yaml.safe_load(text) == text
    return text if is_plain else json.dumps(text, ensure_ascii=False)


def steps_an_epoch(train: int) -> tuple[int, int]:
    """(steps of an epoch, grad_accum): 64 questions a step, and fewer where an epoch would have fewer than 50 steps."""
    for grad_accum in (8, 4, 2, 1):
        steps = -(-train // (TRAIN_BS * grad_accum * GPUS))
        if steps >= 50:
            break
    return steps, grad_accum
