"""Which questions make up an optimizer step, and how they lie in its micro-batches.

The plan alone decides which questions a step has, as a pure function of (seed, step, rank). The collator only lays them
out: sharing a prefix never changes a batch, a loss or a gradient.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from images import ModelImage
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


def weightless(item: Item) -> Item:
    """The same question without anything supervised: for a rank that has nothing to do but must take part."""
    label = None if item.class_label is None else IGNORE
    return replace(item, labels=np.full_like(item.labels, IGNORE), class_label=label)


class BatchPlan:
    """Which questions make up which optimizer step: a pure function of its arguments.

    Every epoch ends with a smaller step where the questions do not fill it. A fractional last epoch takes that share of
    the questions, rounded up.
    """

    def __init__(self, samples: int, batch: int, epochs: float, order: str, seed: int, image_of: list | None = None):
        """batch: questions of one optimizer step, over all ranks. image_of: each sample's image, for 'images'."""
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
            generator = np.random.default_rng([self.seed, epoch])
            if self.order == "sequential":
                order = np.arange(self.samples)
            elif self.order == "random":
                order = generator.permutation(self.samples)
            else:  # images: shuffled images, the questions of each together and in file order
                groups: dict = {}
                for index, image in enumerate(self._image_of):
                    groups.setdefault(image, []).append(index)
                groups = list(groups.values())
                order = np.concatenate([groups[group] for group in generator.permutation(len(groups))])
            self._cached = (epoch, order)
        return self._cached[1]

    def questions(self, step: int) -> np.ndarray:
        """Sample indices of one step (counted from 0), over all ranks."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        limit = self.questions_in_last_epoch if epoch == self._last_epoch else self.samples
        start = step_in_epoch * self.batch
        return self.epoch_order(epoch)[start : min(start + self.batch, limit)]

    def rank_questions(self, step: int, rank: int, world_size: int) -> np.ndarray:
        """This rank's contiguous slice of the step; empty where a last small step has fewer questions than ranks."""
        return np.array_split(self.questions(step), world_size)[rank]

    def epoch_at(self, step: int) -> float:
        """Epochs seen once `step` steps are done."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        return min(epoch * self.samples + step_in_epoch * self.batch, self.total_questions) / self.samples


# -------------------------------------------------------------------------------------------------------- collator

# Tokens of a pass. An H100 works off 1,000 tokens of the 8B in the 50 ms that launching a pass's 10,000 kernels takes
# (by count, unmeasured): from there on it is busy, and with four times as many, launching hides behind the arithmetic.
BUSY_PASS = 1024
FULL_PASS = {"cuda": 4096, "cpu": 1024}
# Of rows that share nothing, on CPUs and with gradient checkpointing. Without it, each token of an 8B holds 9.4 MB of
# activations until the backward pass (by count): there FULL_PASS is their limit too.
LARGEST_PASS = 16_384
MOST_PADDING = 0.1  # of a row that joins a busy pass


def collate(items: list[Item], images: dict[str, ModelImage], share_prefix: bool, pad_id: int) -> dict:
    """Lay questions out as rows, those of one image behind one shared prefix.

    A row is [prefix, question, question, ...] with segment 0 for the prefix, 1, 2, ... for the questions and -1 for
    padding; a token sees the prefix and its own segment (`attention.py`). Positions are each question's own.
    Returns input_ids, targets, segments (B, T); position_ids (3, B, T); patches, image_grid_thw of the distinct
    images; image_index: for each image in the rows, in order, which of them it is; slots (B, K): item of each row's
    questions, -1 where there is none. shared_prefix: tokens that are prefix in every row, None where no row holds more
    than one question, which then need no mask. targets: the next token at the position that predicts it, elsewhere
    `IGNORE`. answer_tokens: how many tokens, or labels, are supervised. class_labels, cut_tokens (items,): documents'.
    """
    groups = _groups(items, share_prefix)
    rows = [_row(items, group, prefix) for group, prefix in groups]
    length = max(len(row["ids"]) for row in rows)
    slots = max(len(row["group"]) for row in rows)
    batch = {
        "input_ids": torch.full((len(rows), length), pad_id),
        "targets": torch.full((len(rows), length), IGNORE),
        "segments": torch.full((len(rows), length), -1, dtype=torch.int32),
        "position_ids": torch.zeros((3, len(rows), length), dtype=torch.int64),
        "slots": torch.full((len(rows), slots), -1),
    }
    for b, row in enumerate(rows):
        tokens = len(row["ids"])
        batch["input_ids"][b, :tokens] = torch.from_numpy(row["ids"])
        batch["targets"][b, :tokens] = torch.from_numpy(row["targets"])
        batch["segments"][b, :tokens] = torch.from_numpy(row["segments"])
        batch["position_ids"][:, b, :tokens] = torch.from_numpy(row["positions"])
        batch["slots"][b, : len(row["group"])] = torch.tensor(row["group"])
    batch["shared_prefix"] = min(prefix for _, prefix in groups) if slots > 1 else None
    shown = [path for row in rows for path in items[row["group"][0]].images]
    if shown:
        distinct = list(dict.fromkeys(shown))
        batch["patches"] = torch.from_numpy(np.concatenate([images[path].patches for path in distinct]))
        batch["image_grid_thw"] = torch.tensor([(1, *images[path].grid) for path in distinct])
        batch["image_index"] = [distinct.index(path) for path in shown]
    batch["sample_ids"] = [item.sample_id for item in items]
    batch["answer_tokens"] = int((batch["targets"] != IGNORE).sum())
    if items[0].class_label is not None:
        batch["class_labels"] = torch.tensor([item.class_label for item in items])
        batch["cut_tokens"] = torch.tensor([item.cut_tokens for item in items])
        batch["answer_tokens"] = int((batch["class_labels"] != IGNORE).sum())
    return batch


def last_tokens(segments: torch.Tensor) -> torch.Tensor:
    """(B, T) segments → bool (B, T), True at each question's last token; row by row, they come in the slots' order."""
    is_last = torch.zeros_like(segments, dtype=torch.bool)
    is_last[:, :-1] = (segments[:, :-1] > 0) & (segments[:, 1:] != segments[:, :-1])
    is_last[:, -1] = segments[:, -1] > 0
    return is_last


def passes(items: list[Item], share_prefix: bool, device: str = "cpu", checkpointing: bool = True) -> list[list[Item]]:
    """Cut a micro-batch into passes of limited size; those with shared prefixes so that little is padding.
    checkpointing: activations are not kept for the backward pass."""
    groups = _groups(items, share_prefix)
    shared = any(len(group) > 1 for group, _ in groups)
    limit = LARGEST_PASS if not shared and (checkpointing or device == "cpu") else FULL_PASS[device]
    lengths = [prefix + sum(len(items[index].input_ids) - prefix for index in group) for group, prefix in groups]
    parts: list[list[int]] = []  # of rows, the longest first
    for row in sorted(range(len(groups)), key=lambda row: -lengths[row]):
        count, longest = (len(parts[-1]), lengths[parts[-1][0]]) if parts else (0, 0)
        fits = count and (count + 1) * longest <= limit
        if fits and (not shared or count * longest < BUSY_PASS or lengths[row] >= (1 - MOST_PADDING) * longest):
            parts[-1].append(row)
        else:
            parts.append([row])
    return [[items[index] for index in sorted(index for row in part for index in groups[row][0])] for part in parts]


def _groups(items: list[Item], share_prefix: bool) -> list[tuple[list[int], int]]:
    """(items of a row, length of their shared prefix): one row per image, in order of first appearance."""
    by_images: dict = {}
    for index, item in enumerate(items):
        by_images.setdefault(item.images if share_prefix and item.images else index, []).append(index)
    groups = []
    for members in by_images.values():
        prefix = _shared_prefix([items[index] for index in members])
        if len(members) > 1 and prefix > items[members[0]].last_image_token:
            groups.append((members, prefix))
        else:  # alone, or the texts part before the images end: nothing worth sharing
            groups += [([index], _shared_prefix([items[index]])) for index in members]
    return groups


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


def _row(items: list[Item], group: list[int], prefix: int) -> dict:
    first = items[group[0]]
    ids, targets, segments = [first.input_ids[:prefix]], [np.full(prefix, IGNORE)], [np.zeros(prefix, dtype=np.int32)]
    positions = [first.position_ids[:, :prefix]]
    for segment, index in enumerate(group, 1):
        item = items[index]
        ids.append(item.input_ids[prefix:])
        targets.append(np.append(item.labels[prefix + 1 :], IGNORE))
        segments.append(np.full(len(item.input_ids) - prefix, segment, dtype=np.int32))
        positions.append(item.position_ids[:, prefix:])
    return {
        "group": group,
        "ids": np.concatenate(ids),
        "targets": np.concatenate(targets),
        "segments": np.concatenate(segments),
        "positions": np.concatenate(positions, axis=1),
    }
