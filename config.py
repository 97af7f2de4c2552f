"""python config.py --config configs/exp2.yaml [key=value ...] [--get output_dir]

One YAML file -> one frozen `Config`. Every mistake is named here, before a GPU is touched: unknown, missing, ill-typed
and contradictory keys are fatal, and the message names the key, the file and the nearest valid key. Run as a script it
prints the resolved config, or one value of it for shell scripts.
"""

import argparse
import contextlib
import dataclasses
import difflib
import math
import os
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from errors import UserError, exit_on_user_error


@dataclass(frozen=True)
class Lora:
    r: int = 16
    alpha: int = 32
    dropout: float = 0.05


@dataclass(frozen=True)
class Data:
    train: str | None = None  # a set that is only for testing has none
    val: str | None = None
    test: str | None = None
    image_root: str = "."  # image paths in the samples are relative to this folder and may not leave it
    # allowed: the splits are as published, and share images on purpose; every result says so
    shared_images: Literal["refused", "allowed"] = "refused"


@dataclass(frozen=True)
class Config:
    experiment: str  # the banner
    model_name: str  # a hub name or a folder
    task: Literal["vqa", "click", "cls"]
    data: Data
    output_dir: str
    results_dir: str
    learning_rate: float
    template: str = "plain"
    image: Literal["shown", "none"] = "shown"  # none: the question-only baseline
    vision_frozen: bool = True
    projector_frozen: bool = True
    finetuning: Literal["lora", "full"] = "lora"
    lora: Lora = field(default_factory=Lora)
    quantization: Literal["none", "nf4"] = "none"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    image_size: int | None = None  # pixels a side, for letterbox
    resize: Literal["letterbox", "native"] = "letterbox"
    max_pixels: int | None = None  # for native; None: the model's own limit
    order: Literal["sequential", "random", "images"] = "sequential"
    max_samples: int | None = None  # of the training split, the first ones in the file
    max_tokens: int = 4096  # of one sample: prompt, image tokens and answer
    num_train_epochs: float = 1.0
    train_bs: int = 4  # train_bs × grad_accum × GPUs is the number of questions of a step, and nothing else
    grad_accum: int = 8
    eval_bs: int | None = None  # questions of an evaluation batch at the most; None: as many as 16,384 tokens hold
    backbone_learning_rate: float | None = None  # cls only
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    gradient_checkpointing: bool = False
    share_prefix: bool = True
    pass_tokens: int | None = None  # of one forward and backward, with padding; None: from the device's memory
    compile: bool | None = None  # the decoder layers, while training; None: on a GPU where a compiler works
    deterministic: bool = False  # bit for bit the same on GPUs too; slower, and without `compile`
    dataloader_num_workers: int = 4
    logging_steps: int = 10
    eval_steps: int | Literal["epoch"] | None = None  # None: no evaluation during training
    eval_max_samples: int = 200  # scored at each evaluation but the last, whole images; 0: the loss of all, no answers
    save_steps: int | Literal["epoch"] = 200
    save_total_limit: int = 3
    init_adapter: str | None = None  # start from this adapter's weights, with a fresh optimizer and schedule
    resume: str = "auto"  # auto, never, or the path of a checkpoint
    seed: int = 42
    num_labels: int | None = None  # cls only


# A resumed run may change these; every other key changes the mathematics. (The samples themselves are compared by their
# content, so the data may move.) share_prefix, pass_tokens, gradient_checkpointing, train_bs, grad_accum and the number
# of GPUs move no question to another step; they change which dropout is drawn and the order of sums, so that losses
# differ slightly from there. train_bs and grad_accum may change, as long as their product with the number of GPUs,
# the questions of one optimizer step, stays.
FREE_ON_RESUME = frozenset(
    "experiment data output_dir results_dir eval_bs eval_steps eval_max_samples logging_steps save_steps "
    "save_total_limit dataloader_num_workers resume share_prefix pass_tokens gradient_checkpointing compile "
    "deterministic train_bs grad_accum".split()
)
_AT_LEAST = {
    **dict.fromkeys(
        "train_bs grad_accum eval_bs logging_steps save_total_limit max_tokens lora.r lora.alpha".split(), 1
    ),
    **dict.fromkeys("warmup_steps dataloader_num_workers eval_max_samples weight_decay seed lora.dropout".split(), 0),
    **dict.fromkeys("learning_rate backbone_learning_rate".split(), 0),
    **dict.fromkeys("pass_tokens max_samples eval_steps save_steps max_pixels image_size".split(), 1),
    "num_labels": 2,
}
_AT_MOST = {"seed": 2**64 - 1}  # what torch takes


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML lets the last of two equal keys win in silence; here it is an error."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if not isinstance(key, typing.Hashable):
                continue  # a list as a key: PyYAML reports it, with its place
            if key in seen:
                raise UserError(f"{key_node.start_mark.name}: key '{key}' is given twice; keep one")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path) -> dict:
    """The mapping in a YAML file. Raises: `UserError` with file and line."""
    try:
        with open(path, encoding="utf-8") as stream:
            loaded = yaml.load(stream, _UniqueKeyLoader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give --config the path of a YAML file") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a UTF-8 text file; give --config the path of a YAML file") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: expected `key: value` lines, found {type(loaded).__name__}")
    return loaded


def load_config(path, overrides: typing.Sequence[str] = ()) -> Config:
    """The config of a file, with `key=value` overrides (`lora.r=32`) on top. Raises: `UserError` naming the cure."""
    return build_config(read_yaml(path), str(path), overrides)


def build_config(values: dict, source: str, overrides: typing.Sequence[str] = ()) -> Config:
    """The config of a nested dict, as `load_config`. source: what messages call it."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"argument '{override}' is not key=value; write for example learning_rate=1e-4")
        try:
            value = yaml.safe_load(text) if text else None
        except yaml.YAMLError:
            raise UserError(f"argument '{override}': the value cannot be parsed; quote it") from None
        *parents, leaf = key.split(".")
        target = values
        for parent in parents:
            if not isinstance(target.get(parent), dict):
                target[parent] = {}
            target = target[parent]
        target[leaf] = value
    config = _build(Config, values, source, "")
    _check_rules(config, source)
    return config


def _build(cls, values: dict, source: str, prefix: str):
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            hint = f"did you mean '{prefix}{near[0]}'?" if near else f"valid keys: {', '.join(fields)}"
            raise UserError(f"{source}: unknown key '{prefix}{key}'; {hint}")
    built = {}
    for name, spec in fields.items():
        key = prefix + name
        if name in values:
            built[name] = _convert(values[name], hints[name], key, source)
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise UserError(f"{source}: key '{key}' is missing; add it ({_describe(hints[name])})")
    return cls(**built)


def _describe(hint) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(f"'{choice}'" for choice in typing.get_args(hint))
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(_describe(part) for part in typing.get_args(hint))
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "nothing"}
    return names.get(hint, "a group of keys")


def _convert(value, hint, key: str, source: str):
    wrong = UserError(f"{source}: key '{key}' is {value!r} but must be {_describe(hint)}")
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise wrong
        return _build(hint, value, source, key + ".")
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    for option in options:
        if option is type(None) and value is None:
            return None
        if typing.get_origin(option) is Literal and value in typing.get_args(option):
            return value
        if option is bool and isinstance(value, bool):
            return value
        if isinstance(value, bool):
            continue
        if option is int and (isinstance(value, int) or (isinstance(value, float) and value.is_integer())):
            return _in_range(int(value), key, source)
        if option is float:
            number = math.nan
            with contextlib.suppress(TypeError, ValueError):
                number = float(value)  # YAML 1.1 reads 2e-5, without a dot, as a text
            if math.isfinite(number):
                return _in_range(number, key, source)
        if option is str and isinstance(value, str) and value:
            expanded = os.path.expanduser(os.path.expandvars(value))
            if re.search(r"\$\{?\w+\}?", expanded) and "$" in value:
                raise UserError(f"{source}: key '{key}': the environment variable in {value!r} is not set")
            return expanded
        if option is str and isinstance(value, (int, float)):
            return str(value)
    if typing.get_origin(hint) is Literal and isinstance(value, str):
        near = difflib.get_close_matches(value, typing.get_args(hint), n=1)
        if near:
            raise UserError(f"{wrong}; did you mean '{near[0]}'?")
    raise wrong


def _in_range(value, key: str, source: str):
    low = _AT_LEAST.get(key)
    if low is not None and value < low:
        raise UserError(f"{source}: key '{key}' is {value} but must be at least {low}")
    high = _AT_MOST.get(key)
    if high is not None and value > high:
        raise UserError(f"{source}: key '{key}' is {value} but must be at most {high}")
    if key in ("num_train_epochs", "max_grad_norm") and value <= 0:
        raise UserError(f"{source}: key '{key}' is {value} but must be above 0")
    if key == "lora.dropout" and value >= 1:
        raise UserError(f"{source}: key 'lora.dropout' is {value} but must be below 1")
    return value


def _check_rules(config: Config, source: str) -> None:
    def forbid(condition, message):
        if condition:
            raise UserError(f"{source}: {message}")

    forbid(config.task == "cls" and config.num_labels is None, "task 'cls' needs key 'num_labels'")
    forbid(config.task != "cls" and config.num_labels is not None, "key 'num_labels' is only valid for task 'cls'")
    forbid(
        config.task != "cls" and config.backbone_learning_rate is not None,
        f"key 'backbone_learning_rate' is only valid for task 'cls', and the task is '{config.task}'; remove it",
    )
    forbid(
        config.quantization == "nf4" and config.finetuning == "full",
        "quantization 'nf4' trains adapters only; set finetuning: lora, or quantization: none",
    )
    forbid(
        config.parallel == "fsdp" and config.finetuning == "lora",
        "parallel 'fsdp' shards full fine-tuning; LoRA runs under parallel: ddp",
    )
    forbid(
        config.resize == "native" and config.image_size is not None,
        "key 'image_size' belongs to resize: letterbox; with resize: native set max_pixels instead",
    )
    forbid(
        config.resize == "letterbox" and config.max_pixels is not None,
        "key 'max_pixels' belongs to resize: native; with resize: letterbox set image_size instead",
    )
    forbid(
        config.init_adapter is not None and config.finetuning != "lora",
        "key 'init_adapter' starts from an adapter, so it needs finetuning: lora",
    )
    forbid(
        config.compile and config.deterministic,
        "a compiled layer's sums depend on the first shapes it meets, so compile: true cannot be deterministic: true; "
        "remove one of them",
    )
    forbid(
        config.compile and (config.parallel == "fsdp" or config.quantization != "none"),
        "compile: true works under parallel: ddp and quantization: none; remove it",
    )


def to_dict(config: Config) -> dict:
    """Plain nested dict, as written to `config.yaml` and to checkpoints."""
    return dataclasses.asdict(config)


def flatten(values: dict, prefix: str = "") -> dict:
    """Nested dict -> {"lora.r": 16, ...}."""
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def check_data_files(config: Config, splits: typing.Iterable[str]) -> None:
    """Every named split must be given and exist. Raises: `UserError` with key and path."""
    for split in splits:
        path = getattr(config.data, split)
        if path is None:
            raise UserError(f"key 'data.{split}' is not set; give it the path of the {split} split")
        if not Path(path).is_file():
            raise UserError(f"data.{split}: the file {path} does not exist; run prepare_data.py or correct the path")
    if not Path(config.data.image_root).is_dir():
        raise UserError(f"data.image_root: the folder {config.data.image_root} does not exist; correct the path")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--get", metavar="KEY", help="print one value, for shell scripts")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    config = load_config(args.config, args.overrides)
    if args.get is None:
        print(to_yaml(config), end="")
        return
    value = to_dict(config)
    for part in args.get.split("."):
        if not isinstance(value, dict) or part not in value:
            raise UserError(f"--get: no key '{args.get}'")
        value = value[part]
    print("" if value is None else value)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
