"""Save and resume, atomically: a checkpoint is complete or absent.

A checkpoint is a folder of weights (safetensors) and readable JSON. It is written to a hidden sibling, flushed to the
disk and renamed, so that a crash at any moment leaves the previous one in place.
"""

import contextlib
import copy
import json
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import sharding
from classification import HEAD_FILE, load_head, save_head
from config import Config
from distributed import Ranks, all_or_raise
from errors import UserError
from files import flush, full_disk_is_said, save_atomically, write_json
from model import HEAD, add_lora_in_the_product, base_of, group_of, load_base, quiet_peft

STATE_FILE, OPTIMIZER_FILE = "trainer_state.json", "optimizer.safetensors"
ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
TRAINED_FILE = "trained_weights.safetensors"  # full fine-tuning: what is trained, without the frozen rest
FINAL_FILES = (ADAPTER_FILE, "model.safetensors", "model.safetensors.index.json")  # the last to appear
MARKER = "PREEMPTED"  # the Slurm launcher requeues the job where it finds this file


@dataclass
class TrainerState:
    """What a run must know to go on. Readable JSON; times in seconds."""

    step: int = 0  # optimizer steps done
    global_batch: int = 0
    ranks: int = 0
    train_data: str = ""  # SHA-256 of the training samples
    config: dict = field(default_factory=dict)
    interval: dict = field(default_factory=dict)  # sums since the last log line
    evaluation_due: bool = False  # stopped inside the evaluation of this step
    nonfinite_in_a_row: int = 0
    best_score: list[float] | None = (
        None  # of the best evaluation that has a checkpoint, see `inference.selection_score`
    )
    best_step: int | None = None
    train_seconds: float = 0.0
    # Dropout is seeded anew at each step from (seed, step, rank), so this number is the whole RNG state.
    rng: dict = field(default_factory=dict)
    files: dict = field(default_factory=dict)  # name → bytes


def whats_wrong(folder: Path) -> str | None:
    """Why a checkpoint folder cannot be used, or None."""
    try:
        state = read_state(folder)
    except FileNotFoundError:
        return f"{STATE_FILE} is missing"
    except (OSError, ValueError, TypeError) as error:
        return f"{STATE_FILE} cannot be read ({error})"
    for name, size in state.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def read_state(folder: Path) -> TrainerState:
    return TrainerState(**json.loads((folder / STATE_FILE).read_text()))


def has_lost_best(state: TrainerState, resumed_from: str, output_dir: Path) -> bool:
    """Whether a resumed run's best checkpoint is not its own: another folder's, or gone."""
    if state.best_step is None:
        return False
    elsewhere = Path(resumed_from).resolve().parent != output_dir.resolve()
    return elsewhere or whats_wrong(output_dir / f"checkpoint-{state.best_step}") is not None


# ------------------------------------------------------------------------------------------------------------ save


def adapter_state(model) -> dict[str, torch.Tensor]:
    """The adapter under the names of the standard PEFT layout, on the CPU."""
    from peft import get_peft_model_state_dict

    return {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }


def save_adapter(model, folder: Path) -> None:
    """adapter_model.safetensors and adapter_config.json, as plain `PeftModel.from_pretrained` reads them."""
    save_file(adapter_state(model), folder / ADAPTER_FILE, metadata={"format": "pt"})
    saved_config = copy.deepcopy(model.peft_config["default"])
    saved_config.inference_mode = True
    saved_config.save_pretrained(folder)


def load_adapter(model, folder) -> None:
    """Put an adapter's weights into the model's own. Errors: `UserError` where the two do not fit exactly."""
    from peft import set_peft_model_state_dict

    path = Path(folder) / ADAPTER_FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no {ADAPTER_FILE}; give the folder of an adapter or checkpoint")
    loaded, own = load_file(path), adapter_state(model)
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in (loaded, own)]
    if shapes[0] != shapes[1]:
        differing = sorted(
            name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name)
        )
        raise UserError(
            f"{path} does not fit this model and lora.r: {len(differing)} tensors differ, first {differing[0]}"
        )
    set_peft_model_state_dict(model, loaded)


def save(
    output_dir, model, optimizer, trainable, state: TrainerState, config: Config, records: dict[str, dict], ranks: Ranks
) -> tuple[int, float]:
    """Write checkpoint-<step>: what is trained, the optimizer's state and the trainer's. Returns (bytes, seconds).

    records: file name → content of further JSON files that belong to the weights.
    Frozen base weights are never written: they are `model_name`'s. All ranks: contains all_reduces; where one rank
    cannot save, all raise `UserError`."""
    sharded = config.parallel == "fsdp"
    folder = Path(output_dir) / f"checkpoint-{state.step}"
    if ranks.any(ranks.is_first and folder.exists() and whats_wrong(folder) is None):
        return 0, 0.0  # stopped again before the first step after a resume
    head = full_head(model) if config.task == "cls" else None
    shards = folder.with_name(f".{folder.name}.{sharding.SHARDS}.tmp")

    def write(folder: Path) -> None:
        if sharded:
            shards.rename(folder / sharding.SHARDS)
        elif config.finetuning == "lora":
            save_adapter(model, folder)
        else:
            trained = {name: p.detach().cpu().contiguous() for name, p in trainable.items() if group_of(name) != HEAD}
            save_file(trained, folder / TRAINED_FILE)
        if head:
            save_head(head, folder)
        for name, content in records.items():
            write_json(folder / name, content)
        if not sharded:
            save_optimizer(optimizer, trainable, folder / OPTIMIZER_FILE)
        state.rng = {"rule": "torch.manual_seed from (seed, step, rank)", "seed": config.seed, "next_step": state.step}
        files = [path for path in folder.rglob("*") if path.is_file()]
        state.files = {str(path.relative_to(folder)): path.stat().st_size for path in files}
        (folder / STATE_FILE).write_text(json.dumps(asdict(state), indent=1) + "\n")

    def save_on_first() -> tuple[int, float]:
        return save_atomically(folder, write) if ranks.is_first else (0, 0.0)

    if not sharded:
        return all_or_raise(ranks, save_on_first)
    started = time.perf_counter()
    try:
        all_or_raise(ranks, lambda: ranks.is_first and shutil.rmtree(shards, ignore_errors=True))
        all_or_raise(ranks, lambda: _save_shards(shards, trainable, optimizer))
        size, _ = all_or_raise(ranks, save_on_first)
    finally:
        if ranks.is_first:
            shutil.rmtree(shards, ignore_errors=True)
    return size, time.perf_counter() - started


def full_head(model) -> dict[str, torch.Tensor]:
    """All ranks: contains all_gathers where it is sharded."""
    return {name: sharding.full_tensor(tensor) for name, tensor in base_of(model).cls_head.state_dict().items()}


def _save_shards(shards: Path, trainable, optimizer) -> None:
    with full_disk_is_said(shards):
        sharding.save_shards(shards, trainable, optimizer)


def resume(folder: Path, model, optimizer, trainable: dict[str, torch.nn.Parameter], config: Config) -> None:
    """Put a checkpoint's weights and optimizer state in place. All ranks: contains collectives under fsdp."""
    if config.parallel == "fsdp":
        sharding.load_shards(folder / sharding.SHARDS, trainable, optimizer)
    else:
        load_weights(model, folder, config)
        load_optimizer(optimizer, trainable, folder / OPTIMIZER_FILE)


def load_best(folder: Path, model, trainable: dict[str, torch.nn.Parameter], config: Config) -> None:
    """Put a checkpoint's weights in place, without the optimizer's state: for the end of a run. All ranks: contains
    collectives under fsdp."""
    if config.parallel == "fsdp":
        sharding.load_shards(folder / sharding.SHARDS, trainable)
    else:
        load_weights(model, folder, config)


def load_initial(model, folder, config: Config) -> str:
    """Start from an adapter, and a classification run from its head too, where it has one. Returns what the log says.

    Errors: `UserError` where they do not fit."""
    load_adapter(model, folder)
    said = f"Starting from the adapter {folder}, with a fresh optimizer and schedule"
    if config.task != "cls":
        return said
    if (Path(folder) / HEAD_FILE).is_file():
        load_head(model, Path(folder), config.num_labels)
        return f"{said}, and its head"
    return f"{said}, and a fresh head"


def load_weights(model, folder: Path, config: Config) -> None:
    """Put a checkpoint's trained weights into the model. Errors: `UserError` where they do not fit."""
    if config.task == "cls":
        load_head(model, folder, config.num_labels)
    if config.finetuning == "lora":
        load_adapter(model, folder)
        return
    report = model.load_state_dict(load_file(folder / TRAINED_FILE), strict=False)
    assert not report.unexpected_keys, f"{folder} holds weights this model does not have"


def is_final(output_dir: Path) -> bool:
    """Whether the run's result is there, written completely."""
    return any((output_dir / name).is_file() for name in FINAL_FILES)


def load_trained(
    model_name: str,
    folder: Path | None,
    device: torch.device,
    quantization: str = "none",
    num_labels: int | None = None,
) -> torch.nn.Module:
    """The base model with what was trained on top, for inference. folder: an adapter, a checkpoint, or a whole model
    folder; None: the base alone. quantization: the base's, as in training. num_labels: of a classification head.

    Errors: `UserError` where the folder holds none of these."""
    if num_labels is not None:
        if folder is None:
            raise UserError("the base alone has no classification head; give the folder of a trained model")
        model = load_trained(model_name, folder, device, quantization)
        load_head(model, folder, num_labels)
        return model
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if folder is None:
        return load_base(model_name, dtype, quantization).to(device)
    if (folder / ADAPTER_CONFIG).is_file() and (folder / ADAPTER_FILE).is_file():
        from peft import PeftModel

        base = load_base(model_name, dtype, quantization)
        with quiet_peft():
            model = PeftModel.from_pretrained(base, folder, torch_device="cpu").to(device)
        add_lora_in_the_product(model)  # as in training, so that the same weights give the same numbers
        return model
    if (folder / TRAINED_FILE).is_file():
        model = load_base(model_name, dtype)
        model.load_state_dict(load_file(folder / TRAINED_FILE), strict=False)
        return model.to(device)
    if (folder / sharding.SHARDS).is_dir():
        model = load_base(model_name, dtype)
        sharding.load_unsharded(folder / sharding.SHARDS, model)
        return model.to(device)
    if (folder / "config.json").is_file():
        return load_base(str(folder), dtype).to(device)
    raise UserError(f"{folder} holds no adapter, checkpoint or model; train first, or give --checkpoint another folder")


def save_final(output_dir: Path, model, config: Config, records: dict[str, dict], ranks: Ranks) -> None:
    """The run's result in output_dir itself: the adapter in the standard PEFT layout (full fine-tuning: the whole
    model as `from_pretrained` reads it) with tokenizer, image processor and `records` (see `save`). Weights come last,
    so that their presence means that all is there. All ranks: contains all_gathers under fsdp."""
    from transformers import AutoImageProcessor, AutoTokenizer

    head = full_head(model) if config.task == "cls" else None
    full = sharding.full_state_dict(model, keep=ranks.is_first) if config.finetuning == "full" else {}
    if not ranks.is_first:
        return
    temporary = output_dir / ".final.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    AutoTokenizer.from_pretrained(config.model_name).save_pretrained(temporary)
    with contextlib.suppress(OSError):  # text models have none
        AutoImageProcessor.from_pretrained(config.model_name, backend="pil").save_pretrained(temporary)
    for name, content in records.items():
        write_json(temporary / name, content)
    if config.finetuning == "lora":
        save_adapter(model, temporary)
    else:
        weights = {name: tensor for name, tensor in full.items() if group_of(name) != HEAD}
        model.save_pretrained(temporary, state_dict=weights)
        described = json.loads((temporary / "config.json").read_text(encoding="utf-8"))
        described["dtype"] = str(next(iter(weights.values())).dtype).removeprefix("torch.")  # not the masters'
        write_json(temporary / "config.json", described)
    if head:
        save_head(head, temporary)
    for path in sorted(temporary.iterdir(), key=lambda path: path.name in FINAL_FILES):
        flush(path)
        path.replace(output_dir / path.name)
    temporary.rmdir()
    flush(output_dir)


def save_optimizer(optimizer: torch.optim.Optimizer, trainable: dict[str, torch.nn.Parameter], path: Path) -> None:
    """AdamW's moments and step counts by parameter name. (A pickled state dict would need `torch.load`.)"""
    tensors = {}
    for name, parameter in trainable.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}|{key}"] = value.detach().cpu().contiguous()
    save_file(tensors, path)


def load_optimizer(optimizer: torch.optim.Optimizer, trainable: dict[str, torch.nn.Parameter], path: Path) -> None:
    states: dict = {name: {} for name in trainable}
    for entry, value in load_file(path).items():
        name, _, key = entry.rpartition("|")
        # AdamW keeps its step count on the CPU, its moments beside the parameter.
        states[name][key] = value if key == "step" else value.to(trainable[name].device)
    for name, parameter in trainable.items():
        if states[name]:
            optimizer.state[parameter] = states[name]
