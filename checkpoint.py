"""Save and resume, atomically: a checkpoint is complete or absent.

A checkpoint is a folder of weights (safetensors) and readable JSON. It is written to a hidden sibling, flushed to the
disk and renamed, so that a crash at any moment leaves the previous one in place.
"""

import contextlib
import copy
import json
import os
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import sharding
from classification import HEAD_FILE, attach_head, load_head, save_head
from config import Config
from distributed import Ranks, all_or_raise
from errors import UserError
from family import fingerprint
from files import file_sha256, flush, full_disk_is_said, read_json, save_atomically, write_json
from model import (
    HEAD,
    base_of,
    group_of,
    load_base,
    quiet_bitsandbytes,
    read_fitting,
    refuse_misfit,
    trains,
    wrap_with_lora,
)
from tasks import task_of

STATE_FILE, OPTIMIZER_FILE = "trainer_state.json", "optimizer.safetensors"
ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
BASE_FILE = "base.json"  # which base the weights belong to, see `family.fingerprint`
TRAINED_FILE = "trained_weights.safetensors"  # full fine-tuning: what is trained, without the frozen rest
FINAL_FILES = (ADAPTER_FILE, "model.safetensors", "model.safetensors.index.json")  # the last to appear
MARKER = "PREEMPTED"  # the Slurm launcher requeues the job where it finds this file


@dataclass
class TrainerState:
    """What a run must know to go on. Readable JSON; times in seconds."""

    step: int = 0  # optimizer steps done
    global_batch: int = 0
    ranks: int = 0
    pass_tokens: int = 0  # the budget of a pass, and the device it was for: a resumed run cuts its steps alike
    device: str = ""
    train_data: str = ""  # SHA-256 of the training samples
    input_hashes: dict = field(default_factory=dict)  # of images and prompt, see `preflight.input_hashes`
    config: dict = field(default_factory=dict)
    interval: dict = field(default_factory=dict)  # sums since the last log line
    evaluation_due: bool = False  # stopped inside the evaluation of this step
    nonfinite_in_a_row: int = 0
    best_score: list[float] | None = None  # of the best evaluation that has a checkpoint: the task's `selection_score`
    best_step: int | None = None
    best_of: str = ""  # what the best was chosen on, see `train.scored`
    train_seconds: float = 0.0
    # Dropout is seeded anew at each step from (seed, step, rank), so this number is the whole RNG state.
    rng: dict = field(default_factory=dict)
    files: dict = field(default_factory=dict)  # name -> bytes
    sha256: dict = field(default_factory=dict)  # name -> of the content


def whats_wrong(folder: Path, content: bool = False) -> str | None:
    """Why a checkpoint folder cannot be used, or None. content: read all of it, or a flipped byte is not noticed."""
    if not (folder / STATE_FILE).is_file():
        return f"{STATE_FILE} is missing"
    try:
        state = read_state(folder)
        for name, size in state.files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if content and state.sha256:  # older checkpoints have none
            found = hash_files(folder, [folder / name for name in state.sha256])
            if changed := [name for name, digest in state.sha256.items() if found[name] != digest]:
                return f"{changed[0]} has changed since it was saved"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"it cannot be read ({error})"
    return None


def hash_files(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    """Path within the folder -> SHA-256 of the content, of several files at once: large ones take seconds."""
    paths = list(paths)
    with ThreadPoolExecutor() as threads:
        names = (str(path.relative_to(folder)) for path in paths)
        return dict(zip(names, threads.map(file_sha256, paths), strict=True))


def read_state(folder: Path) -> TrainerState:
    return TrainerState(**read_json(folder / STATE_FILE, "restore it, or use another checkpoint"))


def has_lost_best(state: TrainerState, resumed_from: str, output_dir: Path) -> bool:
    """Whether a resumed run's best checkpoint is not its own: another folder's, or gone. resumed_from: read already."""
    if state.best_step is None:
        return False
    elsewhere = Path(resumed_from).resolve().parent != output_dir.resolve()
    if elsewhere or state.best_step == state.step:
        return elsewhere
    return whats_wrong(output_dir / f"checkpoint-{state.best_step}", content=True) is not None


def check_base(folder: Path, model_name: str) -> str | None:
    """Whether the weights in a folder belong to this base. Returns a note for the log where that is not recorded.

    Raises: `UserError` that says what differs."""
    path = Path(folder) / BASE_FILE
    if not path.is_file():
        return f"{folder} holds no {BASE_FILE}: that its weights belong to {model_name} is not checked"
    what_to_do = f"if its weights are meant for {model_name}, delete {path}"
    recorded, found = read_json(path, what_to_do), fingerprint(model_name)
    if not isinstance(recorded, dict):
        raise UserError(f"{path}: expected an object; {what_to_do}")
    differing = [key for key in ("config", "tokenizer", "weights") if recorded.get(key) != found[key]]
    if differing:
        raise UserError(
            f"{folder} was trained on {recorded.get('model_name')}, and model_name {model_name} differs from that in "
            f"{' and '.join(differing)}; set model_name to the base it was trained on, or {what_to_do}"
        )
    return None


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


def save(
    output_dir, model, optimizer, trainable, state: TrainerState, config: Config, records: dict[str, dict], ranks: Ranks
) -> tuple[int, float]:
    """Write checkpoint-<step>: what is trained, the optimizer's state and the trainer's. Returns (bytes, seconds).

    records: file name -> content of further JSON files that belong to the weights.
    Frozen base weights are never written: they are `model_name`'s. All ranks: contains all_reduces; where one rank
    cannot save, all raise `UserError`."""
    sharded = config.parallel == "fsdp"
    folder = Path(output_dir) / f"checkpoint-{state.step}"
    if ranks.any(ranks.is_first and folder.exists() and whats_wrong(folder, content=True) is None):
        return 0, 0.0  # stopped again before the first step after a resume
    head = full_head(model) if task_of(config).HAS_HEAD else None
    shard_hashes: dict[str, str] = {}
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
        # Without the record of the base: a user who means to go on from another one deletes that.
        files = [path for path in folder.rglob("*") if path.is_file() and path.name != BASE_FILE]
        state.files = {str(path.relative_to(folder)): path.stat().st_size for path in files}
        unhashed = [path for path in files if str(path.relative_to(folder)) not in shard_hashes]
        state.sha256 = shard_hashes | hash_files(folder, unhashed)
        (folder / STATE_FILE).write_text(json.dumps(asdict(state), indent=1, allow_nan=False) + "\n")

    def save_on_first() -> tuple[int, float]:
        return save_atomically(folder, write) if ranks.is_first else (0, 0.0)

    if not sharded:
        return all_or_raise(ranks, save_on_first)
    started = time.perf_counter()
    try:
        all_or_raise(ranks, lambda: ranks.is_first and shutil.rmtree(shards, ignore_errors=True))
        own_hashes = all_or_raise(ranks, lambda: _save_shards(shards, trainable, optimizer, ranks))
        shard_hashes |= dict(ranks.gather(list(own_hashes.items())))
        size, _ = all_or_raise(ranks, save_on_first)
    finally:
        if ranks.is_first:
            shutil.rmtree(shards, ignore_errors=True)
    return size, time.perf_counter() - started


def full_head(model) -> dict[str, torch.Tensor]:
    """All ranks: contains all_gathers where it is sharded."""
    return {name: sharding.full_tensor(tensor) for name, tensor in base_of(model).cls_head.state_dict().items()}


def _save_shards(shards: Path, trainable, optimizer, ranks: Ranks) -> dict[str, str]:
    """Returns the SHA-256 of this rank's own files, by their name in the checkpoint."""
    with full_disk_is_said(shards):
        sharding.save_shards(shards, trainable, optimizer)
        own = shards.glob(f"shard-{ranks.rank + 1:05d}-*")
        return {f"{sharding.SHARDS}/{name}": digest for name, digest in hash_files(shards, own).items()}


# ------------------------------------------------------------------------------------------------------------ load


def resume(folder: Path, model, optimizer, trainable: dict[str, torch.nn.Parameter], config: Config) -> None:
    """Put a checkpoint's weights and optimizer state in place. All ranks: contains collectives under fsdp."""
    load_best(folder, model, trainable, config, optimizer)
    if config.parallel != "fsdp":
        load_optimizer(optimizer, trainable, folder / OPTIMIZER_FILE)


def load_best(folder: Path, model, trainable: dict[str, torch.nn.Parameter], config: Config, optimizer=None) -> None:
    """Put a checkpoint's weights in place; under fsdp with the state of the optimizer, where one is given. All ranks:
    contains collectives under fsdp."""
    if config.parallel == "fsdp":
        _check_shards(folder / sharding.SHARDS, trainable)
        sharding.load_shards(folder / sharding.SHARDS, trainable, optimizer)
    else:
        load_weights(model, folder, config)


def check_initial(folder: Path, config: Config) -> str | None:
    """Whether a run of this config can start from the adapter in a folder. Returns a note for the log, as `check_base`.

    Raises: `UserError` where the adapter is of another base, or would act at another scale."""
    if not (folder / ADAPTER_FILE).is_file() or not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"init_adapter: {folder} holds no {ADAPTER_FILE} with {ADAPTER_CONFIG}; give another folder")
    saved = _read_adapter_config(folder)
    _check_scale(saved, folder, config)
    for key in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora"):  # of other tools; no key of ours sets them
        if value := getattr(saved, key):
            raise UserError(
                f"init_adapter: {folder} has {key} {value}, which training cannot keep; use another adapter"
            )
    return check_base(folder, config.model_name)


def _check_scale(saved, folder: Path, config: Config) -> None:
    """Raises: `UserError` where an adapter, of this `LoraConfig`, would act at another scale than the config says."""
    for key, value, own in (("r", saved.r, config.lora.r), ("alpha", saved.lora_alpha, config.lora.alpha)):
        if value != own:
            raise UserError(
                f"{folder} was trained with lora.{key} {value}, and this run has {own}: its weights would act at "
                f"another scale; set lora.{key}={value}, or use another adapter"
            )


def load_initial(model, folder, config: Config) -> str:
    """Start from an adapter, and a classification run from its head too, where it has one. Returns what the log says.

    Raises: `UserError` where they do not fit, or belong to another base."""
    folder = Path(folder)
    note = check_initial(folder, config)
    _load_adapter(model, folder)
    said = f"Starting from the adapter {folder}, with a fresh optimizer and schedule"
    if task_of(config).HAS_HEAD:
        has_head = (folder / HEAD_FILE).is_file()
        if has_head:
            load_head(model, folder)
        said += ", and its head" if has_head else ", and a fresh head"
    return f"{said}. {note}" if note else said


def load_trained(
    config: Config, folder: Path | None, device: torch.device, dtype: torch.dtype | str | None = None
) -> torch.nn.Module:
    """The config's base with what was trained on top, and its head, for inference. folder: an adapter, a checkpoint or
    a whole model; None: the base alone. dtype: the base's; None: bfloat16 on GPUs, float32 elsewhere.

    Raises: `UserError` where the folder holds none of these, or not exactly the weights that this config trains, or
    those of another base."""
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    if folder is None:
        if task_of(config).HAS_HEAD:
            raise UserError("the base alone has no classification head; give the folder of a trained model")
        return load_base(config.model_name, dtype, config.quantization).to(device)
    is_adapter = (folder / ADAPTER_CONFIG).is_file() and (folder / ADAPTER_FILE).is_file()
    is_partial = is_adapter or (folder / TRAINED_FILE).is_file() or (folder / sharding.SHARDS).is_dir()
    if not is_partial and not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds no adapter, checkpoint or model; train first, or give --checkpoint another folder"
        )
    is_own_base = Path(config.model_name).absolute() == folder.absolute()
    if is_partial or ((folder / BASE_FILE).is_file() and not is_own_base):
        note = check_base(folder, config.model_name)
        if note and os.environ.get("RANK", "0") == "0":
            print(note, flush=True)
    lora = _read_adapter_config(folder) if is_adapter else None
    if lora:
        _check_scale(lora, folder, config)
    if is_partial:
        model = load_base(config.model_name, dtype, config.quantization)
    else:
        model = load_base(str(folder), dtype, strict=True)
    if task_of(config).HAS_HEAD:
        attach_head(model, config.num_labels, seed=0)
    if lora:
        try:
            model = wrap_with_lora(model, lora)
        except (ValueError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{folder / ADAPTER_CONFIG} does not fit {config.model_name}: {reason}") from None
    if is_partial:
        load_weights(model, folder, config)
    elif task_of(config).HAS_HEAD:
        load_head(model, folder)
    return model.to(device).eval()


def load_weights(model, folder: Path, config: Config) -> None:
    """Put the weights of an adapter or checkpoint into a model that has a place for each, and its head's.

    Raises: `UserError` where they do not fit exactly."""
    own = {name: parameter for name, parameter in model.named_parameters() if trains(name, config)}
    if (folder / ADAPTER_FILE).is_file():
        _load_adapter(model, folder)
    elif (folder / sharding.SHARDS).is_dir():
        _check_shards(folder / sharding.SHARDS, own)
        sharding.load_unsharded(folder / sharding.SHARDS, model)
    else:
        own = {name: parameter for name, parameter in own.items() if group_of(name) != HEAD}
        with torch.no_grad():
            for name, tensor in read_fitting(folder / TRAINED_FILE, own).items():
                own[name].copy_(tensor)
    if task_of(config).HAS_HEAD:
        load_head(model, folder)


def _check_shards(folder: Path, trained: dict[str, torch.Tensor]) -> None:
    shapes = {name: shape for name, shape in sharding.stored_shapes(folder).items() if "|" not in name}
    refuse_misfit(folder, shapes, trained)


def _read_adapter_config(folder: Path):
    """An adapter's `LoraConfig`. Raises: `UserError` where it cannot be read, or is of another kind than LoRA."""
    quiet_bitsandbytes()
    from peft import LoraConfig

    path = folder / ADAPTER_CONFIG
    what_to_do = "restore it, or use another adapter"
    content = read_json(path, what_to_do)
    kind = content.get("peft_type") if isinstance(content, dict) else None
    if kind != "LORA":
        raise UserError(f"{path}: peft_type is {kind!r}, and only 'LORA' is known; {what_to_do}")
    try:
        lora = LoraConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is no LoRA config ({' '.join(str(error).split())}); {what_to_do}") from None
    lora.inference_mode, lora.base_model_name_or_path = True, None  # PEFT would warn of a base that has moved
    return lora


def _load_adapter(model, folder: Path) -> None:
    """Put an adapter's weights into the model's own. Raises: `UserError` where the two do not fit exactly."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, read_fitting(folder / ADAPTER_FILE, adapter_state(model)))


# ------------------------------------------------------------------------------------------------- the run's result


def is_final(output_dir: Path) -> bool:
    """Whether the run's result is there, written completely."""
    return any((output_dir / name).is_file() for name in FINAL_FILES)


def save_final(output_dir: Path, model, config: Config, records: dict[str, dict], ranks: Ranks) -> None:
    """The run's result in output_dir itself: the adapter in the standard PEFT layout (full fine-tuning: the whole
    model as `from_pretrained` reads it) with tokenizer, image processor and `records` (see `save`). Weights come last,
    so that their presence means that all is there. All ranks: contains all_reduces, and all_gathers under fsdp; where
    it cannot be saved, all raise `UserError`."""
    head = full_head(model) if task_of(config).HAS_HEAD else None
    full = sharding.full_state_dict(model, keep=ranks.is_first) if config.finetuning == "full" else {}

    def write() -> None:
        temporary = output_dir / ".final.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            with full_disk_is_said(output_dir):
                temporary.mkdir()
                _write_final(temporary, model, config, records, full, head)
                for path in sorted(temporary.iterdir(), key=lambda path: path.name in FINAL_FILES):
                    flush(path)
                    path.replace(output_dir / path.name)
                flush(output_dir)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    all_or_raise(ranks, lambda: ranks.is_first and write())


def _write_final(folder: Path, model, config: Config, records: dict[str, dict], full: dict, head: dict | None) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer

    AutoTokenizer.from_pretrained(config.model_name).save_pretrained(folder)
    processor = None
    with contextlib.suppress(OSError):  # text models have none
        processor = AutoImageProcessor.from_pretrained(config.model_name, backend="pil")
    if processor:
        processor.save_pretrained(folder)
    for name, content in records.items():
        write_json(folder / name, content)
    if config.finetuning == "lora":
        save_adapter(model, folder)
    else:
        weights = {name: tensor for name, tensor in full.items() if group_of(name) != HEAD}
        model.save_pretrained(folder, state_dict=weights)
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        described["dtype"] = str(next(iter(weights.values())).dtype).removeprefix("torch.")  # not the masters'
        write_json(folder / "config.json", described)
    if head:
        save_head(head, folder)


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
        # The fused AdamW keeps its step count beside the parameter, as its moments; the others on the CPU.
        on_host = key == "step" and not optimizer.defaults["fused"]
        states[name][key] = value if on_host else value.to(trainable[name].device)
    for name, parameter in trainable.items():
        if states[name]:
            optimizer.state[parameter] = states[name]
