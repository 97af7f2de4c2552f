"""The shared prefix in recurrent layers (Qwen3.5's Gated DeltaNet), where no mask can keep questions apart.

Such a layer carries a state from token to token: a matrix for each head, and the last inputs of a causal convolution.
In a row [prefix, question, question, ...] the prefix therefore runs first, and every question runs as a sequence of its
own that starts from a copy of the state at the prefix's end. That is what the question would see alone, to the last
token, and the gradients of all questions flow back through the copies into the prefix. The full-attention layers
between read the same rows under the mask of `attention.py`.

On CUDA, transformers takes the kernels of flash-linear-attention and causal-conv1d where they are installed (not
measured here); without them, and on every other device, its own rule in PyTorch, in chunks of at most 64 tokens.
"""

import functools
import importlib
import inspect
import math
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils.generic import maybe_autocast

from errors import UserError
from family import Family

CHUNK = 64  # tokens of a prefix that the rule takes at once; a longer chunk gains nothing
# Of a question. The gradient of the decay is a small difference of large sums over a chunk: in float32 its error grows
# with the chunk (bench/chunks.py), and it is the questions' chunks that count, where the supervised tokens are.
OWN_CHUNK = 32
FUNCTIONS = (  # of transformers; each is a kernel where its package is installed
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "torch_chunk_gated_delta_rule",
    "torch_recurrent_gated_delta_rule",
)
KERNELS = {"fla": "flash-linear-attention", "causal_conv1d": "causal-conv1d"}  # module -> package


def lay_out_forks(lengths: list[list[int]], width: int, before: int) -> dict:
    """Where the questions of a batch go on from their prefixes: indices, made on the host by `batches.collate`.

    lengths: of each row, the tokens of its prefix and of each question. width: tokens of a row with padding. before:
    inputs that the convolution looks back to.

    Returns indices: the arrays below, flat in one int64 tensor, which one copy moves; shapes: of each; bounds: once
    more, for the host; missing, padded: whether the window and each group hold a -1. Of Q questions, sorted by the
    chunks that they take:
    - prefixes (B,): tokens of each row's.
    - window (W,): for each question the last tokens of its prefix, then its own, as places in the batch's (B × T); -1
      where a short prefix has none.
    - own: places in the window of the questions' own tokens, one question after the other; bounds (Q + 1,): of each.
    - rows, slots (Q,): whose prefix a question goes on from; row × the most questions of a row + place in the row.
    - ends (Q, before): the last tokens of a question with its prefix, as places in the batch; -1 where it has none.
    - group0, group1, ... (N, L): as `own`, of questions that take equally many chunks, so that little is padding (-1).
    - place (B × T,): each token's place among the outputs: the prefixes', then the groups'; packed: the same, with the
      outputs of `own` after the prefixes'.
    """
    most, prefix_width = max(map(len, lengths)) - 1, max(prefix for prefix, *_ in lengths)
    questions, place = [], np.zeros(len(lengths) * width, dtype=np.int64)
    for row, (prefix, *own) in enumerate(lengths):
        bounds = row * width + np.array([0, *accumulate([prefix, *own])])
        shared, *spans = [np.arange(*span) for span in pairwise(bounds)]
        questions += [(row, row * most + number, shared, span) for number, span in enumerate(spans)]
        place[shared] = row * prefix_width + np.arange(prefix)

    def chunks_of(question) -> int:
        return -(-len(question[3]) // OWN_CHUNK)

    questions.sort(key=chunks_of)
    sizes = np.array([len(span) for *_, span in questions])
    bounds, done = np.array([0, *accumulate(sizes)]), len(lengths) * prefix_width
    window = np.concatenate([part for *_, shared, span in questions for part in (last_tokens(shared, before), span)])
    own = np.arange(bounds[-1]) + before * np.repeat(np.arange(1, len(questions) + 1), sizes)
    packed = place.copy()
    packed[window[own]] = done + np.arange(len(own))
    arrays = {
        "prefixes": [prefix for prefix, *_ in lengths],
        "window": window,
        "own": own,
        "bounds": bounds,
        "rows": [row for row, *_ in questions],
        "slots": [slot for _, slot, *_ in questions],
        "ends": [last_tokens(np.append(shared[-before:], span), before) for *_, shared, span in questions],
        "place": place,
        "packed": packed,
    }
    padded = []
    for number, (_, members) in enumerate(groupby(range(len(questions)), lambda n: chunks_of(questions[n]))):
        members = list(members)
        inside = np.arange(sizes[members].max())
        padding = inside >= sizes[members][:, None]
        places = np.where(padding, -1, own[bounds[members]][:, None] + inside)
        place[window[places[~padding]]] = done + np.flatnonzero(~padding)
        done += places.size
        arrays[f"group{number}"] = places
        padded.append(bool(padding.any()))
    return {
        "indices": torch.from_numpy(np.concatenate([np.ravel(array) for array in arrays.values()])),
        "shapes": {name: list(np.shape(array)) for name, array in arrays.items()},
        "bounds": bounds.tolist(),
        "missing": bool((window < 0).any()),
        "padded": padded,
    }


@dataclass(frozen=True)
class Group:
    """Questions that run side by side, each from a copy of its prefix's state: N of them, of at most L tokens (packed:
    N is 1, and L all their tokens)."""

    own: torch.Tensor  # (N, L) places in the window
    tokens: torch.Tensor  # (N × L,) the same as places in the batch
    padding: torch.Tensor | None  # (N, L, 1)
    rows: torch.Tensor  # (questions,) whose prefix each goes on from
    slots: torch.Tensor  # (questions,)
    bounds: dict[str, torch.Tensor]  # packed: (questions + 1,), also on the host, which else would have to ask
    chunk: int


class ForkedRows:
    """What all recurrent layers need to know about the rows of one batch.

    lengths, width: as of `lay_out_forks`. layout: what that gives, where it is made already, with its indices on the
    device. keep_states: answers will follow, one token a question at a time, each from the state that the passes before
    have left in `states`. packed: all questions in one call of a kernel that keeps several sequences apart.
    """

    def __init__(
        self,
        lengths: list[list[int]],
        width: int,
        device: torch.device,
        keep_states: bool = False,
        layout: dict | None = None,
        packed: bool | None = None,
    ):
        self.lengths, self.width, self.device = lengths, width, device
        self.prefix = max(prefix for prefix, *_ in lengths)
        self.slots = max(map(len, lengths)) - 1
        self.keep_states = keep_states
        self.states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # layer -> convolution's, matrix; of every slot
        self._layout = layout
        self.packed = takes_packed(device) if packed is None else packed

    @functools.cached_property
    def indices(self) -> dict[str, torch.Tensor]:
        """The arrays of the layout, on the device."""
        shapes = self._layout["shapes"]
        indices = self._layout["indices"].to(self.device)
        parts = indices.split([math.prod(shape) for shape in shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    def use(self, before: int) -> None:
        """Of layers whose convolution looks back to so many inputs."""
        self._layout = self._layout or lay_out_forks(self.lengths, self.width, before)
        assert self._layout["shapes"]["ends"][1] == before, "laid out for another convolution"

    @functools.cached_property
    def after_prefix(self) -> torch.Tensor | None:
        """(B, prefix, 1), True where a row with a shorter prefix has other tokens; None where all are equally long."""
        if len({prefix for prefix, *_ in self.lengths}) == 1:
            return None
        return (torch.arange(self.prefix, device=self.device) >= self.indices["prefixes"][:, None])[..., None]

    @functools.cached_property
    def window(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(W,) tokens of the batch; (W, 1) where there is none before a question, or None."""
        window = self.indices["window"]
        return window.clamp_min(0), (window < 0)[:, None] if self._layout["missing"] else None

    @functools.cached_property
    def groups(self) -> list[Group]:
        indices, shapes, found, first = self.indices, self._layout["shapes"], [], 0
        parts = [name for name in shapes if name.startswith("group")]
        bounds = {"cu_seqlens": indices["bounds"], "cu_seqlens_cpu": torch.tensor(self._layout["bounds"])}
        for name, padded in [("own", False)] if self.packed else zip(parts, self._layout["padded"], strict=True):
            places = indices[name][None] if self.packed else indices[name]
            own, length = places.clamp_min(0), places.shape[1]
            questions = slice(first, None if self.packed else first + len(places))
            first += len(places)
            found.append(
                Group(
                    own=own,
                    tokens=self.window[0].index_select(0, own.flatten()),
                    padding=(places < 0)[..., None] if padded else None,
                    rows=indices["rows"][questions],
                    slots=indices["slots"][questions],
                    bounds=bounds if self.packed else {},
                    chunk=OWN_CHUNK if self.packed else -(-length // -(-length // OWN_CHUNK)),
                )
            )
        return found

    def select(self, rows: torch.Tensor, columns: torch.Tensor) -> None:
        """Go on with the answers of these rows alone, and of each with these slots: (rows,), (rows, slots)."""
        slots = (rows[:, None] * self.slots + columns).flatten()
        for layer, states in self.states.items():  # one by one: all copies at once would take the memory twice
            self.states[layer] = tuple(state.index_select(0, slots) for state in states)
        self.slots = columns.shape[1]


def forked_rows(batch: dict, keep_states: bool = False) -> ForkedRows:
    """Of a collated batch, on its device."""
    segments = batch["segments"]
    return ForkedRows(batch["row_lengths"], segments.shape[1], segments.device, keep_states, batch.get("forks"))


@functools.cache
def transformers_rules():
    """The module with the layer, its convolution and its rule: kernels where they are installed. Imported late, which
    the other families need not pay for."""
    from transformers.models.qwen3_5 import modeling_qwen3_5

    return modeling_qwen3_5


def choose_by_device() -> None:
    """Let transformers' own functions take what is not on CUDA. It chooses kernels once, at import, and calls them with
    tensors of any device; those of a CPU or of the meta device (`--check`, and the counts before a run) break them."""
    rules = transformers_rules()
    for name in FUNCTIONS:
        if not hasattr(getattr(rules, name), "chooses_by_device"):
            setattr(rules, name, _by_device(getattr(rules, name)))


def _by_device(chosen: Callable) -> Callable:
    own = inspect.unwrap(chosen)

    @functools.wraps(own)
    def run(first: torch.Tensor, *others, **options):
        return (chosen if first.is_cuda else own)(first, *others, **options)

    run.chooses_by_device = True
    return run


def last_tokens(tokens: np.ndarray, count: int) -> np.ndarray:
    """(count,) the last of them; -1 before the first."""
    return np.concatenate([np.full(count, -1), tokens])[len(tokens) :]


# --------------------------------------------------------------------------------------------------------- the layer


def run_rows(layer: nn.Module, rows: ForkedRows, mixed, decay, beta) -> torch.Tensor:
    """One Gated DeltaNet over forked rows: mixed (B, T, channels), its convolution's input; decay (log) and beta
    (B, T, value heads) -> (B, T, value heads, value size), undefined on padding."""
    rows.use(layer.conv_kernel_size - 1)
    first = slice(rows.prefix)
    gates = [_zeroed(gate[:, first], rows.after_prefix) for gate in (decay, beta)]
    output, prefix_state = _rule(layer, _convolve(layer, mixed[:, first]), *gates)
    outputs, states = [output.flatten(0, 1)], []
    flat, (window, missing) = mixed.flatten(0, 1), rows.window
    convolved = _convolve(layer, _zeroed(flat.index_select(0, window), missing)[None])[0]
    for group in rows.groups:
        own = convolved.index_select(0, group.own.flatten()).unflatten(0, group.own.shape)
        gates = [
            gate.flatten(0, 1).index_select(0, group.tokens).unflatten(0, group.own.shape) for gate in (decay, beta)
        ]
        # Where decay (a logarithm) and beta are zero, the state stays as it is: padding never enters it.
        gates = [_zeroed(gate, group.padding) for gate in gates]
        start = prefix_state.index_select(0, group.rows)
        options = {"keep_state": rows.keep_states, "start": start, "chunk": group.chunk, "bounds": group.bounds}
        output, state = _rule(layer, own, *gates, **options)
        outputs.append(output.flatten(0, 1))
        states.append(state)
    if rows.keep_states:
        ends, every = rows.indices["ends"], len(rows.lengths) * rows.slots
        last = flat.index_select(0, ends.clamp_min(0).flatten()).unflatten(0, ends.shape)
        last = _zeroed(last, (ends < 0)[..., None]).transpose(1, 2)  # (questions, channels, before)
        convolution = last.new_zeros(every, *last.shape[1:]).index_copy_(0, rows.indices["slots"], last)
        matrix = states[0].new_zeros(every, *states[0].shape[1:])
        for group, state in zip(rows.groups, states, strict=True):
            matrix.index_copy_(0, group.slots, state)
        rows.states[layer.layer_idx] = convolution, matrix
    place = rows.indices["packed" if rows.packed else "place"]
    return torch.cat(outputs).index_select(0, place).unflatten(0, mixed.shape[:2])


def run_answers(layer: nn.Module, rows: ForkedRows, mixed, decay, beta) -> torch.Tensor:
    """The same for the next token of every slot, from its own state, which goes on: (rows, slots, ...)."""
    convolution, matrix = rows.states[layer.layer_idx]
    weight, bias = layer.conv1d.weight.squeeze(1), layer.conv1d.bias
    mixed, decay, beta = (x.flatten(0, 1)[:, None] for x in (mixed, decay, beta))  # (rows × slots, 1, ...)
    own = transformers_rules().causal_conv1d_update(mixed.transpose(1, 2), convolution, weight, bias, layer.activation)
    with maybe_autocast(mixed.device.type, enabled=False):
        output, matrix = transformers_rules().torch_recurrent_gated_delta_rule(
            *_heads(layer, own.transpose(1, 2)), g=decay, beta=beta, initial_state=matrix, output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
    rows.states[layer.layer_idx] = convolution, matrix
    return output.view(-1, rows.slots, *output.shape[2:])


def _zeroed(values: torch.Tensor, where: torch.Tensor | None) -> torch.Tensor:
    return values if where is None else values.masked_fill(where, 0)


def _convolve(layer: nn.Module, mixed: torch.Tensor) -> torch.Tensor:
    """(N, L, channels) -> the same; the first tokens see zeros before them."""
    weight, bias, convolve = layer.conv1d.weight.squeeze(1), layer.conv1d.bias, transformers_rules().causal_conv1d_fn
    return convolve(mixed.transpose(1, 2), weight, bias, activation=layer.activation).transpose(1, 2)


def _heads(layer: nn.Module, mixed: torch.Tensor):
    """(N, L, channels) -> query, key (N, L, key heads, key size) and value (N, L, value heads, value size)."""
    query, key, value = mixed.split([layer.key_dim, layer.key_dim, layer.value_dim], dim=-1)
    return *(x.unflatten(-1, (-1, layer.head_k_dim)) for x in (query, key)), value.unflatten(-1, (-1, layer.head_v_dim))


def _rule(
    layer: nn.Module, mixed, decay, beta, keep_state=True, start=None, chunk=CHUNK, bounds=types.MappingProxyType({})
):
    """Outputs (N, L, value heads, value size), and the state at each sequence's end, float32; without `keep_state`,
    None. Numbers inside are float32, too; on GPUs TF32 rounds the factors of the matrix products in PyTorch's rule."""
    with maybe_autocast(mixed.device.type, enabled=False):
        return transformers_rules().torch_chunk_gated_delta_rule(
            *_heads(layer, mixed), g=decay, beta=beta, chunk_size=chunk, initial_state=start,
            output_final_state=keep_state, use_qk_l2norm_in_kernel=True, **bounds,
        )  # fmt: skip


def install_forks(model: nn.Module) -> None:
    """Let the recurrent layers of a transformers Qwen3.5 run `forked_rows`; without them they run as they are, but for
    `choose_by_device`."""
    layers = [module for module in model.modules() if type(module).__name__ == "Qwen3_5GatedDeltaNet"]
    if not layers:
        return
    choose_by_device()
    from transformers.utils import logging as transformers_logging

    transformers_logging.get_logger("transformers.integrations.hub_kernels").setLevel("ERROR")  # see `notes`

    def forward(self, hidden_states, cache_params=None, attention_mask=None, forked_rows=None, **others):
        if forked_rows is None:
            return type(self).forward(self, hidden_states, cache_params, attention_mask, **others)
        mixed, gate = self.in_proj_qkv(hidden_states), self.in_proj_z(hidden_states)
        beta = self.in_proj_b(hidden_states).sigmoid()
        step = F.softplus(self.in_proj_a(hidden_states).float() + self.dt_bias)
        decay = -self.A_log.float().exp() * step
        run = run_answers if self.layer_idx in forked_rows.states else run_rows
        output = run(self, forked_rows, mixed, decay, beta)  # (B, T, value heads, value size)
        output = self.norm(output.reshape(-1, self.head_v_dim), gate.reshape(-1, self.head_v_dim))
        return self.out_proj(output.view(*hidden_states.shape[:2], -1))

    for layer in layers:
        layer.forward = types.MethodType(forward, layer)


# ----------------------------------------------------------------------------------------------------------- kernels


@functools.cache
def missing_kernels() -> tuple[str, ...]:
    """Packages with kernels for these layers that cannot be imported; transformers then takes its own functions."""
    missing = []
    for module, package in KERNELS.items():
        try:
            importlib.import_module(module)
        except Exception:
            missing.append(package)
    return tuple(missing)


def takes_packed(device: torch.device) -> bool:
    """Whether the rule is flash-linear-attention's, which keeps the sequences of one call apart by their bounds."""
    return device.type == "cuda" and KERNELS["fla"] not in missing_kernels() and packed_agrees(device)


@functools.cache
def packed_agrees(device: torch.device) -> bool:
    """Whether questions packed in one call come to the reference's outputs, states and gradients on this device."""
    try:
        difference = packed_difference(device)
        if not difference < 0.02:
            raise RuntimeError(f"relative difference {difference:.1e}")
    except Exception as error:  # of another package's kernels, or of the compiler that makes them
        reason = (str(error).splitlines() or [""])[0]
        warnings.warn(
            f"{KERNELS['fla']} does not keep packed questions apart here ({type(error).__name__}: {reason}); they run "
            "in groups of similar length",
            stacklevel=2,
        )
        return False
    return True


def packed_difference(device: torch.device) -> float:
    """Largest relative difference between questions packed in one call, in bfloat16, and in groups by PyTorch's own
    rule in float32 on the CPU: of outputs, final states and gradients, with heads of the 9B's size."""
    choose_by_device()
    lengths, heads, size = [[70, 5, 64, 1, 30], [41, 90]], 2, 128
    with (
        torch.inference_mode(False),  # the first to ask may be an evaluation
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        generator = torch.Generator().manual_seed(0)
        mixed, decay, beta, weight = (
            torch.randn(*shape, generator=generator)
            for shape in (
                (2, 170, 4 * heads * size),
                (2, 170, 2 * heads),
                (2, 170, 2 * heads),
                (4 * heads * size, 1, 4),
            )
        )
        inputs = mixed.bfloat16(), -0.2 * decay.square(), beta.sigmoid().bfloat16()
        real = torch.arange(170) < torch.tensor([[170], [131]])
        results = []
        for place, dtype in ((torch.device("cpu"), torch.float32), (device, None)):
            layer = types.SimpleNamespace(
                conv1d=types.SimpleNamespace(weight=weight.bfloat16().to(place, dtype), bias=None), conv_kernel_size=4,
                activation="silu", key_dim=heads * size, value_dim=2 * heads * size, head_k_dim=size, head_v_dim=size,
                layer_idx=0,
            )  # fmt: skip
            moved = [value.detach().to(place, dtype).requires_grad_() for value in inputs]
            rows = ForkedRows(lengths, 170, place, keep_states=True, packed=dtype is None)
            output = run_rows(layer, rows, *moved)[real.to(place)]
            state = rows.states[0][1]
            gradients = torch.autograd.grad(output.float().square().sum() + state.square().sum(), moved)
            results.append([value.detach().float().cpu() for value in (output, state, *gradients)])
    # Python's max drops a NaN that does not come first.
    return float(torch.stack([(a - b).norm() / a.norm() for a, b in zip(*results, strict=True)]).max())


def refuse_deterministic(family: Family, deterministic: bool) -> None:
    """Raises: `UserError` where `deterministic: true` cannot be kept on this machine: PyTorch has no deterministic
    cumulative sum on CUDA, and the kernels of other packages promise nothing."""
    if deterministic and family.is_recurrent and torch.cuda.is_available():
        raise UserError("deterministic: true cannot be kept with Qwen3.5's recurrent layers on GPUs; set it to false")


def notes(family: Family, device: torch.device) -> list[str]:
    """What the log says before a run's first step, where a GPU lacks kernels for these layers."""
    if not family.is_recurrent or device.type != "cuda" or not missing_kernels():
        return []
    return [
        f"Gated DeltaNet runs in PyTorch's own operations, as {' and '.join(missing_kernels())} cannot be imported: "
        "the same results but for rounding, from many small kernels and with more memory (not measured on a GPU yet); "
        "requirements-extra.txt says how to get them"
    ]
