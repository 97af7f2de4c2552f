"""A split -> its loss and its answers, shared out over all ranks. Used while training and by `evaluate.py`.

Greedy answers: an image is read once, and all its questions are answered from that cache. Questions of one image stand
in one row behind their shared prefix (see `batches.collate`). Each decoding step feeds one token per question; the mask
lets it see the prefix, its own question and its own answer. What has ended leaves the batch.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers.cache_utils import DynamicCache, DynamicLayer

from classification import ClassLoss
from config import Config
from dataset import EvalDataset, SampleEncoder, load
from distributed import Ranks
from errors import UserError
from family import Family
from model import AnswerLoss, adapter_in_the_bases_type, forward_logits, shared_rows, to_device
from recurrent import forked_rows
from runlog import on_terminal
from samples import SampleList

MAX_NEW_TOKENS = 128  # the longest Kvasir-VQA answer, all nine places, has 44


class Stopped(Exception):
    """The ranks agreed to stop inside an evaluation; the run saves and ends, and evaluates again when it resumes."""


def _dataset(samples: SampleList, encoder: SampleEncoder, rows: Sequence[int] | None, generation: bool) -> EvalDataset:
    with_states = generation and encoder.family.is_recurrent  # of which a batch of answers holds a bounded number
    dataset = copy.copy(_batched(samples, encoder, None if rows is None else tuple(rows), with_states))
    dataset.generation = generation
    return dataset


@functools.lru_cache(maxsize=4)  # all of a split and a part of it, for the loss and for answers
def _batched(samples, encoder, rows, with_states) -> EvalDataset:
    """Loss and answers of every evaluation take the same batches; to cut them, each image's header is read."""
    return EvalDataset(samples, encoder, encoder.config.share_prefix, encoder.config.eval_bs, with_states, rows)


def _rounds(dataset: EvalDataset, config: Config, ranks: Ranks, stop: Callable[[], bool], title: str):
    """This rank's batches; None in a last round in which it has none left. All ranks: agrees on stopping each round."""
    mine = range(ranks.rank, len(dataset), ranks.world_size)
    rounds = -(-len(dataset) // ranks.world_size)
    batches = load(dataset, mine, config.dataloader_num_workers, ranks.device)
    for _ in tqdm(range(rounds), title, disable=not on_terminal(), leave=False):
        yield next(batches, None)
        if ranks.any(stop()):
            raise Stopped


@contextlib.contextmanager
def _batch_fits(batch: dict):
    """Raises: `UserError` where the memory does not suffice for what is done with the batch."""
    try:
        yield
    except torch.OutOfMemoryError:
        (rows, length), questions = batch["input_ids"].shape, len(batch["sample_ids"])
        cure = f"set eval_bs={questions // 2}" if questions > 1 else "evaluate on a GPU with more memory"
        raise UserError(
            f"out of memory on an evaluation batch of {questions} questions ({rows} rows of {length} tokens); {cure}"
        ) from None


@torch.no_grad()
def split_loss(
    loss: AnswerLoss,
    samples: SampleList,
    encoder: SampleEncoder,
    ranks: Ranks,
    rows: Sequence[int] | None = None,
    stop=lambda: False,
) -> float:
    """Mean negative log-likelihood (nats) per answer token of a split, or of some of its rows. All ranks: contains
    all_reduces."""
    dataset = _dataset(samples, encoder, rows, generation=False)
    nll, tokens = 0.0, 0
    for batch in _rounds(dataset, encoder.config, ranks, stop, "loss"):
        if batch is not None:
            with _batch_fits(batch):
                nll += float(loss(to_device(batch, ranks.device)))
            tokens += batch["answer_tokens"]
    nll, tokens = ranks.sum(nll, tokens)
    return nll / tokens


def evaluation_rows(samples: SampleList, config: Config) -> list[int]:
    """Rows of a split that are evaluated while training: whole images with `eval_max_samples` samples together at the
    most, or one image that alone has more. A function of the split and the seed, whatever the number of ranks."""
    if not 0 < config.eval_max_samples < len(samples):
        return list(range(len(samples)))
    _, image, counts = np.unique(samples.image_keys, return_inverse=True, return_counts=True)
    chosen, total = [], 0
    # As the plan's order: of numpy's streams, only RandomState's is promised never to change.
    for group in np.random.RandomState([config.seed & 0xFFFFFFFF, config.seed >> 32]).permutation(len(counts)):
        if not chosen or total + counts[group] <= config.eval_max_samples:
            chosen.append(group)
            total += counts[group]
    return np.flatnonzero(np.isin(image, chosen)).tolist()


def scores_while_training(
    loss, splits: dict[str, SampleList], encoder: SampleEncoder, ranks: Ranks, stop, is_last: bool = False
) -> dict:
    """Loss and accuracy on val (eval_loss, eval_accuracy): of `evaluation_rows`, at a run's last evaluation of all.
    Then eval_subset_loss is the loss of `evaluation_rows`, so that it can be compared with the evaluations before.

    cls: of all of val, and of test (test_loss, test_accuracy), every time: its best evaluation is the run's result, and
    a document takes one forward pass. All ranks: contains all_reduces."""
    if encoder.task.HAS_HEAD:
        values = {}
        for split, prefix in (("val", "eval"), ("test", "test")):
            if split in splits:
                rows = classify_split(loss, splits[split], encoder, ranks, stop)
                values[f"{prefix}_loss"] = _mean_cross_entropy(rows)
                values[f"{prefix}_accuracy"] = sum(row["correct"] for row in rows) / len(rows)
        return values
    val, subset = splits["val"], evaluation_rows(splits["val"], encoder.config)
    rows = range(len(val)) if is_last else subset
    values = {"eval_questions": len(rows), "eval_loss": split_loss(loss, val, encoder, ranks, rows, stop)}
    if len(subset) < len(rows):
        values["eval_subset_loss"] = split_loss(loss, val, encoder, ranks, subset, stop)
    if encoder.config.eval_max_samples:
        answered = answer_split(loss.model, val, encoder, ranks, rows, stop)
        values["eval_accuracy"] = sum(row["correct"] for row in answered) / len(answered)
    return values


def predict_split(loss, samples: SampleList, encoder: SampleEncoder, ranks: Ranks) -> list[dict]:
    """The rows of `generated_predictions.jsonl` of a whole split. All ranks: contains all_gathers."""
    if encoder.task.HAS_HEAD:
        return classify_split(loss, samples, encoder, ranks)
    return answer_split(loss.model, samples, encoder, ranks)


@torch.no_grad()
def classify_split(
    loss: ClassLoss, samples: SampleList, encoder: SampleEncoder, ranks: Ranks, stop=lambda: False
) -> list[dict]:
    """The classes of a split's documents, as rows of `tasks.cls.row` in the order of the file; every rank gets all of
    them. All ranks: contains all_gathers."""
    dataset = _dataset(samples, encoder, None, generation=True)
    found = []
    for batch in _rounds(dataset, encoder.config, ranks, stop, "classes"):
        if batch is not None:
            with _batch_fits(batch):
                logits = loss(to_device(batch, ranks.device), only_logits=True)
            found += zip(batch["rows"], logits.tolist(), batch["cut_tokens"].tolist(), strict=True)
    found = sorted(map(tuple, ranks.gather(found)))
    return [encoder.task.row(samples[row], encoder, output) for row, *output in found]


def _mean_cross_entropy(rows: list[dict]) -> float:
    logits = torch.tensor([row["logits"] for row in rows], dtype=torch.float64)
    return float(F.cross_entropy(logits, torch.tensor([row["true_label"] for row in rows])))


def answer_split(
    model,
    samples: SampleList,
    encoder: SampleEncoder,
    ranks: Ranks,
    rows: Sequence[int] | None = None,
    stop=lambda: False,
) -> list[dict]:
    """Greedy answers of a split, or of some of its rows, as rows of the task in the order of the file; every rank gets
    all of them. All ranks: contains all_gathers."""
    rows = range(len(samples)) if rows is None else rows
    if "turns" in samples[rows[0]]:
        return _answer_conversations(model, samples, encoder, ranks, rows, stop)
    answers = _answers(model, samples, encoder, ranks, rows, stop)
    return [encoder.task.row(samples[row], encoder, output) for row, *output in answers]


def _answers(model, samples, encoder, ranks, rows, stop) -> list[tuple[int, str, bool]]:
    """(row, answer, finished) of each row, in order, on every rank. All ranks: contains all_gathers."""
    config, tokenizer = encoder.config, encoder.tokenizer
    dataset = _dataset(samples, encoder, rows, generation=True)
    end_ids = {tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.convert_tokens_to_ids("<|endoftext|>")}
    answers = []
    for batch in _rounds(dataset, config, ranks, stop, "answers"):
        if batch is None:
            continue
        with _batch_fits(batch):
            tokens = greedy(model, to_device(batch, ranks.device), encoder.family, end_ids)
        for row, (ids, finished) in zip(batch["rows"], tokens, strict=True):
            answers.append((row, tokenizer.decode(ids, skip_special_tokens=True).strip(), finished))
    return [tuple(answer) for answer in sorted(ranks.gather(answers))]


def _answer_conversations(model, samples, encoder, ranks, rows, stop) -> list[dict]:
    """Sequential reasoning: all conversations take their first question, then their second, ... Only the model's own
    earlier answers are put in view of a question: the gold ones are not even in the samples that the prompts come from.
    """
    conversations = {row: samples[row] for row in rows}
    given: dict[int, list[tuple[str, bool]]] = {row: [] for row in rows}
    for turn in range(max(len(conversation["turns"]) for conversation in conversations.values())):
        active = [row for row in rows if turn < len(conversations[row]["turns"])]
        asked = [own_answers_only(conversations[row], [text for text, _ in given[row]]) for row in active]
        prompts = SampleList(asked, samples.source)
        for index, text, finished in _answers(model, prompts, encoder, ranks, range(len(active)), stop):
            given[active[index]].append((text, finished))
    return [
        encoder.task.row(question, encoder, output)
        for row in rows
        for question, output in zip(conversations[row]["turns"], given[row], strict=True)
    ]


def own_answers_only(conversation: dict, own: list[str]) -> dict:
    """The conversation up to the question after the model's own answers, without any gold answer."""
    turns = [{**turn, "answer": ""} for turn in conversation["turns"][: len(own) + 1]]
    for turn, text in zip(turns, own, strict=False):
        turn["answer"] = text.replace("<|", "< |")  # a spelt-out control token is text, and must stay so
    return {**conversation, "turns": turns}


# ------------------------------------------------------------------------------------------------------- greedy answers


class RoomyLayer(DynamicLayer):
    """Keys and values of a layer (rows, heads, tokens, size), each the used part of a buffer with room for tokens to
    come. transformers' own layer copies all of them for every new token: in full batches, a third of the weights' bytes
    (`bench/evaluation_speed.py --count`)."""

    def _make_room(self) -> None:
        used = self.get_seq_length()
        more = used // 4  # seldom too little, and little memory
        self.buffers = [F.pad(states, (0, 0, 0, more)) for states in (self.keys, self.values)]
        self._show(used)

    def _show(self, used: int) -> None:
        self.keys, self.values = (buffer[:, :, :used] for buffer in self.buffers)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        used = self.get_seq_length()
        end = used + key_states.shape[2]
        if not used or end > self.buffers[0].shape[2]:
            super().update(key_states, value_states)
            self._make_room()
        else:
            for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
                buffer[:, :, used:end] = states
            self._show(end)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._make_room()


def answers_cache(model: nn.Module) -> DynamicCache:
    """Recurrent layers keep transformers' own, which stays empty: see `recurrent`."""
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def greedy(model: nn.Module, batch: dict, family: Family, end_ids: set[int], max_new_tokens: int = MAX_NEW_TOKENS):
    """Greedy answers of a collated batch of prompts, on the batch's device.

    Returns a list over the batch's items of (token ids without the end token, finished); not finished: cut off after
    max_new_tokens. Every slot (row, question) advances on its own, so the answers do not depend on the batching.
    """
    with adapter_in_the_bases_type(model), torch.inference_mode():
        return _greedy(model, batch, family, end_ids, max_new_tokens)


def _greedy(model, batch, family, end_ids, max_new_tokens) -> list[tuple[list[int], bool]]:
    slots, count = batch["slots"], len(batch["sample_ids"])
    width, device = slots.shape[1], slots.device
    cache = answers_cache(model)
    # Recurrent layers cache no keys: each question's own state, also of rows that share nothing, where padding follows.
    recurrent = {"forked_rows": forked_rows(batch, keep_states=True)} if family.is_recurrent else {}
    places = batch["last_tokens"]
    logits = forward_logits(model, batch, family, places, use_cache=True, past_key_values=cache, **recurrent)
    item = torch.where(slots < 0, count, slots)  # (rows, width); `count` where a slot is empty

    def in_slots(of_items: torch.Tensor) -> torch.Tensor:  # (..., items) -> (..., rows, width)
        padded = F.pad(of_items, (0, 1))
        return padded.index_select(-1, item.flatten()).unflatten(-1, item.shape)

    token = in_slots(logits.argmax(-1))
    next_position = in_slots(batch["position_ids"].flatten(1).index_select(1, places) + 1)  # (3, rows, width)
    segment = torch.arange(1, width + 1, device=device, dtype=torch.int32).expand_as(slots)
    key_segment = batch["segments"]  # of every token in the cache
    ends = torch.tensor(sorted(end_ids)).to(device)
    running = (slots >= 0) & ~torch.isin(token, ends)
    answers = ends[0].repeat(max_new_tokens, count + 1)  # an answer that has ended goes on with end tokens
    answers[0].scatter_(0, item.flatten(), token.flatten())
    for step in range(1, max_new_tokens):
        unfinished = [many for many in running.sum(1).tolist() if many]  # the one wait of a step
        if not unfinished:
            break
        if 2 * len(unfinished) * max(unfinished) <= running.numel():
            # Rows that have ended leave, and so do columns: the cache is copied, so not at every end.
            rows = running.any(1).nonzero().flatten()
            columns = running[rows].int().argsort(dim=1, descending=True, stable=True)[:, : max(unfinished)]
            for layer in cache.layers:
                if hasattr(layer, "batch_select_indices"):  # recurrent layers' hold nothing, see `recurrent`
                    layer.batch_select_indices(rows)
            for forked in recurrent.values():
                forked.select(rows, columns)
            key_segment = key_segment[rows]
            token, segment, item, running = (x[rows].gather(1, columns) for x in (token, segment, item, running))
            next_position = next_position[:, rows].gather(2, columns.expand(3, -1, -1))
        key_segment = torch.cat([key_segment, segment], dim=1)
        # A token sees the prefix (0) and everything of its own question, which is itself and tokens before it.
        mask = (key_segment[:, None, None, :] == 0) | (key_segment[:, None, None, :] == segment[:, None, :, None])
        inputs = {"attention_mask": mask, **recurrent}
        if family.has_vision:
            inputs["shared_rows"] = shared_rows(model, segment, mask, logits.dtype, prefix=0, path="two_part")
        output = model(input_ids=token, position_ids=next_position, past_key_values=cache, use_cache=True, **inputs)
        token = output.logits.argmax(-1)
        next_position = next_position + 1
        answers[step].scatter_(0, item.flatten(), torch.where(running, token, ends[0]).flatten())
        running &= ~torch.isin(token, ends)
    results = []
    for tokens in answers[:, :count].T.tolist():
        end = next((place for place, token in enumerate(tokens) if token in end_ids), len(tokens))
        results.append((tokens[:end], end < len(tokens)))
    return results
