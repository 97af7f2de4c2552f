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
import types
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils.generic import maybe_autocast

from errors import UserError
from family import Family

CHUNK = 64  # tokens that the rule takes at once; a longer chunk gains nothing
FUNCTIONS = (  # of transformers; each is a kernel where its package is installed
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "torch_chunk_gated_delta_rule",
    "torch_recurrent_gated_delta_rule",
)
KERNELS = {"fla": "flash-linear-attention", "causal_conv1d": "causal-conv1d"}  # module -> package


@dataclass(frozen=True)
class Sequences:
    """Questions that run side by side, each from a copy of its prefix's state. Index tensors; N of them, of at most L
    tokens (packed: N is 1, and L all their tokens)."""

    window: torch.Tensor  # (W,) tokens of the batch: for each question the last inputs before it, then its own
    missing: torch.Tensor | None  # (W, 1) where there is none before it
    own: torch.Tensor  # (N, L) places in the window
    tokens: torch.Tensor  # (N, L) the same as tokens of the batch
    padding: torch.Tensor | None  # (N, L, 1)
    rows: torch.Tensor  # (questions,) whose prefix each goes on from
    slots: torch.Tensor  # (questions,) row × the most questions of a row + place in the row
    bounds: dict[str, torch.Tensor]  # packed: (questions + 1,), also on the host, which else would have to ask
    chunk: int


class ForkedRows:
    """What all recurrent layers need to know about the rows of one batch, worked out once.

    lengths: of each row, the tokens of its prefix and of each question, as `batches.collate` counts them on the host.
    width: tokens of a row with padding. keep_states: answers will follow, one token a question at a time, each from the
    state that the passes before have left in `states`.
    """

    def __init__(self, lengths: list[list[int]], width: int, device: torch.device, keep_states: bool = False):
        self.lengths, self.width, self.device = lengths, width, device
        self.prefix = max(prefix for prefix, *_ in lengths)
        self.slots = max(map(len, lengths)) - 1
        self.keep_states = keep_states
        self.states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # layer -> convolution's, matrix; of every slot
        self._sequences: dict = {}

    def tensor(self, values) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device, non_blocking=True)

    @functools.cached_property
    def after_prefix(self) -> torch.Tensor | None:
        """(B, prefix, 1), True where a row with a shorter prefix has other tokens; None where all are equally long."""
        ends = np.array([prefix for prefix, *_ in self.lengths])
        after = np.arange(self.prefix) >= ends[:, None]
        return self.tensor(after[..., None]) if after.any() else None

    @functools.cached_property
    def _questions(self) -> list[tuple[int, int, np.ndarray, np.ndarray]]:
        """(row, slot, tokens of the prefix, own tokens) of each question; tokens as indices into (B × T)."""
        found = []
        for row, (prefix, *questions) in enumerate(self.lengths):
            bounds = row * self.width + np.array([0, *accumulate([prefix, *questions])])
            spans = [np.arange(*span) for span in pairwise(bounds)]
            found += [(row, row * self.slots + place, spans[0], own) for place, own in enumerate(spans[1:])]
        return found

    def sequences(self, before: int, packed: bool) -> tuple[list[Sequences], torch.Tensor]:
        """Questions in groups that take equally many chunks, so that little is padding, or all of them packed in one
        sequence, for kernels that keep several apart; and (B × T,) where each token's output then is, the prefixes'
        first. before: inputs that the convolution looks back to."""
        if (before, packed) not in self._sequences:
            self._sequences[before, packed] = self._lay_out(before, packed)
        return self._sequences[before, packed]

    def _lay_out(self, before: int, packed: bool) -> tuple[list[Sequences], torch.Tensor]:
        groups: dict[int, list] = {}
        for question in self._questions:
            groups.setdefault(0 if packed else -(-len(question[3]) // CHUNK), []).append(question)
        place = np.zeros(len(self.lengths) * self.width, dtype=np.int64)
        for row, (prefix, *_) in enumerate(self.lengths):
            place[row * self.width : row * self.width + prefix] = row * self.prefix + np.arange(prefix)
        done, found = len(self.lengths) * self.prefix, []
        for chunks, questions in sorted(groups.items()):
            windows = [np.concatenate([last_tokens(prefix, before), own]) for _, _, prefix, own in questions]
            starts = np.array([0, *accumulate(map(len, windows))][:-1]) + before
            sizes = [len(own) for *_, own in questions]
            if packed:
                owns = np.concatenate([s + np.arange(n) for s, n in zip(starts, sizes, strict=True)])[None]
                padding = np.zeros_like(owns, dtype=bool)
            else:
                inside = np.arange(max(sizes))[None]
                padding = inside >= np.array(sizes)[:, None]
                owns = np.where(padding, 0, starts[:, None] + inside)
            window, bounds = np.concatenate(windows), np.array([0, *accumulate(sizes)])
            place[window[owns[~padding]]] = done + np.flatnonzero(~padding)
            done += owns.size
            found.append(
                Sequences(
                    window=self.tensor(window.clip(0)),
                    missing=self.tensor((window < 0)[:, None]) if (window < 0).any() else None,
                    own=self.tensor(owns),
                    tokens=self.tensor(window[owns].clip(0)),
                    padding=self.tensor(padding[..., None]) if padding.any() else None,
                    rows=self.tensor(np.array([row for row, *_ in questions])),
                    slots=self.tensor(np.array([slot for _, slot, *_ in questions])),
                    bounds={"cu_seqlens": self.tensor(bounds), "cu_seqlens_cpu": torch.tensor(bounds)}
                    if packed
                    else {},
                    chunk=CHUNK if packed else -(-max(sizes) // chunks),
                )
            )
        return found, self.tensor(place)

    def last_inputs(self, before: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(questions, before) the last tokens of each with its prefix; whether there are none; (questions,) slots."""
        ends = [last_tokens(np.concatenate([prefix[-before:], own]), before) for _, _, prefix, own in self._questions]
        slots = np.array([slot for _, slot, *_ in self._questions])
        return self.tensor(np.clip(ends, 0, None)), self.tensor(np.array(ends) < 0), self.tensor(slots)

    def select(self, rows: torch.Tensor, columns: torch.Tensor) -> None:
        """Go on with the answers of these rows alone, and of each with these slots: (rows,), (rows, slots)."""
        slots = (rows[:, None] * self.slots + columns).flatten()
        for layer, states in self.states.items():  # one by one: all copies at once would take the memory twice
            self.states[layer] = tuple(state.index_select(0, slots) for state in states)
        self.slots = columns.shape[1]


def forked_rows(batch: dict, keep_states: bool = False) -> ForkedRows:
    """Of a collated batch, on its device."""
    segments = batch["segments"]
    return ForkedRows(batch["row_lengths"], segments.shape[1], segments.device, keep_states)


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
    before, packed = layer.conv_kernel_size - 1, takes_packed(mixed.device)
    groups, place = rows.sequences(before, packed)
    first = slice(rows.prefix)
    gates = [_zeroed(gate[:, first], rows.after_prefix) for gate in (decay, beta)]
    output, prefix_state = _rule(layer, _convolve(layer, mixed[:, first]), *gates)
    outputs, states = [output.flatten(0, 1)], []
    flat = mixed.flatten(0, 1)
    for group in groups:
        window = _zeroed(flat.index_select(0, group.window), group.missing)
        own = _convolve(layer, window[None])[0].index_select(0, group.own.flatten()).unflatten(0, group.own.shape)
        tokens = group.tokens.flatten()
        gates = [gate.flatten(0, 1).index_select(0, tokens).view(*group.own.shape, -1) for gate in (decay, beta)]
        # Where decay (a logarithm) and beta are zero, the state stays as it is: padding never enters it.
        gates = [_zeroed(gate, group.padding) for gate in gates]
        start = prefix_state.index_select(0, group.rows)
        options = {"keep_state": rows.keep_states, "start": start, "chunk": group.chunk, "bounds": group.bounds}
        output, state = _rule(layer, own, *gates, **options)
        outputs.append(output.flatten(0, 1))
        states.append(state)
    if rows.keep_states:
        ends, missing, slots = rows.last_inputs(before)
        last = _zeroed(flat[ends], missing[..., None]).transpose(1, 2)  # (questions, channels, before)
        every = len(rows.lengths) * rows.slots
        convolution = last.new_zeros(every, *last.shape[1:]).index_copy_(0, slots, last)
        matrix = states[0].new_zeros(every, *states[0].shape[1:])
        for group, state in zip(groups, states, strict=True):
            matrix.index_copy_(0, group.slots, state)
        rows.states[layer.layer_idx] = convolution, matrix
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
    `choose_by_device`.

    Raises: `UserError` on a GPU under `deterministic: true`."""
    layers = [module for module in model.modules() if type(module).__name__ == "Qwen3_5GatedDeltaNet"]
    if not layers:
        return
    if torch.are_deterministic_algorithms_enabled() and torch.cuda.is_available():
        # PyTorch has no deterministic cumulative sum on CUDA, and the kernels of other packages promise nothing.
        raise UserError("deterministic: true cannot be kept with Qwen3.5's recurrent layers on GPUs; set it to false")
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
    return device.type == "cuda" and KERNELS["fla"] not in missing_kernels()


def notes(family: Family, device: torch.device) -> list[str]:
    """What the log says before a run's first step, where a GPU lacks kernels for these layers."""
    if not family.is_recurrent or device.type != "cuda" or not missing_kernels():
        return []
    return [
        f"Gated DeltaNet runs in PyTorch's own operations, as {' and '.join(missing_kernels())} cannot be imported: "
        "the same results but for rounding, from many small kernels and with more memory (not measured on a GPU yet); "
        "requirements-extra.txt says how to get them"
    ]
