"""Sample files become tokenised questions: what the model is asked in training is what it is asked at inference."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import shared_data
from support.tiny_runs import FAMILIES, TinyRun, build_items, tiny_run, vqa_samples, write_images
from transformers import AutoImageProcessor

import dataset as dataset_module
from batches import BatchPlan, collate
from dataset import EvalDataset, StepDataset, load
from errors import UserError
from samples import SampleList
from templates import CHAT_OPTIONS, IGNORE, ULTRA_CONDENSED

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("name", FAMILIES)
def test_positions_equal_the_models_own_get_rope_index(tiny_models, tmp_path, name):
    run = tiny_run(tiny_models, name)
    sizes = {"wide.png": (190, 70), "tall.png": (64, 200), "square.png": (130, 130)}
    for image, size in sizes.items():
        write_images(tmp_path, [image], size=size)
    encoder = run.encoder(
        resize="native", image_size=None, max_pixels=60_000, data=replace(run.config.data, image_root=str(tmp_path))
    )
    samples = [{**vqa_samples(1, 1)[0], "image": shown} for shown in ([*sizes], ["tall.png"], [], ["wide.png"] * 2)]
    interleaved = "<image>Who?<image><image>"
    times = 1 if run.family.is_recurrent else 2  # its chat template takes one answer
    turns = [{"role": "user", "content": interleaved}, {"role": "assistant", "content": "me"}] * times
    samples.append({"id": "chat", "messages": turns, "images": ["tall.png", "wide.png", "square.png"] * times})
    items, images = build_items(encoder, samples)
    for item in items:
        ids = torch.from_numpy(item.input_ids)[None]
        grids = torch.tensor([(1, *images[path].grid) for path in item.images]) if item.images else None
        types = (ids == run.family.image_token_id).int()
        expected, _ = run.model().get_base_model().model.get_rope_index(ids, types, grids)
        assert torch.equal(torch.from_numpy(item.position_ids), expected[:, 0])


# ----------------------------------------------------------------------------------------------------------- encoding


@pytest.mark.parametrize(
    ("name", "tokenizer"), [("qwen3_vl", "tokenizers/qwen3-vl"), ("qwen2_5_vl", "tokenizers/qwen2.5-vl")]
)
@pytest.mark.parametrize("resize", ["letterbox", "native"])
def test_a_real_question_with_the_real_tokenizer_is_the_familys_own_prompt_and_the_labels_are_the_answer(
    tiny_models, tmp_path, name, tokenizer, resize
):
    folder = tiny_models.build(name, tokenizer_from=shared_data(tokenizer), hidden_size=16, layers=1, heads=2)
    run = TinyRun(folder, tmp_path / "run", name)
    root = shared_data("kvasir/kvasir-vqa")
    sample = {
        "id": "real",
        "image": "images/cl8k2u1po1dxr0832134h89bv.jpg",
        "question": "Where in the image is the abnormality?",
        "answer": "center; center-left; upper-center; upper-left",
        "candidates": ["center", "center-left", "upper-center", "upper-left"],
    }
    changes = {"image_size": 24 * run.family.factor} if resize == "letterbox" else {"image_size": None}
    encoder = run.encoder(resize=resize, data=replace(run.config.data, image_root=str(root)), **changes)
    image = encoder.load_image(sample["image"])
    item = encoder.encode(sample, [image])
    user = "Where in the image is the abnormality?\nCandidates: center; center-left; upper-center; upper-left"
    messages = [
        {"role": "system", "content": ULTRA_CONDENSED},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": user}]},
    ]
    text = run.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **CHAT_OPTIONS)
    tokens = image.grid[0] * image.grid[1] // 4
    if resize == "letterbox":
        assert tokens == 576
    else:
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        from PIL import Image

        theirs = processor(images=[Image.open(root / sample["image"])], return_tensors="pt")["image_grid_thw"]
        assert theirs.tolist() == [[1, *image.grid]]
    prompt = run.tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * tokens))["input_ids"]
    assert item.input_ids[: len(prompt)].tolist() == prompt
    assert encoder.encode(sample, [image], generation=True).input_ids.tolist() == prompt
    supervised = item.labels[item.labels != IGNORE]
    assert run.tokenizer.decode(supervised) == sample["answer"] + "<|im_end|>"
    assert (item.labels[: len(prompt)] == IGNORE).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_gold_answer_cannot_reach_a_prompt(tiny_models, name):
    run = tiny_run(tiny_models, name)
    chats = [
        {"id": "c", "images": ["0.png"], "messages": [{"role": "user", "content": "<image>Who?"}, assistant]}
        for assistant in ({"role": "assistant", "content": "SECRET"}, {"role": "assistant", "content": "other"})
    ]
    questions = [{**vqa_samples(1, 1)[0], "answer": answer} for answer in ("SECRET", "other", "much longer " * 9)]
    for variants in (chats, questions):
        prompts = [build_items(run.encoder(), [variant], generation=True)[0][0] for variant in variants]
        for prompt in prompts:
            assert "SECRET" not in run.tokenizer.decode(prompt.input_ids)
            assert prompt.input_ids.tolist() == prompts[0].input_ids.tolist()
            assert prompt.position_ids.tolist() == prompts[0].position_ids.tolist()
            assert (prompt.labels == IGNORE).all(), "and nothing of a prompt is supervised"


def test_a_prompt_is_the_training_sequence_up_to_the_answer(tiny_models):
    run = tiny_run(tiny_models, "qwen3_vl")
    samples = vqa_samples()
    training, prompts = (build_items(run.encoder(), samples, generation)[0] for generation in (False, True))
    for whole, prompt in zip(training, prompts, strict=True):
        length = len(prompt.input_ids)
        assert whole.input_ids[:length].tolist() == prompt.input_ids.tolist()
        assert whole.position_ids[:, :length].tolist() == prompt.position_ids.tolist()
        assert whole.labels[length] != IGNORE and (whole.labels[:length] == IGNORE).all()


def test_a_sample_longer_than_max_tokens_is_an_error_and_never_cut(tiny_models):
    run = tiny_run(tiny_models, "qwen3_vl")
    sample = vqa_samples(1, 1)[0]
    exact = len(build_items(run.encoder(), [sample])[0][0].input_ids)
    assert build_items(run.encoder(max_tokens=exact), [sample])
    with pytest.raises(UserError, match=rf"{exact} tokens \(16 of them image\) exceed max_tokens {exact - 1}; raise"):
        build_items(run.encoder(max_tokens=exact - 1), [sample])
    with pytest.raises(UserError, match="exceed max_tokens"):
        build_items(run.encoder(max_tokens=exact), [{**sample, "answer": "a very long answer " * 20}])


def test_max_pixels_below_the_models_own_least_size_bounds_small_images_too(tiny_models):
    encoder = tiny_run(tiny_models, "qwen3_vl").encoder(resize="native", image_size=None, max_pixels=4 * 32**2)
    assert encoder.family.factor == 32
    encoder.family = replace(encoder.family, min_pixels=64 * 32**2)
    for side in (32, 320):
        assert encoder.placement("", size=(side, side)).model_size == (64, 64)


def test_an_unknown_template_is_an_error_with_the_known_ones(tiny_models):
    with pytest.raises(UserError, match="'template' is 'ultra'; use one of ultra_condensed, "):
        tiny_run(tiny_models, "qwen3_vl").encoder(template="ultra")


# ------------------------------------------------------------------------------------------------ steps and evaluation


def steps_of(run, samples, batch, ranks, pass_tokens, order="random", **changes) -> list[list[dict]]:
    """[step][rank] -> what the rank loads"""
    plan = BatchPlan(len(samples), batch, 1, order, 0, [sample.get("image") for sample in samples])
    datasets = [
        StepDataset(SampleList(samples, "s"), run.encoder(**changes), True, plan, pass_tokens, rank, ranks)
        for rank in range(ranks)
    ]
    return [[dataset[step] for dataset in datasets] for step in range(plan.total_steps)]


@pytest.mark.parametrize(("ranks", "pass_tokens"), [(1, 1000), (1, 1), (2, 60), (3, 1000), (5, 1)])
def test_a_step_holds_the_same_questions_once_and_tells_their_places_however_it_is_cut(tiny_models, ranks, pass_tokens):
    run, samples = tiny_run(tiny_models, "qwen3_vl"), vqa_samples(3, 4)
    steps = steps_of(run, samples, batch=8, ranks=ranks, pass_tokens=pass_tokens)
    order = BatchPlan(12, 8, 1, "random", 0).epoch_order(0)
    told = []
    for step in steps:
        told += [sample_id for _, sample_id in sorted(place for rank in step for place in rank["sample_ids"])]
    assert told == [samples[row]["id"] for row in order]
    for step in steps:
        for rank in step:
            laid_out = [id for batch in rank["passes"] for id in batch["sample_ids"]]
            weighted = sum(batch["answer_tokens"] for batch in rank["passes"])
            assert sorted(laid_out) == sorted(id for _, id in rank["sample_ids"]) or (
                not weighted and len(laid_out) == 1
            )


def test_whole_images_go_to_ranks(tiny_models):
    run, samples = tiny_run(tiny_models, "qwen3_vl"), vqa_samples(3, 4)
    ((first, second),) = steps_of(run, samples, batch=12, ranks=2, pass_tokens=1000)
    images = [{id.partition("q")[0] for _, id in rank["sample_ids"]} for rank in (first, second)]
    assert sorted(map(len, images)) == [1, 2] and not images[0] & images[1]


def test_no_pass_is_larger_than_its_budget_but_for_one_row_that_is_longer_by_itself(tiny_models):
    run, samples = tiny_run(tiny_models, "qwen3_vl"), vqa_samples(3, 30)
    for budget in (40, 100, 300, 5000):
        ((rank,),) = steps_of(run, samples, batch=90, ranks=1, pass_tokens=budget)
        shapes = [batch["input_ids"].shape for batch in rank["passes"]]
        assert all(rows * length <= budget or rows == 1 for rows, length in shapes)
        assert all(int((batch["slots"] >= 0).sum()) == 1 for batch in rank["passes"]) or budget > 40
    assert len(rank["passes"]) == 1 or max(rows * length for rows, length in shapes) > 1000


def test_a_rank_without_a_question_in_the_last_small_step_gets_one_that_weighs_nothing(tiny_models):
    run = tiny_run(tiny_models, "qwen3_vl")
    last = [rank["passes"] for rank in steps_of(run, vqa_samples(1, 1), batch=3, ranks=3, pass_tokens=1)[-1]]
    assert [rank[0]["answer_tokens"] for rank in last] == [2, 0, 0]
    assert (last[2][0]["targets"] == IGNORE).all() and last[2][0]["patches"] is not None


def test_an_image_is_decoded_once_for_all_its_questions_in_a_step(tiny_models, monkeypatch):
    run, samples = tiny_run(tiny_models, "qwen3_vl"), vqa_samples(3, 4)
    plan = BatchPlan(12, 12, 1, "random", 0)
    encoder = run.encoder()
    decoded = []
    monkeypatch.setattr(encoder, "load_image", lambda path: decoded.append(path) or run.encoder().load_image(path))
    StepDataset(SampleList(samples, "s"), encoder, True, plan, 30, 0, 1)[0]
    assert sorted(decoded) == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_met_by_a_worker_is_one_line_with_file_and_row(tiny_models, tmp_path, workers):
    run = tiny_run(tiny_models, "qwen3_vl")
    write_images(tmp_path, ["0.png", "1.png"])
    (tmp_path / "1.png").write_bytes(b"no image")
    encoder = run.encoder(data=replace(run.config.data, image_root=str(tmp_path)))
    samples = SampleList(vqa_samples(2, 2), "train.json")
    dataset = StepDataset(samples, encoder, True, BatchPlan(4, 2, 1, "sequential", 0), 100, 0, 1)
    steps = load(dataset, range(2), workers, CPU)
    assert len(next(steps)["sample_ids"]) == 2
    with pytest.raises(UserError) as caught:
        next(steps)
    assert str(caught.value).startswith("train.json row 3 (id p1q0): image") and "\n" not in str(caught.value)


def test_workers_deliver_the_steps_in_order_and_the_same_as_without_them(tiny_models):
    run = tiny_run(tiny_models, "qwen3_vl")
    plan = BatchPlan(12, 5, 2, "random", 0)
    dataset = StepDataset(SampleList(vqa_samples(3, 4), "s"), run.encoder(), True, plan, 30, 0, 1)
    alone, with_workers = (list(load(dataset, range(6), workers, CPU)) for workers in (0, 2))
    for first, second in zip(alone, with_workers, strict=True):
        for a, b in zip(first["passes"], second["passes"], strict=True):
            assert a["sample_ids"] == b["sample_ids"] and torch.equal(a["input_ids"], b["input_ids"])
            assert torch.equal(a["patches"], b["patches"])


@pytest.mark.parametrize("eval_bs", [1, 3, 16])
def test_evaluation_asks_every_row_once_with_an_images_questions_side_by_side(tiny_models, eval_bs):
    run = tiny_run(tiny_models, "qwen3_vl")
    samples = [sample for question in range(4) for sample in vqa_samples(3, 4)[question::4]]  # images interleaved
    dataset = EvalDataset(SampleList(samples, "s"), run.encoder(), True, eval_bs, True)
    rows = [row for index in range(len(dataset)) for row in dataset[index]["rows"]]
    assert sorted(rows) == list(range(12)) and [samples[row]["image"] for row in rows] == sorted(
        sample["image"] for sample in samples
    )
    for index in range(len(dataset)):
        batch = dataset[index]
        assert batch["sample_ids"] == [samples[row]["id"] for row in batch["rows"]]


@pytest.mark.parametrize(("eval_bs", "cut", "expected"), [(8, False, [6, 6, 6]), (12, False, [12, 6]), (4, True, 6)])
def test_evaluation_cuts_no_image_that_fits_into_a_batch(tiny_models, eval_bs, cut, expected):
    run = tiny_run(tiny_models, "qwen3_vl")
    dataset = EvalDataset(SampleList(vqa_samples(3, 6), "s"), run.encoder(), True, eval_bs, True)
    assert len(dataset) == expected if cut else [len(batch) for batch in dataset.batches] == expected
    read = sum(len({row // 6 for row in batch}) for batch in dataset.batches)
    assert read == (6 if cut else 3), "images read"
    unshared = EvalDataset(SampleList(vqa_samples(3, 6), "s"), run.encoder(), False, eval_bs, True)
    assert len(unshared) == -(-18 // eval_bs)


def test_evaluation_of_some_rows_asks_just_these(tiny_models):
    run = tiny_run(tiny_models, "qwen3_vl")
    dataset = EvalDataset(SampleList(vqa_samples(), "s"), run.encoder(), True, 4, True, rows=[2, 3, 9])
    assert sorted(row for batch in dataset.batches for row in batch) == [2, 3, 9]


def test_the_collator_ships_bytes_for_pixels(tiny_models):
    items, images = build_items(tiny_run(tiny_models, "qwen3_vl").encoder(), vqa_samples(2, 2))
    batch = collate(items, images, True, 0)
    assert batch["patches"].dtype == torch.uint8 and batch["patches"].numel() == 2 * 128 * 128 * 3


def test_an_evaluation_batch_holds_as_many_questions_as_the_tokens_allow(tiny_models, monkeypatch):
    run = tiny_run(tiny_models, "qwen3_vl")
    samples = SampleList(vqa_samples(3, 6), "s")

    def sizes(tokens, share_prefix=True, eval_bs=None):
        monkeypatch.setattr(dataset_module, "EVAL_TOKENS", tokens)
        found = EvalDataset(samples, run.encoder(), share_prefix, eval_bs, True).batches
        assert sorted(row for batch in found for row in batch) == list(range(18))
        return [len(batch) for batch in found]

    assert sizes(100_000) == [18] and sizes(100_000, eval_bs=7) == [6, 6, 6]
    one = 16 + sum(len(json.dumps(sample)) // 4 for sample in vqa_samples(1, 6))  # an image has 16 tokens
    assert sizes(2 * one + 40) == [12, 6] and sizes(one + 40) == [6, 6, 6]
    assert sizes(1) == [1] * 18, "a question alone goes in whatever it has"
    assert len(sizes(one + 40, share_prefix=False)) > 3, "alone, each question has its image's tokens"


def test_one_large_image_among_small_ones_does_not_pad_an_evaluation_batch_beyond_its_tokens(tiny_models, monkeypatch):
    run = tiny_run(tiny_models, "qwen3_vl")
    samples = SampleList(vqa_samples(9, 1), "s")
    encoder = run.encoder()
    tokens_of = {path: 2_000 if path == "4.png" else 50 for path in (f"{n}.png" for n in range(9))}
    monkeypatch.setattr(EvalDataset, "_image_tokens", lambda self, images: tokens_of[images[0]])
    monkeypatch.setattr(dataset_module, "EVAL_TOKENS", 4_500)
    batches = EvalDataset(samples, encoder, True, None, True).batches
    assert [len(batch) for batch in batches] == [4, 2, 3]
    padded = [len(batch) * max(tokens_of[f"{row}.png"] for row in batch) for batch in batches]
    assert max(padded) <= 4_500
