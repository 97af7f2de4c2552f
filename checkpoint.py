"""Save, rotate and resume, atomically: a checkpoint is complete or absent.

A checkpoint is a folder of weights (safetensors) and readable JSON. It is written to a hidden sibling, flushed to the
disk and renamed, so that a crash at any moment leaves the previous one in place.
"""

import contextlib
import copy
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from classification import load_head, save_head
from config import Config, UserError
from model import HEAD, base_of, group_of, load_base, quiet_peft

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
    best_merit: list[float] | None = None  # of the best evaluation that has a checkpoint, see `evaluation.merit`
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


# ------------------------------------------------------------------------------------------------------------ save


def save_atomically(folder: Path, write) -> tuple[int, float]:
    """Let `write(temporary_folder)` fill a folder that appears under its name only when it is complete and on disk.

    Returns (bytes, seconds). Errors: `UserError` with path and free space where the disk is full or not writable;
    what was there before stays, and nothing partial is left."""
    started = time.perf_counter()
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        mode = 0o666 & ~_umask()
        for path in temporary.rglob("*"):
            if path.is_file():
                path.chmod(mode)  # safetensors makes its files private to the user, and colleagues share checkpoints
        size = sum(_flush(path) for path in temporary.rglob("*") if path.is_file())
        _flush(temporary)
        if folder.exists():  # incomplete, and already reported; moved aside, so that nothing is ever half deleted
            folder.rename(folder.with_name(f".deleted-{folder.name}"))
        temporary.rename(folder)
        _flush(folder.parent)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # torch and safetensors report a full disk in words of their own; the free space tells which it was.
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(folder.parent).free
            if isinstance(error, OSError) or "No space left" in str(error) or "unexpected pos" in str(error):
                raise UserError(
                    f"cannot save {folder} ({' '.join(str(error).split())}); {free / 1e9:.2f} GB are free there. "
                    "Free some space and start again: the run resumes from the checkpoint before"
                ) from None
        raise
    return size, time.perf_counter() - started


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush(path: Path) -> int:
    """fsync a file or folder; returns its size in bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write beside, rename last."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


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
    output_dir, model, optimizer, names, state: TrainerState, config: Config, records: dict[str, dict]
) -> tuple[int, float]:
    """Write checkpoint-<step>: what is trained, the optimizer's state and the trainer's. Returns (bytes, seconds).

    records: file name → content of further JSON files that belong to the weights.
    Frozen base weights are never written: they are `model_name`'s. Call on one rank."""

    def write(folder: Path) -> None:
        if config.finetuning == "lora":
            save_adapter(model, folder)
        else:
            trained = {name: p.detach().cpu().contiguous() for name, p in names.items() if group_of(name) != HEAD}
            save_file(trained, folder / TRAINED_FILE)
        if config.task == "cls":
            save_head(base_of(model).cls_head.state_dict(), folder)
        for name, content in records.items():
            write_json(folder / name, content)
        save_optimizer(optimizer, names, folder / OPTIMIZER_FILE)
        state.rng = {"rule": "torch.manual_seed from (seed, step, rank)", "seed": config.seed, "next_step": state.step}
        state.files = {path.name: path.stat().st_size for path in folder.iterdir()}
        (folder / STATE_FILE).write_text(json.dumps(asdict(state), indent=1) + "\n")

    folder = Path(output_dir) / f"checkpoint-{state.step}"
    if folder.exists() and whats_wrong(folder) is None:  # stopped again before the first step after a resume
        return 0, 0.0
    return save_atomically(folder, write)


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
            return PeftModel.from_pretrained(base, folder).to(device)
    if (folder / TRAINED_FILE).is_file():
        model = load_base(model_name, dtype)
        model.load_state_dict(load_file(folder / TRAINED_FILE), strict=False)
        return model.to(device)
    if (folder / "config.json").is_file():
        return load_base(str(folder), dtype).to(device)
    raise UserError(f"{folder} holds no adapter, checkpoint or model; train first, or give --checkpoint another folder")


def save_final(output_dir: Path, model, config: Config, records: dict[str, dict]) -> None:
    """The run's result in output_dir itself: the adapter in the standard PEFT layout (full fine-tuning: the whole
    model as `from_pretrained` reads it) with tokenizer, image processor and `records` (see `save`). Weights come last,
    so that their presence means that all is there."""
    from transformers import AutoImageProcessor, AutoTokenizer

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
        state = {name: tensor for name, tensor in model.state_dict().items() if group_of(name) != HEAD}
        model.save_pretrained(temporary, state_dict=state)
    if config.task == "cls":
        save_head(base_of(model).cls_head.state_dict(), temporary)
    for path in sorted(temporary.iterdir(), key=lambda path: path.name in FINAL_FILES):
        _flush(path)
        path.replace(output_dir / path.name)
    temporary.rmdir()
    _flush(output_dir)


def save_optimizer(optimizer: torch.optim.Optimizer, names: dict[str, torch.nn.Parameter], path: Path) -> None:
    """AdamW's moments and step counts by parameter name. (A pickled state dict would need `torch.load`.)"""
    tensors = {}
    for name, parameter in names.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}|{key}"] = value.detach().cpu().contiguous()
    save_file(tensors, path)


def load_optimizer(optimizer: torch.optim.Optimizer, names: dict[str, torch.nn.Parameter], path: Path) -> None:
    states: dict = {name: {} for name in names}
    for entry, value in load_file(path).items():
        name, _, key = entry.rpartition("|")
        # AdamW keeps its step count on the CPU, its moments beside the parameter.
        states[name][key] = value if key == "step" else value.to(names[name].device)
    for name, parameter in names.items():
        if states[name]:
            optimizer.state[parameter] = states[name]
