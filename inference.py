"""A split → its loss and its answers, shared out over all ranks. Used while training and by `evaluate.py`.

Greedy answers: an image is read once, and all its questions are answered from that cache. Questions of one image stand
in one row behind their shared prefix (see `batches.collate`). Each decoding step feeds one token per question; the mask
lets it see the prefix, its own question and its own answer.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from tqdm import tqdm

import clicks
from batches import last_tokens
from classification import ClassLoss
from config import Config
from dataset import EvalDataset, SampleEncoder, SampleList, load
from distributed import Ranks
from family import Family
from model import AnswerLoss, forward_logits, to_device
from report import metrics
from runlog import on_terminal
from templates import CONVERSATION_TEMPLATE, image_paths, split_answer, to_messages

MAX_NEW_TOKENS = 128  # the longest Kvasir-VQA answer, all nine places, has 44


class Stopped(Exception):
    """The ranks agreed to stop inside an evaluation; the run saves and ends, and evaluates again when it resumes."""


def _rounds(dataset: EvalDataset, config: Config, ranks: Ranks, stop: Callable[[], bool], title: str):
    """This rank's batches; None in a last round in which it has none left. All ranks: agrees on stopping each round."""
    mine = range(ranks.rank, len(dataset), ranks.world_size)
    rounds = -(-len(dataset) // ranks.world_size)
    batches = load(dataset, mine, config.dataloader_num_workers, ranks.device)
    for _ in tqdm(range(rounds), title, disable=not on_terminal(), leave=False):
        yield next(batches, None)
        if ranks.any(stop()):
            raise Stopped


@torch.no_grad()
def split_loss(
    loss: AnswerLoss, samples: SampleList, encoder: SampleEncoder, ranks: Ranks, stop=lambda: False
) -> float:
    """Mean negative log-likelihood (nats) per answer token of a split. All ranks: contains all_reduces."""
    dataset = EvalDataset(samples, encoder, encoder.config.share_prefix, encoder.config.eval_bs, generation=False)
    nll, tokens = 0.0, 0
    for batch in _rounds(dataset, encoder.config, ranks, stop, "loss"):
        if batch is not None:
            nll += float(loss(to_device(batch, ranks.device)))
            tokens += batch["answer_tokens"]
    nll, tokens = ranks.sum(nll, tokens)
    return nll / tokens


def selection_score(task: str, values: dict[str, float]) -> list[float]:
    """What decides which checkpoint is the best, of an evaluation on val: the greater list is the better one."""
    return [values["eval_accuracy"], -values["eval_loss"]] if task == "cls" else [-values["eval_loss"]]


def scores_while_training(loss, splits: dict[str, SampleList], encoder: SampleEncoder, ranks: Ranks, stop) -> dict:
    """Loss and accuracy on val (eval_loss, eval_accuracy); for cls on test too (test_loss, test_accuracy).

    Questions are answered up to `eval_max_samples`; the losses are of whole splits. All ranks: contains all_reduces."""
    config = encoder.config
    if config.task == "cls":
        values = {}
        for split, prefix in (("val", "eval"), ("test", "test")):
            if split in splits:
                lines = classify_split(loss, splits[split], encoder, ranks, stop)
                values[f"{prefix}_loss"] = _mean_cross_entropy(lines)
                values[f"{prefix}_accuracy"] = sum(line["correct"] for line in lines) / len(lines)
        return values
    values = {"eval_loss": split_loss(loss, splits["val"], encoder, ranks, stop)}
    if config.eval_max_samples:
        rows = range(min(config.eval_max_samples, len(splits["val"])))
        lines = answer_split(loss.model, splits["val"], encoder, ranks, rows, stop)
        values["eval_accuracy"] = sum(line["correct"] for line in lines) / len(lines)
    return values


@torch.no_grad()
def classify_split(
    loss: ClassLoss, samples: SampleList, encoder: SampleEncoder, ranks: Ranks, stop=lambda: False
) -> list[dict]:
    """The classes of a split's documents, as lines of `generated_predictions.jsonl` in the order of the file; every
    rank gets all of them. All ranks: contains all_gathers.

    Each line: id, images, logits, probabilities, predicted_label, true_label, correct, cut_tokens (of its text, at the
    end), and every other key of the sample."""
    dataset = EvalDataset(samples, encoder, encoder.config.share_prefix, encoder.config.eval_bs, generation=True)
    found = []
    for batch in _rounds(dataset, encoder.config, ranks, stop, "classes"):
        if batch is not None:
            logits = loss(to_device(batch, ranks.device), only_logits=True)
            found += zip(batch["rows"], logits.tolist(), batch["cut_tokens"].tolist(), strict=True)
    return [_class_line(samples[row], logits, cut) for row, logits, cut in sorted(map(tuple, ranks.gather(found)))]


def _mean_cross_entropy(lines: list[dict]) -> float:
    logits = torch.tensor([line["logits"] for line in lines], dtype=torch.float64)
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor([line["true_label"] for line in lines])))


def _class_line(sample: dict, logits: list[float], cut_tokens: int) -> dict:
    probabilities = torch.tensor(logits, dtype=torch.float64).softmax(0).tolist()
    predicted = max(range(len(logits)), key=lambda label: logits[label])
    line = {"id": sample["id"], "images": image_paths(sample), "logits": logits, "probabilities": probabilities}
    line |= {"predicted_label": predicted, "true_label": sample["label"], "correct": predicted == sample["label"]}
    line["cut_tokens"] = cut_tokens
    skipped = line.keys() | {"image"}
    return line | {key: value for key, value in sample.items() if key not in skipped}


def answer_split(
    model,
    samples: SampleList,
    encoder: SampleEncoder,
    ranks: Ranks,
    rows: Sequence[int] | None = None,
    stop=lambda: False,
) -> list[dict]:
    """Greedy answers of a split, or of some of its rows, as lines of `generated_predictions.jsonl` in the order of the
    file; every rank gets all of them. All ranks: contains all_gathers.

    Each line: id, images, question, answer (gold), prediction, correct, outside_candidates, cut_off (no end within the
    token limit), and every other key of the sample.
    """
    rows = range(len(samples)) if rows is None else rows
    if encoder.config.template == CONVERSATION_TEMPLATE:
        return _answer_conversations(model, samples, encoder, ranks, rows, stop)
    answers = _answers(model, samples, encoder, ranks, rows, stop)
    return [prediction_line(samples[row], encoder, text, finished) for row, text, finished in answers]


def _answers(model, samples, encoder, ranks, rows, stop) -> list[tuple[int, str, bool]]:
    """(row, answer, finished) of each row, in order, on every rank. All ranks: contains all_gathers."""
    config, tokenizer = encoder.config, encoder.tokenizer
    dataset = EvalDataset(samples, encoder, config.share_prefix, config.eval_bs, generation=True, rows=rows)
    end_ids = {tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.convert_tokens_to_ids("<|endoftext|>")}
    answers = []
    for batch in _rounds(dataset, config, ranks, stop, "answers"):
        if batch is None:
            continue
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
        prediction_line(question, encoder, text, finished)
        for row in rows
        for question, (text, finished) in zip(conversations[row]["turns"], given[row], strict=True)
    ]


def own_answers_only(conversation: dict, own: list[str]) -> dict:
    """The conversation up to the question after the model's own answers, without any gold answer."""
    turns = [{**turn, "answer": ""} for turn in conversation["turns"][: len(own) + 1]]
    for turn, text in zip(turns, own, strict=False):
        turn["answer"] = text.replace("<|", "< |")  # a spelt-out control token is text, and must stay so
    return {**conversation, "turns": turns}


def prediction_line(sample: dict, encoder: SampleEncoder, prediction: str, finished: bool) -> dict:
    """One line of `generated_predictions.jsonl`."""
    prompted = encoder.as_prompted(sample)
    prompt, gold = split_answer(to_messages(prompted, encoder.config.template))
    question = prompted.get("question") or _text_of(prompt[-1]["content"])
    line = {"id": sample["id"], "images": image_paths(sample), "question": question, "answer": gold}
    line["prediction"] = prediction
    if encoder.config.task == "click":
        line |= clicks.predicted(prediction, encoder.placement(line["images"][0]), encoder.family)
        line["correct"] = metrics.click_correct({**sample, **line})
    else:
        line["correct"] = metrics.answer_correct(line)
        line["outside_candidates"] = metrics.answer_outside_candidates({**sample, **line})
    line["cut_off"] = not finished
    skipped = line.keys() | {"image", "messages", "conversations"}
    return line | {key: value for key, value in sample.items() if key not in skipped}


def _text_of(content) -> str:
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text").strip()


# ------------------------------------------------------------------------------------------------------- greedy answers


@torch.inference_mode()
def greedy(model: nn.Module, batch: dict, family: Family, end_ids: set[int], max_new_tokens: int = MAX_NEW_TOKENS):
    """Greedy answers of a collated batch of prompts, on the batch's device.

    Returns a list over the batch's items of (token ids without the end token, finished); not finished: cut off after
    max_new_tokens. Every slot (row, question) advances on its own, so the answers do not depend on the batching.
    """
    from transformers import DynamicCache

    segments, positions, slots = batch["segments"], batch["position_ids"], batch["slots"]
    rows, width = slots.shape
    device = segments.device
    is_last = last_tokens(segments)
    used = slots >= 0  # (rows, width)
    cache = DynamicCache(config=model.config)
    output = forward_logits(model, batch, family, is_last, use_cache=True, past_key_values=cache)
    token = torch.zeros_like(slots)
    token[used] = output.logits.argmax(-1)
    next_position = torch.zeros(3, *slots.shape, dtype=torch.int64, device=device)
    next_position[:, used] = positions[:, is_last] + 1
    slot_segment = torch.arange(1, width + 1, device=device, dtype=segments.dtype).expand(rows, width)
    key_segment = segments  # of every token in the cache
    ends = torch.tensor(sorted(end_ids), device=device)
    running = used & ~torch.isin(token, ends)
    answers = [token]
    for _ in range(max_new_tokens - 1):
        if not running.any():
            break
        key_segment = torch.cat([key_segment, slot_segment], dim=1)
        # A token sees the prefix (0) and everything of its own question, which is itself and tokens before it.
        mask = (key_segment[:, None, None, :] == 0) | (key_segment[:, None, None, :] == slot_segment[:, None, :, None])
        output = model(
            input_ids=token, attention_mask=mask, position_ids=next_position, past_key_values=cache, use_cache=True
        )
        token = output.logits.argmax(-1)
        next_position = next_position + 1
        answers.append(torch.where(running, token, ends[0]))
        running &= ~torch.isin(token, ends)
    table = torch.stack(answers, dim=-1).tolist()
    results: list[tuple[list[int], bool]] = [([], False) for _ in batch["sample_ids"]]
    for row, items in enumerate(slots.tolist()):
        for column, item in enumerate(items):
            if item >= 0:
                tokens = table[row][column]
                end = next((i for i, value in enumerate(tokens) if value in end_ids), len(tokens))
                results[item] = (tokens[:end], end < len(tokens))
    return results
