"""Which questions make a step is a pure function; how they lie in its rows changes no label and no position."""

import numpy as np
import pytest
import torch
from support.tiny_runs import END, FAMILIES, build_items, supervised_text, tiny_run, vqa_samples, write_images

from batches import BatchPlan, Item, collate, lay_out, passes, share_out
from dataset import SampleEncoder
from images import ModelImage
from templates import CONVERSATION_TEMPLATE, IGNORE, SYSTEM_PROMPTS, as_conversations

ORDERS = ["sequential", "random", "images"]


def plan(samples=23, batch=8, epochs=1.0, order="random", seed=0) -> BatchPlan:
    return BatchPlan(samples, batch, epochs, order, seed, image_of=[i // 3 for i in range(samples)])


def all_steps(a_plan: BatchPlan) -> list[list[int]]:
    return [a_plan.questions(step).tolist() for step in range(a_plan.total_steps)]


def joined(steps: list[list[int]]) -> list[int]:
    return [question for step in steps for question in step]


# -------------------------------------------------------------------------------------------------------- the plan


def test_images_are_shuffled_as_they_appear_in_the_file_and_their_questions_keep_its_order():
    images = np.random.default_rng(0).integers(-9, 9, 60)
    order = BatchPlan(60, 7, 2, "images", 5, image_of=images).epoch_order(1)
    rows_of: dict = {}
    for row, image in enumerate(images):
        rows_of.setdefault(image, []).append(row)
    shuffled = np.random.RandomState([5, 0, 1]).permutation(len(rows_of))
    assert order.tolist() == [row for image in shuffled for row in list(rows_of.values())[image]]


@pytest.mark.parametrize("order", ORDERS)
def test_every_question_is_asked_exactly_once_an_epoch(order):
    a_plan = plan(epochs=3, order=order)
    assert (a_plan.steps_per_epoch, a_plan.total_steps, a_plan.total_questions) == (3, 9, 69)
    for epoch in range(3):
        steps = all_steps(a_plan)[3 * epoch : 3 * epoch + 3]
        assert [len(step) for step in steps] == [8, 8, 7]
        assert sorted(joined(steps)) == list(range(23))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("epochs", "steps", "questions"), [(0.5, 2, 12), (2.5, 8, 58), (1.0, 3, 23), (0.01, 1, 1)])
def test_a_fraction_of_an_epoch_is_that_share_of_the_questions_rounded_up(order, epochs, steps, questions):
    a_plan, whole = plan(epochs=epochs, order=order), plan(epochs=3, order=order)
    trained = all_steps(a_plan)
    assert (a_plan.total_steps, a_plan.total_questions) == (steps, questions)
    assert sum(map(len, trained)) == questions
    flat = joined(trained)
    assert flat == joined(all_steps(whole))[: len(flat)], "the same questions as a longer run begins with"


@pytest.mark.parametrize("epochs", [0.1, 0.2, 0.3, 0.7, 1.1, 2.3])
def test_rounding_errors_of_the_fraction_add_no_question(epochs):
    assert plan(samples=100, epochs=epochs).total_questions == round(100 * epochs)


def test_exp2_takes_1926_steps_at_batch_64_and_its_siblings_7704_at_16():
    exp2 = BatchPlan(41_079, 64, 3, "sequential", 42)
    assert (exp2.steps_per_epoch, exp2.total_steps) == (642, 1_926)
    assert exp2.total_questions == 3 * 41_079 and len(exp2.questions(641)) == 41_079 - 641 * 64
    assert BatchPlan(41_079, 16, 3, "random", 42).total_steps == 7_704


def test_steps_can_be_asked_for_in_any_order_and_by_another_process():
    first, second = plan(epochs=3), plan(epochs=3)
    backwards = [second.questions(step).tolist() for step in reversed(range(9))]
    assert all_steps(first) == backwards[::-1]


def test_sequential_is_the_order_of_the_file_in_every_epoch():
    assert joined(all_steps(plan(epochs=2, order="sequential"))) == [*range(23), *range(23)]


@pytest.mark.parametrize("order", ["random", "images"])
def test_a_shuffled_order_differs_by_epoch_and_by_seed_and_is_not_that_of_the_file(order):
    epochs = [plan(samples=60, order=order).epoch_order(epoch).tolist() for epoch in range(3)]
    other = plan(samples=60, order=order, seed=1).epoch_order(0).tolist()
    orders = [*epochs, other, list(range(60))]
    assert len({tuple(o) for o in orders}) == len(orders)


def test_the_order_drawn_is_this_one_under_every_numpy():
    drawn = [plan(12, order=order, seed=seed).epoch_order(1).tolist() for order in ORDERS for seed in (42, 2**64 - 1)]
    assert drawn == [
        *[list(range(12))] * 2,
        [0, 7, 9, 3, 10, 5, 2, 4, 6, 1, 11, 8],
        [9, 5, 11, 7, 2, 8, 3, 1, 10, 6, 0, 4],
        [3, 4, 5, 6, 7, 8, 9, 10, 11, 0, 1, 2],
        [3, 4, 5, 6, 7, 8, 9, 10, 11, 0, 1, 2],
    ]


def test_order_images_keeps_an_images_questions_together_in_the_order_of_the_file():
    order = plan(order="images").epoch_order(0).tolist()
    runs = [order[0:1]]
    for question in order[1:]:
        if question // 3 == runs[-1][-1] // 3:
            runs[-1].append(question)
        else:
            runs.append([question])
    assert len(runs) == 8 and all(run == sorted(run) for run in runs)


def test_epochs_are_counted_by_the_questions_seen():
    half = plan(epochs=2.5)
    assert [half.epoch_at(step) for step in (0, 1, 3, 4, 6)] == [0, 8 / 23, 1, 31 / 23, 2]
    assert half.epoch_at(8) == 58 / 23, "the end of the half epoch, not of its last whole batch"
    assert plan(epochs=0.5, batch=64).epoch_at(1) == 12 / 23


# ------------------------------------------------------------------------------------------------ labels in the batch


def one_batch(encoder: SampleEncoder, samples, share_prefix: bool) -> dict:
    items, images = build_items(encoder, samples)
    return collate(items, images, share_prefix, encoder.tokenizer.pad_token_id)


def chats(run) -> list[dict]:
    """A question, and what LLaVA and ShareGPT files hold, over the same images; of one answer each for a family whose
    chat template rewrites earlier ones."""
    found = [
        {
            "id": "llava",
            "image": "0.png",
            "conversations": [
                {"from": "human", "value": "Is there a polyp?\n<image>"},
                {"from": "gpt", "value": "Yes"},
            ],
        },
        {
            "id": "sharegpt",
            "images": ["0.png", "1.png"],
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "<image>Who?"},
                {"role": "assistant", "content": " A polyp.\n"},
                {"role": "user", "content": "And <image>?"},
                {"role": "assistant", "content": "none"},
            ],
        },
        {"id": "text", "question": "How many?", "answer": "3"},
    ]
    return [chat for chat in found if not run.family.is_recurrent or chat["id"] != "sharegpt"]


def answers(sample: dict) -> list[str]:
    turns = sample.get("messages") or sample.get("conversations") or sample.get("turns") or [sample]
    said = [t.get("content", t.get("value", t.get("answer"))) for t in turns if "answer" in t or is_assistant(t)]
    return [text + END for text in said]


def is_assistant(turn: dict) -> bool:
    return turn.get("role", turn.get("from")) in ("assistant", "gpt")


@pytest.mark.parametrize("share_prefix", [False, True])
@pytest.mark.parametrize("template", SYSTEM_PROMPTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_decoded_labels_are_the_answers_and_their_end_tokens_and_nothing_else(
    tiny_models, name, template, share_prefix
):
    run = tiny_run(tiny_models, name)
    if template == CONVERSATION_TEMPLATE and run.family.is_recurrent:
        pytest.skip("its chat template takes one answer")
    samples = vqa_samples() if template != "sequential_cot" else list(as_conversations(vqa_samples()))
    samples += chats(run)
    batch = one_batch(run.encoder(template=template), samples, share_prefix)
    assert supervised_text(batch, run.tokenizer) == ["".join(answers(sample)) for sample in samples]
    assert batch["answer_tokens"] == int((batch["targets"] != IGNORE).sum())


# --------------------------------------------------------------------------------------------------- rows and columns


def unrolled(batch: dict) -> list[dict]:
    """Each item's own sequence, put together from its row: prefix, then its segment."""
    found = {}
    for row, items in enumerate(batch["slots"].tolist()):
        for segment, item in enumerate(items, 1):
            own = (batch["segments"][row] == 0) | (batch["segments"][row] == segment)
            if item >= 0:
                found[item] = {
                    "input_ids": batch["input_ids"][row][own].tolist(),
                    "targets": batch["targets"][row][own].tolist(),
                    "positions": batch["position_ids"][:, row][:, own].tolist(),
                }
    return [found[item] for item in range(len(found))]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_item_finds_its_own_tokens_positions_and_shifted_labels_in_the_rows(tiny_models, name):
    run = tiny_run(tiny_models, name)
    items, images = build_items(run.encoder(), [*vqa_samples(images_each=2), *vqa_samples(), *chats(run)])
    for share_prefix in (False, True):
        for item, sequence in zip(items, unrolled(collate(items, images, share_prefix, 0)), strict=True):
            assert sequence["input_ids"] == item.input_ids.tolist()
            assert sequence["positions"] == item.position_ids.tolist()
            assert sequence["targets"] == [*item.labels[1:].tolist(), IGNORE]


def test_a_shared_row_holds_the_image_once_and_a_row_for_each_image(tiny_models):
    run = tiny_run(tiny_models, "qwen3_vl")
    shared = one_batch(run.encoder(), vqa_samples(images=3, questions=4), True)
    alone = one_batch(run.encoder(), vqa_samples(images=3, questions=4), False)
    is_image = run.family.image_token_id
    assert shared["slots"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert (shared["input_ids"] == is_image).sum().item() == 3 * 16
    assert (alone["input_ids"] == is_image).sum().item() == 12 * 16
    assert shared["image_index"] == [0, 1, 2] and alone["image_index"] == [0] * 4 + [1] * 4 + [2] * 4
    for batch in (shared, alone):
        assert len(batch["patches"]) == 3 * 64 and batch["image_grid_thw"].tolist() == [[1, 8, 8]] * 3


def test_the_questions_of_an_image_share_a_row_wherever_they_stand_in_the_batch(tiny_models):
    run = tiny_run(tiny_models, "qwen3_vl")
    samples = vqa_samples(images=2, questions=2)
    mixed = [samples[0], samples[2], samples[1], samples[3], chats(run)[2]]
    assert one_batch(run.encoder(), mixed, True)["slots"].tolist() == [[0, 2], [1, 3], [4, -1]]


def test_questions_that_stand_before_the_image_fall_back_to_rows_of_their_own(tiny_models):
    """What they have in common ends before the image does, so that an image cannot be shared."""
    run = tiny_run(tiny_models, "qwen3_vl")
    first = chats(run)[0]
    other = {**first, "conversations": [{"from": "human", "value": "Where is it?\n<image>"}, first["conversations"][1]]}
    batch = one_batch(run.encoder(template="plain"), [first, other, *vqa_samples(images=1, questions=1)], True)
    assert batch["slots"].tolist() == [[0], [1], [2]]


def test_text_questions_never_share_however_alike_they_are(tiny_models):
    run = tiny_run(tiny_models, "qwen3_vl")
    batch = one_batch(run.encoder(), [chats(run)[2], chats(run)[2]], True)
    assert batch["slots"].tolist() == [[0], [1]] and "patches" not in batch


def test_the_same_question_twice_keeps_its_label_in_each(tiny_models):
    run = tiny_run(tiny_models, "qwen3_vl")
    sample = vqa_samples(images=1, questions=1)[0]
    batch = one_batch(run.encoder(), [sample, sample, {**sample, "answer": "blue"}], True)
    assert supervised_text(batch, run.tokenizer) == ["red" + END, "red" + END, "blue" + END]


def test_padding_is_in_no_segment_and_asks_for_nothing(tiny_models, tmp_path):
    write_images(tmp_path, ["0.png"])
    run = tiny_run(tiny_models, "qwen3_vl")
    batch = one_batch(run.encoder(), [*vqa_samples(1, 3), chats(run)[2]], True)
    padding = batch["segments"] == -1
    assert padding.any() and (batch["targets"][padding] == IGNORE).all()
    ends = [torch.nonzero(row >= 0).max().item() for row in batch["segments"]]
    assert all((row[: end + 1] >= 0).all() for row, end in zip(batch["segments"], ends, strict=True)), "only at the end"


# ------------------------------------------------------------------------------------------------------------ passes


def long_items(lengths: dict[str, list[int]]) -> list[Item]:
    """Questions (a text and one label) behind 900 image tokens. lengths: image -> text tokens of its questions."""
    items = []
    for image, texts in lengths.items():
        for text in texts:
            ids = np.concatenate([np.zeros(900, dtype=np.int64), np.arange(1, text + 1) + 1000 * len(items)])
            labels = np.where(np.arange(900 + text) < 900 + text - 1, IGNORE, ids)
            items.append(Item(f"{image}-{len(items)}", ids, labels, np.tile(ids, (3, 1)), (image,), 899))
    return items


def shape_of(part):
    """(rows, tokens with padding, share of padding) of a pass"""
    padded = len(part) * max(row.tokens for row in part)
    return len(part), padded, 1 - sum(row.tokens for row in part) / padded


def test_rows_of_like_length_fill_a_pass_together_and_unlike_ones_stand_apart():
    items = long_items({"a": [50] * 9, "b": [50] * 3, "c": [49] * 9, "d": [50] * 3, "e": [2] * 4, "f": [2] * 4})
    rows = lay_out(items, share_prefix=True)
    for budget, expected in ((1024, ["a", "c", "b", "d", "e", "f"]), (4096, ["ac", "bd", "ef"])):
        parts = passes(rows, budget)
        assert ["".join(items[row.items[0]].sample_id[0] for row in part) for part in parts] == expected
    assert all(shape_of(part)[2] < 0.02 for part in passes(rows, 4096))
    short = lay_out(long_items({"a": [60, 60], "b": [2, 2]}), True)  # 1,020 and 904 tokens
    assert len(passes(short, 4096)) == 1, "a pass that is not busy takes whatever fits"
    nine = lay_out(long_items({str(n): [9, 9] for n in range(9)}), True)
    assert [len(part) for part in passes(nine, 4096)] == [4, 4, 1]


@pytest.mark.parametrize("pass_tokens", [1, 1200, 4096, 10**6])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_every_question_is_laid_out_once_in_passes_within_the_budget(pass_tokens, world_size):
    lengths = {name: [20 + 7 * number] * (1 + 3 * number) for number, name in enumerate("abcdefg")}
    items = long_items(lengths | {"many": [40] * 300})
    items = items[::2] + items[1::2]
    shares = share_out(items, True, world_size)
    assert sorted(index for share in shares for index in share) == list(range(len(items))) and shares == share_out(
        items, True, world_size
    )
    for share in shares:
        own = [items[index] for index in share]
        rows = lay_out(own, True, pass_tokens)
        parts = passes(rows, pass_tokens)
        assert sorted(index for part in parts for row in part for index in row.items) == list(range(len(own)))
        for part in parts:
            count, padded, _ = shape_of(part)
            assert padded <= pass_tokens or (count == 1 and len(part[0].items) == 1)
    if world_size == 1:
        assert len(lay_out(items, True)) == 8, "a row an image where the budget allows it"


def test_whole_images_go_to_ranks_by_their_tokens_and_only_one_too_many_for_a_rank_is_parted():
    items = long_items({name: [30] * count for name, count in zip("abcdefgh", (9, 8, 7, 6, 5, 4, 3, 2), strict=True)})
    shares = share_out(items, True, 2)
    images = [{items[index].images for index in share} for share in shares]
    assert not images[0] & images[1] and len(images[0] | images[1]) == 8
    tokens = [sum(row.tokens for row in lay_out([items[index] for index in share], True)) for share in shares]
    assert min(tokens) / max(tokens) > 0.98
    alone = long_items({"a": [40] * 300})
    assert [len(share) for share in share_out(alone, True, 3)] == [100, 100, 100]


def test_a_pass_of_a_part_of_the_items_is_the_collation_of_those_items_alone():
    items = long_items({"a": [5, 6], "b": [7]})
    images = {name: ModelImage(name, np.zeros((1, 3), dtype=np.uint8), (2, 2), None) for name in "ab"}
    row = lay_out(items, True)[1]
    part, alone = collate(items, images, True, 0, [row]), collate(items[2:], images, True, 0)
    assert part.keys() == alone.keys()
    assert all(torch.equal(part[k], alone[k]) if torch.is_tensor(part[k]) else part[k] == alone[k] for k in alone)
