"""Attention over rows in which several questions stand behind one prefix; every path computes the same numbers.

- `mask`: PyTorch's SDPA with the whole mask, the reference on any device.
- `two_part` (the default): the prefix by itself, causal and without a mask; what follows it against the whole row. Of a
  row's (query, key) pairs this leaves out most of those that the mask throws away.
- `varlen`: CUDA only. Each question attends to a copy of its prefix's keys and its own, and nothing else is computed
  (`torch.nn.attention.varlen`, torch 2.10 or newer). Asked for with SHARED_ATTENTION=varlen, compared with the
  reference on the device before its first use; where it does not agree or cannot run, `two_part` does the work.

Rows with one question each need none of this: plain causal attention is the same.
"""

import functools
import inspect
import itertools
import os
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from errors import UserError

NAME, VISION_NAME = "shared_prefix", "images_at_once"  # in transformers' registry
PATHS = ("mask", "two_part", "varlen")
VARLEN_TYPES = (torch.bfloat16, torch.float16)  # of its kernel


def attention_mask(segments: torch.Tensor) -> torch.Tensor:
    """(B, T) segments -> bool (B, 1, T, T), True = attend: the prefix and the own segment, never the future."""
    query, key = segments[:, None, :, None], segments[:, None, None, :]
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    return causal & ((key == 0) | (key == query))  # padding sees padding: a row without any key would be NaN


class SharedRows:
    """What all layers need to know about the rows of one batch, worked out once.

    segments: int (B, T), for the path `varlen` alone; prefix: tokens that are prefix in every row; both as
    `batches.collate` gives them, so that the host need not wait for the GPU to count. mask: of the segments, from
    `attention_mask`. dtype: of the queries. groups: the G of `masked`. path: one of `PATHS`, else `chosen_path`. Layers
    read the prefix off the bias's shape: Dynamo follows shapes, and not every number.
    """

    def __init__(
        self,
        segments: torch.Tensor | None,
        mask: torch.Tensor,
        prefix: int,
        dtype: torch.dtype,
        groups: int = 1,
        path: str = "",
    ):
        self.path = path or chosen_path(mask.device)
        if self.path == "varlen" and dtype not in VARLEN_TYPES:
            self.path = "two_part"
        # Made here, not at the first use: a compiled layer would be compiled anew for the second.
        self.varlen = varlen_layout(segments) if self.path == "varlen" else None
        self.bias = bias_of(mask[:, :, prefix:], dtype, groups) if self.path == "two_part" else None


def bias_of(mask: torch.Tensor, dtype: torch.dtype, groups: int) -> torch.Tensor:
    """(B, 1, queries, T) bool -> (B, 1, groups, queries, T), 0 or -inf: SDPA would turn a bool mask into this again in
    every layer."""
    rows, _, queries, length = mask.shape
    # Rows that begin elsewhere are copied by CUDA's SDPA in every layer. Never the length itself: where the bias is
    # contiguous for some lengths, a layer is compiled for those once more.
    aligned = (length // 8 + 1) * 8
    bias = torch.zeros(rows, 1, groups, queries, aligned, dtype=dtype, device=mask.device)
    return bias[..., :length].masked_fill_(~mask[:, :, None], float("-inf"))  # a view


def chosen_path(device: torch.device) -> str:
    path = os.environ.get("SHARED_ATTENTION", "two_part")
    if path not in PATHS:
        raise UserError(f"SHARED_ATTENTION is '{path}'; choose one of {', '.join(PATHS)}")
    return path if path != "varlen" or varlen_agrees(device) else "two_part"


# ------------------------------------------------------------------------------------------------------------- paths


def two_part(query, key, value, bias: torch.Tensor, scaling: float) -> torch.Tensor:
    """query (B, H, T, D), key and value (B, K, T, D) with H a multiple of K -> (B, H, T, D). bias: that of
    `SharedRows`, for what follows the prefix."""
    prefix = query.shape[2] - bias.shape[3]
    first, rest = query.split([prefix, query.shape[2] - prefix], dim=2)
    rest = masked(rest, key, value, bias, scaling)
    if not prefix:
        return rest
    first = F.scaled_dot_product_attention(
        first, key[:, :, :prefix], value[:, :, :prefix], is_causal=True, scale=scaling, enable_gqa=True
    )
    return torch.cat([first, rest], dim=2)


def masked(query, key, value, mask: torch.Tensor, scaling: float) -> torch.Tensor:
    """SDPA with a mask: query (B, H, T, D), key and value (B, K, S, D) -> (B, H, T, D).

    mask: (B, 1, G, T, S), bool or added. With G > 1, the G query heads that read the same keys stand one after the
    other as queries of one head: see `heads_together`.
    """
    batch, heads, length, size = query.shape
    groups = mask.shape[2]
    together = query.reshape(batch, heads // groups, groups * length, size)
    gqa = True if together.shape[1] != key.shape[1] else False  # noqa: SIM210 - a compiled layer wants no symbol here
    if gqa and query.device.type == "cuda":
        key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
        gqa = False
    mask = mask.flatten(2, 3)
    output = F.scaled_dot_product_attention(together, key, value, attn_mask=mask, scale=scaling, enable_gqa=gqa)
    return output.reshape(batch, heads, length, size)


def heads_together(device: torch.device, heads: int, key_heads: int) -> int:
    """The G of `masked`. On CUDA, `enable_gqa` with a mask takes a slow kernel, and repeating the keys copies them in
    every layer; on a CPU, `enable_gqa` is the faster one. The deterministic backward pass does not split the keys among
    the GPU's processors, which would leave most of them idle with few heads: there the keys are repeated."""
    return 1 if device.type == "cpu" or torch.are_deterministic_algorithms_enabled() else heads // key_heads


def varlen_layout(segments: torch.Tensor) -> dict:
    """Index tensors of the `varlen` path, on the device of `segments` (B, T).

    Every run of one segment is a sequence: its queries are its tokens; its keys are its row's prefix and its tokens.
    Returns queries, keys: flat indices into (B × T) tokens; cu_q, cu_k: int32 (sequences + 1,) bounds; max_q, max_k;
    place (B × T,): each token's query, 0 for padding.
    """
    rows, length = segments.shape
    queries, keys, query_lengths, key_lengths = [], [], [], []
    place = [0] * (rows * length)
    for row, values in enumerate(segments.tolist()):  # waits for the device, once per batch
        start, prefix = row * length, range(0)
        for segment, run in itertools.groupby(values):
            tokens = range(start, start + len(list(run)))
            start = tokens.stop
            if segment < 0:
                continue
            own = [*tokens] if segment == 0 else [*prefix, *tokens]
            prefix = tokens if segment == 0 else prefix
            for token in tokens:
                place[token] = len(queries) + token - tokens.start
            queries += tokens
            keys += own
            query_lengths.append(len(tokens))
            key_lengths.append(len(own))

    def tensor(values, dtype):
        return torch.tensor(values, dtype=dtype).to(segments.device, non_blocking=True)

    return {
        "queries": tensor(queries, torch.int64),
        "keys": tensor(keys, torch.int64),
        "cu_q": tensor([0, *itertools.accumulate(query_lengths)], torch.int32),
        "cu_k": tensor([0, *itertools.accumulate(key_lengths)], torch.int32),
        "max_q": max(query_lengths),
        "max_k": max(key_lengths),
        "place": tensor(place, torch.int64),
    }


def varlen(query, key, value, layout: dict, scaling: float, attend=None) -> torch.Tensor:
    """query (B, H, T, D), key and value (B, K, T, D) -> (B, H, T, D).

    attend: (queries (Q, H, D), keys, values (N, K, D), cu_q, cu_k, max_q, max_k, scale) -> (Q, H, D), causal with the
    last query at the last key; by default PyTorch's kernel.
    """
    batch, heads, length, size = query.shape

    def tokens_of(states, index):
        return states.transpose(1, 2).flatten(0, 1).index_select(0, index)

    packed = (attend or _varlen_kernel)(
        tokens_of(query, layout["queries"]),
        tokens_of(key, layout["keys"]),
        tokens_of(value, layout["keys"]),
        *(layout[name] for name in ("cu_q", "cu_k", "max_q", "max_k")),
        scaling,
    )
    return packed.index_select(0, layout["place"]).view(batch, length, heads, size).transpose(1, 2)


def _varlen_kernel(queries, keys, values, cu_q, cu_k, max_q, max_k, scale):
    from torch.nn.attention.varlen import varlen_attn

    known = _parameters(varlen_attn)  # it grew from torch 2.10 to 2.13
    options = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "scale" in known:
        options["scale"] = scale
    else:
        queries = queries * (scale * queries.shape[-1] ** 0.5)
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    else:
        groups = queries.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    return varlen_attn(queries, keys, values, cu_q, cu_k, max_q, max_k, **options)


@functools.cache
def _parameters(function) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


@functools.cache
def varlen_agrees(device: torch.device) -> bool:
    """Whether the `varlen` path gives the reference's outputs and gradients on this device, in bfloat16."""
    try:
        if device.type != "cuda":
            raise RuntimeError("it runs on CUDA only")
        difference = varlen_difference(device)
        if not difference < 0.02:
            raise RuntimeError(f"relative difference {difference:.1e}")
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        warnings.warn(f"SHARED_ATTENTION=varlen is not usable here ({error}); using two_part", stacklevel=2)
        return False
    return True


def varlen_difference(device: torch.device) -> float:
    """Largest relative difference between the `varlen` path in bfloat16 and the reference in float32, of outputs and
    gradients."""
    with (
        torch.inference_mode(False),  # the first to ask may be an evaluation
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        torch.manual_seed(0)
        segments = torch.tensor([[0] * 70 + [1] * 30 + [2] * 41, [0] * 90 + [1] * 20 + [-1] * 31], device=device)
        heads = [torch.randn(2, n, 141, 64, device=device, dtype=torch.bfloat16) for n in (4, 2, 2)]
        seen = (segments >= 0)[:, None, :, None]
        results = []
        for exact in (True, False):
            q, k, v = (x.float().requires_grad_() if exact else x.clone().requires_grad_() for x in heads)
            if exact:
                k2, v2 = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
                out = F.scaled_dot_product_attention(q, k2, v2, attn_mask=attention_mask(segments), scale=0.1)
            else:
                out = varlen(q, k, v, varlen_layout(segments), 0.1)
            out = out * seen
            out.float().square().sum().backward()
            results.append([x.float() for x in (out.detach(), q.grad, k.grad, v.grad)])
        # Python's max drops a NaN that does not come first.
        return float(torch.stack([(a - b).norm() / a.norm() for a, b in zip(*results, strict=True)]).max())


# ------------------------------------------------------------------------------------------------------ transformers


def install_shared_attention(model: nn.Module) -> None:
    """Let the language model of a transformers Qwen-VL use these paths; without a mask it runs transformers' SDPA as
    before. Source: transformers' AttentionInterface."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, shared_rows=None, **others):
        if dropout or attention_mask is None or shared_rows is None or shared_rows.path == "mask":
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **others
            )
        # Under autocast, norms and the rotary embedding leave these in float32; SDPA would cast them in every layer.
        query, key = query.to(value.dtype), key.to(value.dtype)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if shared_rows.path == "varlen":
            output = varlen(query, key, value, shared_rows.varlen, scaling)
        else:
            output = two_part(query, key, value, shared_rows.bias.to(query.dtype), scaling)
        return output.transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation({"text_config": NAME})


def install_vision_attention(model: nn.Module) -> None:
    """Let the vision tower attend within images, or Qwen2.5-VL's windows, of one size all at once. transformers calls
    the kernel for each of them (80 windows a layer for a page of text)."""
    from transformers import AttentionInterface

    def forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, lengths=None, **others):
        outputs, start = [], 0  # query, key, value: (1, H, patches, D)
        for length, run in itertools.groupby(lengths or [query.shape[2]]):
            count = len(list(run))
            patches = slice(start, start := start + count * length)
            parts = (x[0, :, patches].unflatten(1, (count, length)).transpose(0, 1) for x in (query, key, value))
            output = F.scaled_dot_product_attention(*parts, dropout_p=dropout, scale=scaling)
            outputs.append(output.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs)[None], None

    known: list[tuple] = []  # (bounds, lengths, bounds of all as one); Qwen2.5-VL's blocks take one of two

    def all_at_once(block, args, kwargs):
        bounds = kwargs["cu_seqlens"]
        entry = next((entry for entry in known if entry[0] is bounds), None)
        if entry is None:
            on_host = bounds.tolist()  # on the host: see `model.ON_HOST`
            lengths = [end - start for start, end in itertools.pairwise(on_host)]
            entry = bounds, lengths, torch.tensor([0, on_host[-1]], dtype=bounds.dtype)
            known[:] = [*known[-1:], entry]
        return args, {**kwargs, "cu_seqlens": entry[2], "lengths": entry[1]}

    AttentionInterface.register(VISION_NAME, forward)
    model.set_attn_implementation({"vision_config": VISION_NAME})
    for block in model.model.visual.blocks:
        block.register_forward_pre_hook(all_at_once, with_kwargs=True)


def without_cudnn() -> None:
    """Keep SDPA off cuDNN, PyTorch's first choice on Hopper: it plans anew for every shape, of which nearly every batch
    here has its own, and its gradients with a mask are NaN for some lengths (pytorch #196678)."""
    torch.backends.cuda.enable_cudnn_sdp(False)
