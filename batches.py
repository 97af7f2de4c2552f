"""Which questions make up an optimizer step (the plan), which rank does which, and how they lie in passes.

The plan alone decides which questions a step has, as a pure function of (seed, step). Sharing them out over the ranks
and laying them out in rows and passes never changes a step, a loss or a gradient: only which dropout is drawn, and the
order of sums. Both are pure functions of the step's questions, the number of ranks and the budget of a pass.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from family import Family
from images import ModelImage
from recurrent import lay_out_forks
from templates import IGNORE


@dataclass(frozen=True)
class Item:
    """One question, tokenised. Arrays of T tokens; `labels` in place, `IGNORE` where nothing is supervised."""

    sample_id: str
    input_ids: np.ndarray  # (T,)
    labels: np.ndarray  # (T,)
    position_ids: np.ndarray  # (3, T): temporal, height, width
    images: tuple[str, ...]  # paths, the keys of the decoded images
    last_image_token: int  # index; -1 without images
    class_label: int | None = None  # of a document to be classified
    cut_tokens: int = 0  # of its text, at the end

    @property
    def answer_tokens(self) -> int:
        """Supervised tokens, or labels."""
        return int((self.labels != IGNORE).sum()) if self.class_label is None else int(self.class_label != IGNORE)


def weightless(item: Item) -> Item:
    """The same question without anything supervised: for a rank that has nothing to do but must take part."""
    label = None if item.class_label is None else IGNORE
    return replace(item, labels=np.full_like(item.labels, IGNORE), class_label=label)


class BatchPlan:
    """Which questions make up which optimizer step: a pure function of its arguments.

    Every epoch ends with a smaller step where the questions do not fill it. A fractional last epoch takes that share of
    the questions, rounded up.
    """

    def __init__(self, samples: int, batch: int, epochs: float, order: str, seed: int, image_of=None):
        """batch: questions of one optimizer step, over all ranks. image_of: for order 'images', a number
        for each sample that it shares with those of the same image."""
        self.samples, self.batch, self.order, self.seed, self._image_of = samples, batch, order, seed, image_of
        whole_epochs = int(epochs)
        self.steps_per_epoch = -(-samples // batch)
        last_samples = int(np.ceil(round((epochs - whole_epochs) * samples, 6)))
        self.questions_in_last_epoch = last_samples or samples
        self.total_steps = whole_epochs * self.steps_per_epoch + -(-last_samples // batch)
        self.total_questions = whole_epochs * samples + last_samples
        self._last_epoch = whole_epochs if last_samples else whole_epochs - 1
        self._cached = (-1, None)

    def epoch_order(self, epoch: int) -> np.ndarray:
        """Sample indices in the order of one epoch."""
        if self._cached[0] != epoch:
            # Of all of numpy's streams, only RandomState's is promised never to change (NEP 19).
            generator = np.random.RandomState([self.seed & 0xFFFFFFFF, self.seed >> 32, epoch])
            if self.order == "sequential":
                order = np.arange(self.samples)
            elif self.order == "random":
                order = generator.permutation(self.samples)
            else:  # images: shuffled images, the questions of each together and in file order
                _, first, image = np.unique(self._image_of, return_index=True, return_inverse=True)
                place = np.empty_like(first)  # of an image in this epoch; they are counted as they appear in the file
                place[np.argsort(first)[generator.permutation(len(first))]] = np.arange(len(first))
                order = np.argsort(place[image], kind="stable")
            self._cached = (epoch, order)
        return self._cached[1]

    def sha256(self) -> str:
        """Of the order of the first epoch: a resumed run must draw as before."""
        return hashlib.sha256(self.epoch_order(0).astype("<i8").tobytes()).hexdigest()

    def questions(self, step: int) -> np.ndarray:
        """Sample indices of one step (counted from 0), over all ranks."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        limit = self.questions_in_last_epoch if epoch == self._last_epoch else self.samples
        start = step_in_epoch * self.batch
        return self.epoch_order(epoch)[start : min(start + self.batch, limit)]

    def epoch_at(self, step: int) -> float:
        """Epochs seen once `step` steps are done."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        return min(epoch * self.samples + step_in_epoch * self.batch, self.total_questions) / self.samples


# -------------------------------------------------------------------------------------------------------- collator

BUSY_PASS = 1024  # tokens from which on a GPU is busy: a smaller pass takes any row that fits, however much is padding
MOST_PADDING = 0.1  # of a row that joins a busy pass


@dataclass(frozen=True)
class Row:
    """One row of a pass: the questions of an image behind the prefix that they share, or one question alone."""

    items: tuple[int, ...]  # indices of the step's items
    prefix: int  # tokens
    tokens: int  # of the whole row, without padding


def lay_out(items: Sequence[Item], share_prefix: bool, most_tokens: int | None = None) -> list[Row]:
    """One row for each image, in order of first appearance. An image with more questions than `most_tokens` hold is
    given several rows, each with a prefix of its own."""
    by_images: dict = {}
    for index, item in enumerate(items):
        by_images.setdefault(item.images if share_prefix and item.images else index, []).append(index)
    rows = []
    for members in by_images.values():
        prefix = _shared_prefix([items[index] for index in members])
        if len(members) > 1 and prefix > items[members[0]].last_image_token:
            rows += _cut(items, members, prefix, most_tokens)
        else:  # alone, or the texts part before the images end: nothing worth sharing
            rows += [_row_of(items, [index], _shared_prefix([items[index]])) for index in members]
    return rows


def _row_of(items: Sequence[Item], members: list[int], prefix: int) -> Row:
    return Row(tuple(members), prefix, prefix + sum(len(items[index].input_ids) - prefix for index in members))


def _cut(items: Sequence[Item], members: list[int], prefix: int, most_tokens: int | None) -> list[Row]:
    """A row of these questions, or several where it would be longer than most_tokens."""
    parts, tokens = [[]], prefix
    for index in members:
        own = len(items[index].input_ids) - prefix
        if parts[-1] and most_tokens is not None and tokens + own > most_tokens:
            parts.append([])
            tokens = prefix
        parts[-1].append(index)
        tokens += own
    return [_row_of(items, part, prefix) for part in parts]


def share_out(items: Sequence[Item], share_prefix: bool, world_size: int) -> list[list[int]]:
    """Indices of the items that each rank does, in order: whole images, the longest first, each to the rank that has
    the fewest tokens so far. Only an image whose questions alone are more than a rank's mean share is parted.

    A pure function of the items, so that every rank knows it without asking."""
    if world_size == 1:
        return [list(range(len(items)))]
    rows = lay_out(items, share_prefix)
    mean_share = sum(row.tokens for row in rows) / world_size
    pieces = []
    for row in rows:
        own = row.tokens - row.prefix
        parts = max(1, math.ceil(own / mean_share))
        pieces += _cut(items, list(row.items), row.prefix, row.prefix + math.ceil(own / parts))
    shares: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for row in sorted(pieces, key=lambda row: (-row.tokens, row.items)):
        rank = loads.index(min(loads))
        shares[rank] += row.items
        loads[rank] += row.tokens
    return [sorted(share) for share in shares]


def passes(rows: list[Row], pass_tokens: int) -> list[list[Row]]:
    """Rows, the longest first, in passes of at most `pass_tokens` tokens with padding, so that little is padding. A row
    that is longer by itself is a pass of its own."""
    parts: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: (-row.tokens, row.items)):
        count, longest = (len(parts[-1]), parts[-1][0].tokens) if parts else (0, 0)
        fits = count and (count + 1) * longest <= pass_tokens
        if fits and (count * longest < BUSY_PASS or row.tokens >= (1 - MOST_PADDING) * longest):
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts


def collate(
    items: Sequence[Item],
    images: Mapping[str, ModelImage],
    share_prefix: bool,
    pad_id: int,
    rows: list[Row] | None = None,
    family: Family | None = None,
) -> dict:
    """Lay questions out as the rows of one pass, those of one image behind one shared prefix. rows: those of `lay_out`,
    where the pass holds a part of the items. family: of the images, where they are shown to a model.

    A row is [prefix, question, question, ...] with segment 0 for the prefix, 1, 2, ... for the questions and -1 for
    padding; a token sees the prefix and its own segment (`attention.py`). Positions are each question's own.
    Returns input_ids, targets, segments (B, T); position_ids (3, B, T); patches, image_grid_thw of the distinct
    images; image_index: for each image in the rows, in order, which of them it is; slots (B, K): item of each row's
    questions, -1 where there is none. shared_prefix: tokens that are prefix in every row, None where several rows hold
    one question each, which then need no mask. (A single row of one question needs none either, but without this
    exception a compiled layer would have two forms more.) row_lengths: of each row, the tokens of its prefix and of
    each question, on the host; forks: for recurrent layers, of `lay_out_forks`. targets: the next token at the position
    that predicts it, elsewhere `IGNORE`. answer_tokens: how many tokens, or labels, are supervised. tokens: laid out,
    without padding; 0 where nothing is supervised. class_labels, cut_tokens (items,): documents'.
    supervised, last_tokens (items,): places, counted over the whole (B × T), of what is supervised and of each item's
    last token; with `vision_inputs`, these are worked out here because the host would have to wait for the GPU.
    """
    laid_out = lay_out(items, share_prefix) if rows is None else rows
    order = sorted(index for row in laid_out for index in row.items)  # of the items in this pass
    place = {index: position for position, index in enumerate(order)}
    rows = [_arrays(items, row) for row in laid_out]
    length = max(len(row["ids"]) for row in rows)
    slots = max(len(row.items) for row in laid_out)
    batch = {
        "input_ids": torch.full((len(rows), length), pad_id),
        "targets": torch.full((len(rows), length), IGNORE),
        "segments": torch.full((len(rows), length), -1, dtype=torch.int32),
        "position_ids": torch.zeros((3, len(rows), length), dtype=torch.int64),
        "slots": torch.full((len(rows), slots), -1),
    }
    last_tokens = np.empty(len(order), dtype=np.int64)
    for b, row in enumerate(rows):
        tokens = len(row["ids"])
        batch["input_ids"][b, :tokens] = torch.from_numpy(row["ids"])
        batch["targets"][b, :tokens] = torch.from_numpy(row["targets"])
        batch["segments"][b, :tokens] = torch.from_numpy(row["segments"])
        batch["position_ids"][:, b, :tokens] = torch.from_numpy(row["positions"])
        members = [place[index] for index in laid_out[b].items]
        batch["slots"][b, : len(members)] = torch.tensor(members)
        own_tokens = [len(items[index].input_ids) - laid_out[b].prefix for index in laid_out[b].items]
        last_tokens[members] = b * length + laid_out[b].prefix + np.cumsum(own_tokens) - 1
    batch["row_lengths"] = [  # plain numbers: of NumPy's, the loader would make tensors
        [int(row.prefix), *(len(items[index].input_ids) - int(row.prefix) for index in row.items)] for row in laid_out
    ]
    if family and family.is_recurrent:
        batch["forks"] = lay_out_forks(batch["row_lengths"], length, family.lookback)
    batch["shared_prefix"] = min(row.prefix for row in laid_out) if slots > 1 or len(rows) == 1 else None
    shown = [path for row in laid_out for path in items[row.items[0]].images]
    if shown:
        distinct = list(dict.fromkeys(shown))
        batch["patches"] = torch.from_numpy(np.concatenate([images[path].patches for path in distinct]))
        batch["image_grid_thw"] = torch.tensor([(1, *images[path].grid) for path in distinct])
        batch["image_index"] = [distinct.index(path) for path in shown]
        batch |= vision_inputs(batch["input_ids"], batch["image_grid_thw"], family) if family else {}
    batch["sample_ids"] = [items[index].sample_id for index in order]
    batch["last_tokens"] = torch.from_numpy(last_tokens)
    batch["supervised"] = (batch["targets"].flatten() != IGNORE).nonzero().flatten()
    batch["answer_tokens"] = len(batch["supervised"])
    if items[order[0]].class_label is not None:
        batch["class_labels"] = torch.tensor([items[index].class_label for index in order])
        batch["cut_tokens"] = torch.tensor([items[index].cut_tokens for index in order])
        batch["answer_tokens"] = int((batch["class_labels"] != IGNORE).sum())
    batch["tokens"] = sum(row.tokens for row in laid_out) if batch["answer_tokens"] else 0
    return batch


def vision_inputs(input_ids: torch.Tensor, grids: torch.Tensor, family: Family) -> dict:
    """What the model derives from images' grids (N, 3), on the host.

    Returns image_tokens: places of the image tokens, counted over the whole input_ids (B × T); vision: what
    transformers' towers take beside the patches, each only what it reads. Source: transformers.vision_utils."""
    from transformers import vision_utils

    merge = family.merge_size
    vision = {
        "position_ids": vision_utils.get_vision_position_ids(grids, merge),
        "cu_seqlens": vision_utils.get_vision_cu_seqlens(grids),
    }
    if family.window:
        windows = vision_utils.get_vision_window_index(grids, merge, family.window, family.patch_size)
        vision |= dict(zip(("window_index", "cu_window_seqlens"), windows, strict=True))
    if family.position_rows:
        taps = vision_utils.get_vision_interpolation_indices_and_weights(
            grids, family.position_rows, "bilinear", align_corners=True, spatial_merge_size=merge
        )
        vision |= dict(zip(("interp_indices", "interp_weights"), taps, strict=True))
    places = (input_ids.flatten() == family.image_token_id).nonzero().flatten()
    return {"image_tokens": places, "vision": vision}


def _shared_prefix(items: list[Item]) -> int:
    """Tokens that all have in common, short enough that every question keeps the predictor of its first label."""
    first = items[0].input_ids
    length = len(first) - 1
    for item in items:
        supervised = np.flatnonzero(item.labels != IGNORE)
        length = min(length, len(item.input_ids) - 1, *(supervised[:1] - 1))
        differs = np.flatnonzero(item.input_ids[:length] != first[:length])
        length = int(differs[0]) if len(differs) else length
    return length


def _arrays(items: Sequence[Item], row: Row) -> dict:
    """The row's tokens: ids, targets, segments (tokens,) and positions (3, tokens)."""
    first, prefix = items[row.items[0]], row.prefix
    ids, targets, segments = [first.input_ids[:prefix]], [np.full(prefix, IGNORE)], [np.zeros(prefix, dtype=np.int32)]
    positions = [first.position_ids[:, :prefix]]
    for segment, index in enumerate(row.items, 1):
        item = items[index]
        ids.append(item.input_ids[prefix:])
        targets.append(np.append(item.labels[prefix + 1 :], IGNORE))
        segments.append(np.full(len(item.input_ids) - prefix, segment, dtype=np.int32))
        positions.append(item.position_ids[:, prefix:])
    return {
        "ids": np.concatenate(ids),
        "targets": np.concatenate(targets),
        "segments": np.concatenate(segments),
        "positions": np.concatenate(positions, axis=1),
    }
