"""Samples -> tokenised questions with their images -> a rank's passes of a step, in loader workers.

A worker builds one rank's whole share of a step at a time, so that an image is decoded once for all its questions in
the step. Every rank tokenises the whole step, because who does what depends on lengths; it decodes its own images.
Which questions make up a step, and how they are laid out, is decided in `batches.py`.
"""

import contextlib
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from batches import BatchPlan, Item, collate, lay_out, passes, share_out, weightless
from config import Config
from distributed import ignore_stop_signals
from errors import UserError
from family import Family
from images import (
    ModelImage,
    Placement,
    image_path,
    letterbox,
    letterbox_placement,
    native_placement,
    native_resize,
    open_image,
    patchify,
    upright_size,
)
from samples import SampleList
from tasks import task_of
from templates import cut_text, encode, image_paths, split_answer

SIZES_KEPT = 65_536  # images whose size a worker remembers
EVAL_TOKENS = 16_384  # of an evaluation batch: 3 GB of keys and values for an 8B, and work enough for a large GPU
EVAL_STATES = 6 * 2**30  # bytes of recurrent states that its answers go on from: 128 questions of a Qwen3.5-9B
BYTES_OF_A_TOKEN = 4


# ---------------------------------------------------------------------------------------------------- one sample


def rope_positions(input_ids: np.ndarray, grids: Sequence[tuple[int, int]], merge_size: int, image_token_id: int):
    """M-RoPE positions (3, T) of a sequence with images, equal to the models' own `get_rope_index`.

    Text counts on in all three rows; an image's tokens take its (time, row, column), and the text after it goes on
    from the larger side. Source: Qwen2-VL (arXiv 2409.12191), section 2.1. grids: (height, width) in patches.
    """
    positions = np.empty((3, len(input_ids)), dtype=np.int64)
    is_image = input_ids == image_token_id
    token, next_position = 0, 0
    for grid_height, grid_width in grids:
        rows, columns = grid_height // merge_size, grid_width // merge_size
        start = token + int(np.argmax(is_image[token:]))
        text_length = start - token
        positions[:, token:start] = next_position + np.arange(text_length)
        next_position += text_length
        token = start + rows * columns
        positions[0, start:token] = next_position
        positions[1, start:token] = next_position + np.repeat(np.arange(rows), columns)
        positions[2, start:token] = next_position + np.tile(np.arange(columns), rows)
        next_position += max(rows, columns)
    positions[:, token:] = next_position + np.arange(len(input_ids) - token)
    return positions


class SampleEncoder:
    """Turns samples into `Item`s and image files into `ModelImage`s, the same for training and inference."""

    def __init__(self, config: Config, family: Family, tokenizer):
        self.config, self.family, self.tokenizer = config, family, tokenizer
        self.task = task_of(config)
        if config.template not in self.task.TEMPLATES:
            known = ", ".join(self.task.TEMPLATES)
            raise UserError(f"key 'template' is '{config.template}'; use one of {known} for task '{config.task}'")
        self.image_shown = config.image == "shown" and family.has_vision

    @functools.cached_property
    def tokenizer_sha256(self) -> str:
        """Of all that turns messages into tokens."""
        parts = self.tokenizer.backend_tokenizer.to_str(), str(self.tokenizer.chat_template)
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def load_image(self, path: str) -> ModelImage:
        image = open_image(image_path(self.config.data.image_root, path))
        family = self.family
        if self.config.resize == "letterbox":
            image, placement = letterbox(image, self.config.image_size)
        else:
            image, placement = native_resize(image, *self._native_limits())
        grid = (image.height // family.patch_size, image.width // family.patch_size)
        return ModelImage(path, patchify(image, family.patch_size, family.merge_size), grid, placement)

    def size_only(self, path: str) -> ModelImage:
        """The image's grid without its pixels, from the file's header."""
        placement, patch_size = self.placement(path), self.family.patch_size
        width, height = placement.model_size
        return ModelImage(path, None, (height // patch_size, width // patch_size), placement)

    def _native_limits(self) -> tuple[int, int, int]:
        limit = self.config.max_pixels or self.family.max_pixels
        return self.family.factor, min(self.family.min_pixels, limit), limit

    def placement(self, path: str, size: tuple[int, int] | None = None) -> Placement:
        """Where an image lies in what the model sees of it. size: (width, height) in pixels, where it is known; else
        it is read from the file's header."""
        width, height = size or upright_size(image_path(self.config.data.image_root, path))
        if self.config.resize == "letterbox":
            return letterbox_placement(width, height, self.config.image_size)
        return native_placement(width, height, *self._native_limits())

    def images_of(self, sample: dict) -> tuple[str, ...]:
        """The paths of the images that the model is shown. Raises: `UserError` where it cannot see them."""
        images = image_paths(sample)
        if images and self.config.image == "shown" and not self.family.has_vision:
            raise UserError(f"the sample has images but model_name is a text model ({self.family.model_type})")
        return tuple(images) if self.image_shown else ()

    def encode(self, sample: dict, images: Sequence[ModelImage], generation: bool = False) -> Item:
        """images: those of `images_of`. generation: only the prompt goes in, so the gold answer cannot reach the model.

        Raises: `UserError` where the sample is longer than max_tokens: neither image nor answer is ever cut, only a
        document's text, at its end.
        """
        family, merge_size, has_head = self.family, self.family.merge_size, self.task.HAS_HEAD
        messages, label = self.task.prompt(sample, self, len(images), images[0].placement if images else None)
        if generation and not has_head:
            messages, _ = split_answer(messages)
        image_tokens = [image.grid[0] * image.grid[1] // merge_size**2 for image in images]
        encoded = encode(messages, self.tokenizer, image_tokens, family.image_token_id, generation or has_head)
        too_many = max(0, len(encoded.input_ids) - self.config.max_tokens)
        if too_many and has_head and "text" in sample:
            encoded = cut_text(encoded, sample["text"], too_many, self.tokenizer)
        elif too_many:
            raise UserError(
                f"{len(encoded.input_ids)} tokens ({sum(image_tokens)} of them image) exceed max_tokens "
                f"{self.config.max_tokens}; raise max_tokens, make the image smaller or drop the sample"
            )
        input_ids = np.asarray(encoded.input_ids)
        is_image = np.flatnonzero(input_ids == family.image_token_id)
        return Item(
            sample_id=sample["id"],
            input_ids=input_ids,
            labels=np.asarray(encoded.labels),
            position_ids=rope_positions(input_ids, [i.grid for i in images], merge_size, family.image_token_id),
            images=tuple(image.path for image in images),
            last_image_token=int(is_image[-1]) if len(is_image) else -1,
            class_label=label,
            cut_tokens=too_many,
        )


# -------------------------------------------------------------------------------------------------------- datasets


class _Batches(Dataset):
    def __init__(self, samples: SampleList, encoder: SampleEncoder, share_prefix: bool):
        self.samples, self.encoder, self.share_prefix = samples, encoder, share_prefix
        self.pad_id = encoder.tokenizer.pad_token_id

    def encode(self, row: int, load: Callable[[str], ModelImage], generation: bool = False) -> Item:
        """The item of a sample. load: path -> its image, decoded or its size alone."""
        sample = self.samples[row]
        try:
            return self.encoder.encode(sample, [load(path) for path in self.encoder.images_of(sample)], generation)
        except UserError as error:
            raise UserError(f"{self.samples.name(row)}: {error}") from None


class StepDataset(_Batches):
    """Index: an optimizer step. Item: this rank's passes of it, the supervised tokens of the step on all ranks, and
    [place in the step, sample id] of what this rank does."""

    def __init__(self, samples, encoder, share_prefix, plan: BatchPlan, pass_tokens: int, rank: int, world_size: int):
        super().__init__(samples, encoder, share_prefix)
        self.plan, self.pass_tokens, self.rank, self.world_size = plan, pass_tokens, rank, world_size
        self._size_only = functools.lru_cache(SIZES_KEPT)(encoder.size_only)

    def __getitem__(self, step: int) -> dict:
        try:
            rows = self.plan.questions(step)
            items = [self.encode(row, self._size_only) for row in rows]
            mine = share_out(items, self.share_prefix, self.world_size)[self.rank]
            own = [items[place] for place in mine]
            if not own:  # nothing to do; under FSDP every rank must join each pass: a question of weight 0
                mine, own = [], [weightless(items[0])]
            images: dict[str, ModelImage] = {}
            for item, place in zip(own, mine or [0], strict=True):
                for path in item.images:
                    if path not in images:
                        images[path] = self._decode(path, rows[place])
            laid_out = lay_out(own, self.share_prefix, self.pass_tokens)
            collated = [
                collate(own, images, self.share_prefix, self.pad_id, part, self.encoder.family)
                for part in passes(laid_out, self.pass_tokens)
            ]
        except UserError as error:
            return {"error": str(error)}
        return {
            "passes": collated,
            "answer_tokens": sum(item.answer_tokens for item in items),
            "sample_ids": [[place, items[place].sample_id] for place in mine],
        }

    def _decode(self, path: str, row: int) -> ModelImage:
        try:
            return self.encoder.load_image(path)
        except UserError as error:
            raise UserError(f"{self.samples.name(row)}: {error}") from None


class EvalDataset(_Batches):
    """Index: a batch of the split, of about `EVAL_TOKENS` tokens with padding, of at most `EVAL_STATES` and eval_bs
    questions. With shared prefixes it holds the questions of an image together, so that the image is read once. Batches
    do not depend on the number of ranks, so predictions do not either."""

    def __init__(
        self, samples, encoder, share_prefix, eval_bs: int | None, generation: bool, rows: Sequence[int] | None = None
    ):
        super().__init__(samples, encoder, share_prefix)
        self.generation = generation
        groups: dict = {}
        for row in range(len(samples)) if rows is None else rows:
            images = encoder.images_of(samples[row])
            groups.setdefault((images if share_prefix and images else row, images), []).append(row)
        most, slots = eval_bs or len(samples), math.inf
        if generation and encoder.family.is_recurrent and not encoder.task.HAS_HEAD:
            slots = max(1, EVAL_STATES // encoder.family.state_bytes)  # a state for as many as the widest row has
        count, longest, widest = 0, 0, 0  # rows of the last batch, tokens of its longest, questions of its widest
        self.batches: list[list[int]] = [[]]
        for (_, images), group in groups.items():
            for members, tokens in self._rows_of(group, self._image_tokens(images), min(most, slots)):
                padded, wide = (count + 1) * max(longest, tokens), (count + 1) * max(widest, len(members))
                full = len(self.batches[-1]) + len(members) > most or padded > EVAL_TOKENS or wide > slots
                if self.batches[-1] and full:
                    self.batches.append([])
                    count, longest, widest = 0, 0, 0
                self.batches[-1] += members
                count, longest, widest = count + 1, max(longest, tokens), max(widest, len(members))
        self.batches = [batch for batch in self.batches if batch]

    def _rows_of(self, group: list[int], prefix: int, most: int) -> list[tuple[list[int], int]]:
        """(questions, tokens) of each row that an image's questions take: more than one only where they are more than a
        batch holds. prefix: tokens of the image."""
        parts: list[tuple[list[int], int]] = []
        for row in group:
            text = self._text_tokens(row)
            if parts and len(parts[-1][0]) < most and parts[-1][1] + text <= EVAL_TOKENS:
                parts[-1] = ([*parts[-1][0], row], parts[-1][1] + text)
            else:
                parts.append(([row], prefix + text))
        return parts

    def _image_tokens(self, images: Sequence[str]) -> int:
        with contextlib.suppress(UserError):  # a worker names the row of an image that cannot be read
            grids = [self.encoder.size_only(path).grid for path in images]
            return sum(height * width // self.encoder.family.merge_size**2 for height, width in grids)
        return 0

    def _text_tokens(self, row: int) -> int:
        """About as many as the sample's text has, without tokenising a whole split here."""
        size = len(json.dumps(self.samples[row], ensure_ascii=False).encode(errors="replace"))
        return min(size // BYTES_OF_A_TOKEN, self.encoder.config.max_tokens)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict:
        try:
            images: dict[str, ModelImage] = {}

            def load(path: str) -> ModelImage:
                if path not in images:
                    images[path] = self.encoder.load_image(path)
                return images[path]

            items = [self.encode(row, load, self.generation) for row in self.batches[index]]
            batch = collate(items, images, self.share_prefix, self.pad_id, family=self.encoder.family)
            return {**batch, "rows": self.batches[index]}
        except UserError as error:
            return {"error": str(error)}


def load(dataset: Dataset, indices: Sequence[int], workers: int, device: torch.device) -> Iterator[dict]:
    """Items of a dataset in order, prepared ahead by `workers` processes. Raises: `UserError` from a worker, in one
    line. (Raised inside the worker it would arrive wrapped in a traceback.)"""
    loader = DataLoader(
        dataset,
        sampler=indices,
        batch_size=None,
        num_workers=min(workers, len(indices)),
        pin_memory=device.type == "cuda",
        prefetch_factor=2 if workers and len(indices) else None,
        worker_init_fn=ignore_stop_signals,
        multiprocessing_context="fork" if workers and len(indices) else None,  # samples are shared, and not pickled
    )
    for loaded in loader:
        if "error" in loaded:
            raise UserError(loaded["error"])
        yield loaded
