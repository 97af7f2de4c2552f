"""A split becomes one line a sample, in the order of the file, judged against the gold answer the model never saw."""

import math
from dataclasses import replace

import pytest
import torch
from support.tiny_runs import END, FAMILIES, build_items, short_answers, tiny_run, vqa_samples

import dataset
import evaluate
import inference
import tasks
from batches import collate
from distributed import Ranks
from errors import UserError
from inference import Stopped, answer_split, evaluation_rows, scores_while_training, split_loss
from model import AnswerLoss
from samples import SampleList

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def run(tiny_models):
    return tiny_run(tiny_models, "qwen3_vl")


@pytest.fixture
def say(run, monkeypatch):
    """Makes the model answer what a test wants: say({sample id: (text, finished)})."""

    def arrange(answers: dict):
        def answer(model, batch, *_):
            said = [answers[id] for id in batch["sample_ids"]]
            return [(run.tokenizer(text)["input_ids"], finished) for text, finished in said]

        monkeypatch.setattr(inference, "greedy", answer)

    return arrange


def answered(run, samples, **changes) -> list[dict]:
    return answer_split(run.model(), SampleList(samples, "s"), run.encoder(**changes), ALONE)


def test_lines_come_in_the_order_of_the_file_each_with_its_own_answer(run, say):
    samples = [sample for question in range(4) for sample in vqa_samples(3, 4)[question::4]]  # images interleaved
    say({sample["id"]: (f"answer of {sample['id']}", True) for sample in samples})
    lines = answered(run, samples, eval_bs=5)
    assert [(line["id"], line["prediction"]) for line in lines] == [
        (sample["id"], f"answer of {sample['id']}") for sample in samples
    ]


def test_a_line_says_what_was_asked_answered_and_expected_and_keeps_every_other_key(run, say):
    sample = {**vqa_samples(1, 1)[0], "source": "Polyps", "note": {"by": ["a", 1]}}
    say({sample["id"]: (" Red ", True)})
    assert answered(run, [sample]) == [
        {
            "id": "p0q0",
            "images": ["0.png"],
            "question": "What color is finding 0?",
            "answer": "red",
            "prediction": "Red",
            "correct": True,
            "outside_candidates": False,
            "cut_off": False,
            "candidates": ["red", "blue", "green", "none"],
            "multi_label": True,
            "stage": 1,
            "group": "0",
            "source": "Polyps",
            "note": {"by": ["a", 1]},
        }
    ]


@pytest.mark.parametrize(
    ("prediction", "finished", "correct", "outside", "cut_off"),
    [
        ("green;  BLUE", True, True, False, False),
        ("blue", True, False, False, False),
        ("blue; green; violet", True, False, True, False),
        ("", True, False, False, False),
        ("blue; green", False, True, False, True),
    ],
)
def test_an_answer_is_judged_as_a_set_of_items(run, say, prediction, finished, correct, outside, cut_off):
    sample = {**vqa_samples(1, 1)[0], "answer": "blue; green"}
    say({sample["id"]: (prediction, finished)})
    (line,) = answered(run, [sample])
    assert (line["correct"], line["outside_candidates"], line["cut_off"]) == (correct, outside, cut_off)


def test_an_answer_without_an_end_is_cut_off_and_says_so(run):
    with short_answers(3):
        lines = answered(run, vqa_samples(1, 2))
    assert [line["cut_off"] for line in lines] == [True, True]


def test_a_chat_is_answered_at_its_last_turn_and_the_scores_say_so(run, say, monkeypatch):
    chat = {
        "id": "c",
        "images": ["0.png"],
        "messages": [
            {"role": "user", "content": "<image>Who?"},
            {"role": "assistant", "content": "A polyp."},
            {"role": "user", "content": "Where?"},
            {"role": "assistant", "content": "center"},
        ],
    }
    say({"c": ("center", True)})
    (line,) = answered(run, [chat])
    assert (line["question"], line["answer"], line["correct"]) == ("Where?", "center", True)
    assert "messages" not in line and line["gold_answers_in_view"] == 1
    alone = {key: value for key, value in line.items() if key != "gold_answers_in_view"}
    monkeypatch.setattr("tasks.vqa.majority_answers_for", lambda questions, config: {})
    assert tasks.vqa.score([line, alone], run.config)["last_turns"] == 1
    assert any("gold earlier ones in view" in row for row in evaluate.table({"last_turns": 1}))


def test_control_tokens_that_a_model_says_are_no_part_of_the_answer(run, monkeypatch):
    ids = run.tokenizer(f"red{END}", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(inference, "greedy", lambda model, batch, *_: [(ids, True)])
    assert answered(run, vqa_samples(1, 1))[0]["prediction"] == "red"


@pytest.mark.parametrize("name", FAMILIES)
def test_predictions_do_not_depend_on_the_gold_answers(tiny_models, name):
    run = tiny_run(tiny_models, name)
    samples = vqa_samples(2, 2)
    other_gold = [{**sample, "answer": "SECRET " * (i + 1)} for i, sample in enumerate(samples)]
    with short_answers():
        first, second = (answered(run, variant, eval_bs=3) for variant in (samples, other_gold))
    assert [line["prediction"] for line in first] == [line["prediction"] for line in second]


def test_an_answer_ends_at_either_of_the_two_end_tokens(run, monkeypatch):
    """Some models end with <|endoftext|>, which is also what they were padded with."""
    ids = {token: run.tokenizer.convert_tokens_to_ids(token) for token in (END, "<|endoftext|>")}
    asked = []
    monkeypatch.setattr(
        inference, "greedy", lambda model, batch, family, end_ids: asked.append(end_ids) or [([], True)] * 2
    )
    answered(run, vqa_samples(1, 2))
    assert asked == [set(ids.values())] and len(asked[0]) == 2


def test_some_rows_alone_get_the_answers_they_get_among_all(run):
    samples = SampleList(vqa_samples(2, 3), "s")
    with short_answers():
        everything = answer_split(run.model(), samples, run.encoder(), ALONE)
        some = answer_split(run.model(), samples, run.encoder(), ALONE, rows=range(1, 4))
    assert some == everything[1:4]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_of_a_split_is_the_mean_over_all_its_answer_tokens(tiny_models, name):
    run = tiny_run(tiny_models, name)
    samples = vqa_samples(3, 4)
    items, images = build_items(run.encoder(), samples)
    batch = collate(items, images, False, run.tokenizer.pad_token_id)
    loss = AnswerLoss(run.model(), run.family)
    with torch.no_grad():
        expected = float(loss(batch)) / batch["answer_tokens"]
    for eval_bs, share_prefix in ((1, True), (5, True), (16, False)):
        encoder = run.encoder(eval_bs=eval_bs, share_prefix=share_prefix)
        assert split_loss(loss, SampleList(samples, "s"), encoder, ALONE) == pytest.approx(expected, rel=1e-5)
    assert 0 < expected < 3 * math.log(run.model().config.get_text_config().vocab_size)


def test_the_loss_of_a_split_leaves_no_gradients_behind(run):
    split_loss(AnswerLoss(run.model(), run.family), SampleList(vqa_samples(1, 2), "s"), run.encoder(), ALONE)
    assert all(parameter.grad is None for parameter in run.model().parameters())
    assert torch.is_grad_enabled()


def test_a_request_to_stop_ends_the_evaluation_after_the_batch_at_hand(run, say):
    samples = vqa_samples(3, 4)
    say({sample["id"]: ("x", True) for sample in samples})
    asked = iter([False, True])
    with pytest.raises(Stopped):
        answer_split(run.model(), SampleList(samples, "s"), run.encoder(eval_bs=4), ALONE, stop=lambda: next(asked))
    with pytest.raises(StopIteration):
        next(asked)


def test_without_the_image_the_same_questions_are_asked_in_words_alone(run, say, monkeypatch):
    seen = []

    def record(model, batch, *_):
        seen.append(batch)
        return [([], True) for _ in batch["sample_ids"]]

    monkeypatch.setattr(inference, "greedy", record)
    lines = answered(run, vqa_samples(2, 2), image="none")
    assert all("patches" not in batch for batch in seen)
    assert not any((batch["input_ids"] == run.family.image_token_id).any() for batch in seen)
    assert [line["images"] for line in lines] == [["0.png"], ["0.png"], ["1.png"], ["1.png"]], "what was not shown"


def test_a_prediction_line_does_not_need_the_model(run):
    line = tasks.vqa.row(vqa_samples(1, 1)[0], run.encoder(), ("red", True))
    assert line["correct"] and list(line)[:5] == ["id", "images", "question", "answer", "prediction"]


# ------------------------------------------------------------------------------------------------------ while training


def rows_by_image(samples) -> dict[str, set[int]]:
    images: dict = {}
    for row, sample in enumerate(samples):
        images.setdefault(sample["image"], set()).add(row)
    return images


@pytest.mark.parametrize("most", [1, 7, 30, 31, 89, 90, 1000])
def test_while_training_whole_images_are_scored_as_many_as_eval_max_samples_holds(run, most):
    samples = [{"id": f"{i}-{q}", "image": f"{i}.png"} for q in range(9) for i in range(10)]
    rows = set(evaluation_rows(SampleList(samples, "s"), replace(run.config, eval_max_samples=most)))
    assert all(of_image <= rows or not of_image & rows for of_image in rows_by_image(samples).values())
    assert len(rows) == max(9, min(90, most // 9 * 9)), "at least one image"


def test_the_seed_and_the_split_choose_what_is_scored_while_training_and_nothing_else(run):
    samples = SampleList([{"id": str(i), "image": f"{i // 3}.png"} for i in range(60)], "s")

    def chosen(**changes):
        return evaluation_rows(samples, replace(run.config, **{"eval_max_samples": 12, **changes}))

    assert chosen() == chosen(image="none", eval_bs=1, train_bs=9, share_prefix=False, learning_rate=1.0)
    assert chosen() != chosen(seed=7) and chosen() != list(range(12))
    assert chosen(eval_max_samples=0) == list(range(60)), "the loss of all, and no answers"


@pytest.fixture
def scored(run, monkeypatch):
    """scored(is_last, **changes) -> (values, rows of each loss, rows that were answered)."""

    def score(is_last, **changes):
        losses, answers = [], []
        monkeypatch.setattr(inference, "split_loss", lambda *args: losses.append(list(args[4])) or float(len(args[4])))
        monkeypatch.setattr(inference, "answer_split", lambda *args: answers.append(list(args[4])) or [{"correct": 1}])
        encoder = run.encoder(eval_max_samples=4, **changes)
        loss = AnswerLoss(run.model(), run.family)
        val = SampleList(vqa_samples(3, 4), "val")
        return scores_while_training(loss, {"val": val}, encoder, ALONE, lambda: False, is_last), losses, answers

    return score


def test_every_evaluation_scores_the_same_questions_and_the_last_one_all(run, scored):
    subset = evaluation_rows(SampleList(vqa_samples(3, 4), "val"), replace(run.config, eval_max_samples=4))
    assert scored(False)[1:] == scored(False)[1:] == ([subset], [subset])
    values, losses, answers = scored(True)
    assert losses == [list(range(12)), subset] and answers == [list(range(12))]
    assert (values["eval_questions"], values["eval_loss"], values["eval_subset_loss"]) == (12, 12.0, 4.0)


def test_the_best_is_chosen_among_losses_of_the_same_questions(scored):
    before, last = scored(False)[0], scored(True)[0]
    assert "eval_subset_loss" not in before
    assert tasks.vqa.selection_score(before) == tasks.vqa.selection_score(last) == [-4.0]


@pytest.mark.parametrize(("questions", "cure"), [(4, "set eval_bs=2"), (1, "evaluate on a GPU with more memory")])
def test_an_evaluation_that_runs_out_of_memory_says_what_to_set(tiny_models, monkeypatch, questions, cure):
    def too_much(*arguments, **options):
        raise torch.OutOfMemoryError

    run = tiny_run(tiny_models, "qwen3_vl")
    samples = SampleList(vqa_samples(1, questions), "s")
    monkeypatch.setattr(inference, "greedy", too_much)
    message = rf"out of memory on an evaluation batch of {questions} questions \(1 rows of \d+ tokens\); {cure}$"
    with pytest.raises(UserError, match=message):
        answer_split(run.model(), samples, run.encoder(), ALONE)
    with pytest.raises(UserError, match=message):
        split_loss(too_much, samples, run.encoder(), ALONE)


def test_batches_are_cut_once_for_loss_and_answers_of_all_evaluations(run, monkeypatch):
    encoder, read = run.encoder(eval_max_samples=4), []
    size_only = encoder.size_only
    encoder.size_only = lambda path: read.append(path) or size_only(path)
    loss, val = AnswerLoss(run.model(), run.family), SampleList(vqa_samples(3, 4), "val")
    with short_answers(2):
        first, second = (scores_while_training(loss, {"val": val}, encoder, ALONE, lambda: False) for _ in range(2))
    assert first == second and len(read) == 1, "the header of the one image that is scored"


def test_a_batch_of_answers_holds_a_bounded_number_of_recurrent_states_and_one_of_the_loss_has_none(
    tiny_models, monkeypatch
):
    run = tiny_run(tiny_models, "qwen3_5")
    monkeypatch.setattr(dataset, "EVAL_STATES", 8 * run.family.state_bytes)
    val, encoder = SampleList(vqa_samples(3, 4), "val"), run.encoder()
    answered, scored = (inference._dataset(val, encoder, None, generation) for generation in (True, False))
    assert all(answered[index]["slots"].numel() <= 8 for index in range(len(answered)))
    assert len(scored) == 1 < len(answered)
