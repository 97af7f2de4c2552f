"""FSDP2: each rank keeps a share of every weight, gradient and moment, in float32, and computes in bfloat16 on GPUs.

Each decoder layer is gathered for its own forward and backward pass and resharded after it. A checkpoint holds the
ranks' shares as safetensors, through `torch.distributed.checkpoint` and its Hugging Face storage (its usual storage
pickles its metadata), and may be read by any number of ranks.
"""

import contextlib
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from distributed import Ranks
from errors import UserError
from model import base_of
from templates import IGNORE

SHARDS = "sharded"  # folder in a checkpoint
FILE_BYTES = 4e9  # of a rank's share in one file, which is held in memory twice while it is written


def shard(loss: nn.Module, ranks: Ranks) -> None:
    """Spread a loss module over the ranks, in place, on their device. Its parameters become DTensors.

    All ranks: contains all_gathers."""
    if not dist.is_initialized():  # one process without torchrun
        dist.init_process_group(
            "nccl" if ranks.device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1
        )
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    compute = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    # Without their inputs: the vision tower's positions come in float32.
    uncast = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(param_dtype=None, reduce_dtype=torch.float32)
    base = base_of(loss.model)
    language_model = getattr(base.model, "language_model", base.model)
    for layer in language_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    if hasattr(base.model, "visual"):
        fully_shard(base.model.visual, mesh=mesh, mp_policy=uncast)
    if base.lm_head.weight is not language_model.embed_tokens.weight:
        fully_shard(base.lm_head, mesh=mesh, mp_policy=policy)  # classification never gathers it
    if hasattr(base, "cls_head"):
        fully_shard(base.cls_head, mesh=mesh, mp_policy=exact)
    fully_shard(loss, mesh=mesh, mp_policy=uncast)
    # FSDP takes the first module that runs for the root; an evaluation may begin with a layer.
    loss.meet = lambda: None
    register_fsdp_forward_method(loss, "meet")
    loss.meet()
    loss.reshard()  # what was gathered now would not see weights that are loaded later


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of a sharded one; any other as it is. All ranks: contains an all_gather."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a sharded tensor; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def unsharded(loss: nn.Module):
    """The whole model on every rank while it lasts, in the type it computes in, so that the ranks may run different
    numbers of batches. All ranks: contains all_gathers at the start. Does nothing where nothing is sharded."""
    parts = [module for module in loss.modules() if isinstance(module, FSDPModule)]
    if parts:
        loss.set_reshard_after_forward(False)
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
        if parts:
            loss.set_reshard_after_forward(True)
            loss.set_reshard_after_forward(False, recurse=False)  # the backward pass begins with the root


def pad_passes(passes: list[dict], ranks: Ranks) -> list[dict]:
    """As many passes on every rank as the busiest one has: each forward pass gathers weights from all. The added
    ones carry no weight. All ranks: contains all_gathers."""
    missing = max(ranks.gather([len(passes)])) - len(passes)
    last = passes[-1]
    ignored = {key: torch.full_like(last[key], IGNORE) for key in ("targets", "class_labels") if key in last}
    ignored["supervised"] = last["supervised"][:0]
    return passes + [{**last, **ignored, "answer_tokens": 0, "tokens": 0}] * missing


# --------------------------------------------------------------------------------------------------------- checkpoints


def _entries(trainable: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer | None) -> dict[str, torch.Tensor]:
    """Weights and AdamW's state under the names of checkpoints: `NAME`, `NAME|exp_avg`, ..."""
    entries = {name: parameter.detach() for name, parameter in trainable.items()}
    for name, parameter in trainable.items() if optimizer else ():
        for key, value in optimizer.state.get(parameter, {}).items():
            entries[f"{name}|{key}"] = value
    return entries


def save_shards(folder: Path, trainable: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Write this rank's share of weights and optimizer state into a folder that all ranks see.

    All ranks: contains collectives. Raises: on all ranks where one cannot write, `OSError` for the disk's."""
    entries = _entries(trainable, optimizer)
    files, filled = {}, 0
    for name, tensor in entries.items():
        filled += tensor.numel() * tensor.element_size()
        files[name] = 1 + int(filled / dist.get_world_size() / FILE_BYTES)
    writer = dcp.HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True)
    try:
        dcp.save(entries, storage_writer=writer)
    except dcp.CheckpointException as error:  # a BaseException, with a traceback of every rank
        rank, (failure, _) = next(iter(error.failures.items()))
        kind = OSError if isinstance(failure, OSError) else RuntimeError
        raise kind(f"rank {rank}: {failure}") from None


def load_shards(
    folder: Path, trainable: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Put weights of `save_shards` in place, and the state of the optimizer, if one is given; whatever number of ranks
    wrote them. All ranks: contains collectives."""
    saved = set(stored_shapes(folder))
    if optimizer is None:
        saved = {name for name in saved if "|" not in name}
    for name, parameter in trainable.items():
        if f"{name}|step" in saved:
            moments = {key: torch.zeros_like(parameter, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
            device = parameter.device if optimizer.defaults["fused"] else "cpu"
            optimizer.state[parameter] = {"step": torch.zeros((), device=device), **moments}
    entries = _entries(trainable, optimizer)
    if strangers := saved ^ entries.keys():
        raise UserError(f"{folder} does not fit this run: {len(strangers)} differing entries, first {min(strangers)}")
    dcp.load(entries, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))


def load_unsharded(folder: Path, model: nn.Module) -> None:
    """Put the weights of `save_shards` into a model that is not sharded and has a place for each. In one process."""
    own = dict(model.named_parameters())
    entries = {name: own[name].data for name in stored_shapes(folder) if "|" not in name}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process.*")
        dcp.load(entries, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)


def stored_shapes(folder: Path) -> dict[str, list[int]]:
    """Name -> shape of what `save_shards` has written. Raises: `UserError` where a file cannot be read."""
    try:
        stored = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} cannot be read ({error}); restore it, or use another checkpoint") from None
    return {name: list(tensor.size) for name, tensor in stored.items()}


def full_state_dict(model: nn.Module, keep: bool) -> dict[str, torch.Tensor]:
    """The full state dict on the CPU, in the type it computes in, put together one tensor at a time; empty on ranks
    that do not keep it. All ranks: contains all_gathers where it is sharded."""
    state = {}
    for name, tensor in model.state_dict().items():
        full = full_tensor(tensor)
        if keep:
            state[name] = full.to("cpu", torch.bfloat16 if full.is_cuda and full.is_floating_point() else full.dtype)
    return state
