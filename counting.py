"""What a pass and a step take, counted from shapes: memory by running the model on PyTorch's meta device, without
weights; tokens and floating-point operations by formula."""

import contextlib
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from attention import install_shared_attention, install_vision_attention
from batches import Item, Row, lay_out, passes, share_out
from classification import attach_head, make_loss
from config import Config
from family import Family
from model import (
    HEAD,
    LANGUAGE,
    PROJECTOR,
    VISION,
    auto_class,
    base_of,
    group_of,
    patch_embed_as_matrix_product,
    prepare_training,
)
from tasks import task_of
from templates import IGNORE

# ------------------------------------------------------------------------------------------------------------- memory

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # of a weight: 4 bits, and the twice quantised scale of 64


def meta_loss(config: Config, family: Family, dtype: torch.dtype) -> nn.Module:
    """The run's loss module as it computes, without weights: every shape is there and no number."""
    from transformers import AutoConfig

    model_config = AutoConfig.from_pretrained(config.model_name)
    with torch.device("meta"):
        base = auto_class(model_config).from_config(model_config, dtype=dtype, attn_implementation="sdpa")
        base.requires_grad_(False)
        if task_of(config).HAS_HEAD:
            attach_head(base, config.num_labels, config.seed)
        if family.has_vision:
            patch_embed_as_matrix_product(base)
            install_vision_attention(base)
            install_shared_attention(base)
        model = prepare_training(base, config)
    if config.finetuning == "full":
        model.to(dtype)  # float32 masters compute in bfloat16: cast by FSDP, or by autocast
    if config.gradient_checkpointing:  # what is computed again in the backward pass, is on the meta device, too
        again = {"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), _OnMeta())}
        base_of(model).activation_checkpointing_enable(activation_checkpointing_kwargs=again)
    return make_loss(model, family, config).train()


def held_bytes(loss: nn.Module, config: Config, world_size: int, dtype: torch.dtype) -> dict[str, float]:
    """What a rank holds between two passes, in bytes: the frozen weights; what is trained, float32, with its gradients
    and AdamW's two moments; copies to compute with. loss: of `meta_loss`."""
    shards, size = world_size if config.parallel == "fsdp" else 1, dtype.itemsize
    frozen, trained, layers = 0.0, 0, Counter()
    for name, parameter in loss.model.named_parameters():
        quantized = config.quantization == "nf4" and name.endswith("base_layer.weight") and group_of(name) == LANGUAGE
        trained += parameter.numel() * parameter.requires_grad
        frozen += parameter.numel() * (not parameter.requires_grad) * (NF4_BYTES if quantized else size)
        if group_of(name) == LANGUAGE:
            layers[name.partition(".layers.")[2].split(".")[0]] += parameter.numel()
    copies = 0
    if config.parallel == "fsdp":  # the embedding and lm_head with their gradients; two layers, and a layer's gradient
        outside = layers.pop("", 0)
        copies = size * 2 * outside + (2 * size + size + 4) * max(layers.values(), default=0)
    elif config.finetuning == "full" and size < 4:
        copies = size * trained  # autocast keeps what it has cast
    return {"frozen": frozen / shards, "trained": 16 * trained / shards, "copies": copies}


class _Attention(torch.autograd.Function):
    """Stands for SDPA's kernels: what they keep for the backward pass, and what they give back."""

    @staticmethod
    def forward(ctx, query, key, value, mask):
        log_sum = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, log_sum, mask)
        return output

    @staticmethod
    def backward(ctx, gradient):
        return *(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), None


def _dropout(states: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """As on CUDA, where one byte an element is kept."""
    return torch.native_dropout(states, p, True)[0] if p and training else states


class _OnMeta(TorchFunctionMode):
    """Lets a model on the meta device run on a batch of the CPU. What decides shapes by its values (image grids, bool
    masks) stays on the CPU; everything else follows the weights."""

    BY_VALUE = (torch.Tensor.__getitem__, torch.Tensor.__setitem__, torch.Tensor.expand_as)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3], kwargs.get("attn_mask"))
        if function is F.dropout:
            return _dropout(*args, **kwargs)
        if function is torch.Tensor.__bool__ and args[0].is_meta:
            return True  # asked by a text model alone: whether each row is one sequence
        if function is torch.Tensor.to and args[0].dtype is torch.bool:
            return args[0]
        if function not in self.BY_VALUE:
            leaves, shape = tree_flatten((args, kwargs))
            if any(torch.is_tensor(leaf) and leaf.is_meta for leaf in leaves):
                leaves = [leaf.to("meta") if torch.is_tensor(leaf) else leaf for leaf in leaves]
                args, kwargs = tree_unflatten(leaves, shape)
        return function(*args, **kwargs)


class LiveBytes(TorchDispatchMode):
    """Follows every storage that an operation makes until it is freed; `peak`: the most bytes alive at a time."""

    def __init__(self, known: Sequence[torch.Tensor]):
        """known: tensors that are not counted."""
        super().__init__()
        self.now = self.peak = 0
        self._device = known[0].device
        self._alive = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and tensor.device == self._device:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._alive:
                    self._alive.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, place: int, size: int) -> None:
        self._alive.discard(place)
        self.now -= size


def pass_bytes(loss: nn.Module, batch: dict) -> int:
    """The most that one forward and backward holds at a time, besides weights and their gradients. loss: of
    `meta_loss`, or a real one on the device of the batch."""
    trained = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    for parameter in trained:  # they are there from the first pass of a step on
        parameter.grad = torch.zeros_like(parameter)
    held = [*loss.parameters(), *loss.buffers(), *(parameter.grad for parameter in trained)]
    with LiveBytes(held) as live, _OnMeta() if held[0].is_meta else contextlib.nullcontext():
        torch.autograd.backward(loss(batch))
    loss.zero_grad(set_to_none=True)
    return live.peak


# --------------------------------------------------------------------------------------------------------- operations


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of a model; a multiplication and an addition count as two. Elementwise work is left
    out. Frozen weights cost a forward pass, and one backward where a gradient passes through; trained ones, two."""

    per_token: float  # matrices of the language model
    per_pair: float  # attention of the language model: one (query, key) pair in all layers
    per_position: float  # logits
    per_patch: float  # matrices of the vision tower
    per_patch_pair: float
    per_image_token: float  # the projector
    window: int  # patches that most layers of Qwen2.5-VL's tower look at; 0: all of the image
    whole_image: float  # share of the tower's layers that look at all of it
    merge: int  # patches of an image token

    @classmethod
    def of(cls, model: nn.Module, training: bool = True, recomputed: bool = False) -> "Operations":
        """model: with what is trained marked as such. recomputed: gradient checkpointing runs every forward twice."""
        base = base_of(model)
        trained = {group_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
        through = {  # where a gradient passes
            LANGUAGE: training and bool(trained - {HEAD}),
            PROJECTOR: training and VISION in trained,
            VISION: training and VISION in trained,
            HEAD: training,
        }
        sums = Counter()
        for name, module in model.named_modules():
            if not isinstance(module, nn.Linear | nn.Conv3d):
                continue
            group = group_of(name)
            kind = "logits" if name.endswith(("lm_head", "cls_head")) else group
            again = recomputed and through[group] and kind in (LANGUAGE, VISION)
            times = 1 + again + through[group] + (training and module.weight.requires_grad)
            if kind != "logits" or not hasattr(base, "cls_head") or name.endswith("cls_head"):
                sums[kind] += 2 * times * module.weight.numel()
        text = base.config.get_text_config()
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        pair = 4 * text.num_attention_heads * size * text.num_hidden_layers
        vision = getattr(base.config, "vision_config", None)
        width = getattr(vision, "embed_dim", None) or getattr(vision, "hidden_size", 0)
        depth = getattr(vision, "depth", 0)
        full_layers = len(getattr(vision, "fullatt_block_indexes", None) or range(depth))
        window = getattr(vision, "window_size", 0) // getattr(vision, "patch_size", 1)
        return cls(
            per_token=sums[LANGUAGE],
            per_pair=pair * (1 + (2 + recomputed) * through[LANGUAGE]),
            per_position=sums["logits"],
            per_patch=sums[VISION],
            per_patch_pair=4 * width * depth * (1 + (2 + recomputed) * through[VISION]),
            per_image_token=sums[PROJECTOR],
            window=window**2,
            whole_image=full_layers / depth if depth else 0,
            merge=getattr(vision, "spatial_merge_size", 0) ** 2,
        )

    def vision(self, image_tokens: int) -> float:
        """Of one image."""
        patches = image_tokens * self.merge
        seen = self.whole_image * patches + (1 - self.whole_image) * min(self.window, patches)
        return patches * (self.per_patch + seen * self.per_patch_pair) + image_tokens * self.per_image_token

    def useful(self, rows: Sequence[Sequence[int]], positions: int, image_tokens: Sequence[int]) -> float:
        """Of rows laid out as [tokens of the prefix, of a question, of a question, ...]: pairs that a token may see,
        logits at these positions, vision once for each image in `image_tokens`."""
        pairs = sum(p * (p + 1) // 2 + sum(n * p + n * (n + 1) // 2 for n in own) for p, *own in rows)
        return (
            sum(map(sum, rows)) * self.per_token
            + pairs * self.per_pair
            + positions * self.per_position
            + sum(map(self.vision, image_tokens))
        )


# -------------------------------------------------------------------------------------------------------- laid out


def count_step(
    items: Sequence[Item],
    share_prefix: bool,
    pass_tokens: int,
    world_size: int,
    operations: Operations | None = None,
    image_token_id: int = -1,
) -> Counter:
    """What the questions of a step come to when they are laid out: questions, rows, passes, tokens_alone (each question
    in a row of its own), tokens, padded (tokens with padding), slowest (tokens of the busiest rank), operations."""
    counts, loads = Counter(questions=len(items)), []
    counts["tokens_alone"] = sum(len(item.input_ids) for item in items)
    for share in share_out(items, share_prefix, world_size):
        own = [items[index] for index in share]
        rows = lay_out(own, share_prefix, pass_tokens)
        parts = passes(rows, pass_tokens)
        loads.append(sum(row.tokens for row in rows))
        counts["rows"] += len(rows)
        counts["passes"] += len(parts)
        counts["padded"] += sum(len(part) * part[0].tokens for part in parts)
        for part in parts if operations else ():
            counts["operations"] += _operations_of(own, part, operations, image_token_id)
    counts["tokens"] = sum(loads)
    counts["slowest"] = max(loads)
    return counts


def _operations_of(items: Sequence[Item], part: Sequence[Row], operations: Operations, image_token_id: int) -> float:
    lengths, positions, images = [], 0, []
    for row in part:
        members = [items[index] for index in row.items]
        lengths.append([row.prefix, *(len(item.input_ids) - row.prefix for item in members)])
        positions += sum(1 if item.class_label is not None else int((item.labels != IGNORE).sum()) for item in members)
        count, tokens = len(members[0].images), int((members[0].input_ids == image_token_id).sum())
        images += [tokens // count] * count if count else []
    return operations.useful(lengths, positions, images)
