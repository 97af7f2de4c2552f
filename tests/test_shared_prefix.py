"""Questions that share the tokens of their image: no loss, no gradient and no answer differs from standing alone."""

import pytest
import torch
import torch.nn.functional as F
from support.tiny_runs import (
    FAMILIES,
    build_items,
    largest_relative_difference,
    loss_and_gradients,
    tiny_run,
    vqa_samples,
)

import model as modeling
from batches import collate
from model import AnswerLoss, forward_logits
from templates import IGNORE


@pytest.fixture(params=FAMILIES)
def run(request, tiny_models):
    return tiny_run(tiny_models, request.param)


def chat(id: str, user: str, *images: str) -> dict:
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": "none; red"}]
    return {"id": id, "images": list(images), "messages": turns}


def groups_of_one_image() -> list[dict]:
    return vqa_samples(images=1, questions=4)


def several_groups() -> list[dict]:
    return vqa_samples(images=3, questions=4)


def several_images_a_sample() -> list[dict]:
    return vqa_samples(images=3, questions=3, images_each=2)


def mixture() -> list[dict]:
    """Groups of four, two and one, one image in several groups, text alone, and questions before their image."""
    samples = several_groups()
    return [
        samples[4],
        *samples[:4],
        *vqa_samples(images=1, questions=2, images_each=1),
        {**samples[8], "image": None, "images": ["2.png", "0.png"]},
        samples[9],
        {"id": "text", "question": "How many?", "answer": "3"},
        chat("before", "What is this?\n<image>", "1.png"),
        chat("before too", "Where is that?\n<image>", "1.png"),
        samples[5],
    ]


SETS = [groups_of_one_image, several_groups, several_images_a_sample, mixture]


def laid_out(run, samples, share_prefix: bool) -> dict:
    items, images = build_items(run.encoder(), samples)
    return collate(items, images, share_prefix, run.tokenizer.pad_token_id)


def losses(run, batch: dict, dtype=torch.float64) -> dict[str, float]:
    """Sample id -> the summed negative log-likelihood of its answer, in the batch it stands in."""
    keep = batch["targets"] != IGNORE
    with torch.no_grad():
        logits = forward_logits(run.model(dtype), batch, run.family, batch["supervised"])
    nll = torch.zeros(keep.shape, dtype=dtype)
    nll[keep] = F.cross_entropy(logits, batch["targets"][keep], reduction="none")
    found = {}
    for row, items in enumerate(batch["slots"].tolist()):
        for segment, item in enumerate(items, 1):
            if item >= 0:
                found[batch["sample_ids"][item]] = nll[row][batch["segments"][row] == segment].sum().item()
    return found


def assert_same_losses(first: dict, second: dict, ids) -> None:
    for id in ids:
        assert first[id] == pytest.approx(second[id], rel=1e-9), id


# ----------------------------------------------------------------------------------------------- shared equals alone


@pytest.mark.parametrize("path", ["mask", "two_part"])
@pytest.mark.parametrize("samples", SETS)
def test_shared_and_unshared_have_the_same_loss_and_the_same_gradient_of_every_adapter_tensor(
    run, samples, path, monkeypatch
):
    monkeypatch.setenv("SHARED_ATTENTION", path)
    loss = AnswerLoss(run.model(), run.family)
    alone, shared = (loss_and_gradients(loss, laid_out(run, samples(), share)) for share in (False, True))
    assert shared[0] == pytest.approx(alone[0], rel=1e-6)
    linear_layers = 3 * 8 + 7 if run.family.is_recurrent else 2 * 7
    assert len(alone[1]) == 2 * linear_layers, "two halves of an adapter on each of them"
    # The recurrent layers' chunks of tokens fall elsewhere, and each is summed in float32.
    assert largest_relative_difference(alone[1], shared[1]) < (1e-4 if run.family.is_recurrent else 1e-5)


def test_in_float64_the_difference_is_rounding_alone(run):
    loss = AnswerLoss(run.model(torch.float64), run.family)
    alone, shared = (loss_and_gradients(loss, laid_out(run, mixture(), share)) for share in (False, True))
    assert shared[0] == pytest.approx(alone[0], rel=1e-13)
    assert largest_relative_difference(alone[1], shared[1]) < 1e-11


@pytest.mark.parametrize("autocast", [False, True])
def test_in_the_types_of_a_gpu_the_difference_is_bfloat16s_rounding(run, autocast):
    """A base in bfloat16, or float32 weights under autocast, where queries and keys reach the attention in float32."""
    loss = AnswerLoss(run.model(torch.float32 if autocast else torch.bfloat16), run.family)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        alone, shared = (loss_and_gradients(loss, laid_out(run, several_groups(), share)) for share in (False, True))
    assert shared[0] == pytest.approx(alone[0], rel=2e-3)
    assert largest_relative_difference(alone[1], shared[1]) < 5e-2


def test_sharing_really_shares(run):
    shared, alone = (laid_out(run, several_groups(), share) for share in (True, False))
    assert len(shared["input_ids"]) == 3 and len(alone["input_ids"]) == 12
    assert (shared["segments"] >= 0).sum() < 0.5 * (alone["segments"] >= 0).sum()


def test_every_question_has_the_loss_it_has_alone(run):
    shared = losses(run, laid_out(run, mixture(), True))
    for sample in mixture():
        alone = losses(run, laid_out(run, [sample], True))
        assert_same_losses(shared, alone, [sample["id"]])


def test_a_group_cut_between_passes_adds_up_to_the_whole(run):
    loss = AnswerLoss(run.model(torch.float64), run.family)
    samples = several_groups()
    whole, whole_gradients = loss_and_gradients(loss, laid_out(run, samples, True))
    parts = [loss_and_gradients(loss, laid_out(run, samples[i : i + 5], True)) for i in range(0, 12, 5)]
    assert sum(value for value, _ in parts) == pytest.approx(whole, rel=1e-13)
    summed = {name: sum(gradients[name] for _, gradients in parts) for name in whole_gradients}
    assert largest_relative_difference(whole_gradients, summed) < 1e-11


# ------------------------------------------------------------------------------------------ nobody hears the neighbour


def test_changing_one_question_or_answer_changes_no_other_questions_loss(run):
    samples = several_groups()
    before = losses(run, laid_out(run, samples, True))
    others = [sample["id"] for sample in samples if sample is not samples[1]]
    for change in (
        {"question": "How many polyps are there?"},
        {"question": "Q?" * 30},
        {"answer": "center; upper-left; none"},
        {"candidates": ["red", "yellow"]},
    ):
        changed = [samples[0], {**samples[1], **change}, *samples[2:]]
        after = losses(run, laid_out(run, changed, True))
        assert after["p0q1"] != pytest.approx(before["p0q1"], rel=1e-6), "its own loss does change"
        assert_same_losses(before, after, others)


def test_the_order_of_the_questions_inside_a_group_is_irrelevant(run):
    samples = several_groups()
    before = losses(run, laid_out(run, samples, True))
    for order in ([3, 1, 0, 2], [1, 2, 3, 0], [0, 3, 2, 1]):
        shuffled = [samples[4 * group + place] for group in (1, 0, 2) for place in order]
        assert_same_losses(before, losses(run, laid_out(run, shuffled, True)), before)


@pytest.mark.parametrize("share_prefix", [True, False])
def test_padding_never_changes_a_loss(run, share_prefix):
    short = several_groups()[:2]
    long = {**several_groups()[4], "id": "long", "question": "Please look at it very closely. " * 20}
    alone = losses(run, laid_out(run, short, share_prefix))
    padded = laid_out(run, [*short, long], share_prefix)
    assert (padded["segments"] == -1).sum() > 50
    assert_same_losses(alone, losses(run, padded), alone)


def test_what_stands_in_the_padding_never_changes_a_loss(run):
    long = {**several_groups()[4], "id": "long", "question": "Please look at it very closely. " * 20}
    batch = laid_out(run, [*several_groups()[:2], long], True)
    before = losses(run, batch)
    padding = batch["segments"] == -1
    batch["input_ids"][padding] = run.tokenizer.convert_tokens_to_ids("red")
    batch["position_ids"][:, padding] = 77
    assert_same_losses(before, losses(run, batch), before)


# --------------------------------------------------------------------------------------------------- the known traps


def test_trap_positions_without_the_mask_let_questions_read_each_other(run):
    """Neither an error nor a warning: only the numbers are wrong."""
    batch = laid_out(run, groups_of_one_image(), True)
    right = losses(run, batch)
    batch["shared_prefix"] = None  # as if no question had a neighbour
    wrong = losses(run, batch)
    assert wrong["p0q0"] == pytest.approx(right["p0q0"], rel=1e-9), "the first question has nothing before it"
    for id in ("p0q1", "p0q2", "p0q3"):
        assert wrong[id] != pytest.approx(right[id], rel=1e-6)


def test_trap_four_rows_of_positions_without_a_mask_cut_questions_off_their_image(run):
    """transformers then takes the row for packed sequences, and a restarting position for the start of a new one."""
    batch = laid_out(run, groups_of_one_image(), True)
    right = losses(run, batch)
    batch["shared_prefix"] = None  # as if no question had a neighbour
    text_positions = batch["position_ids"].amax(0, keepdim=True)
    batch["position_ids"] = torch.cat([text_positions, batch["position_ids"]])
    wrong = losses(run, batch)
    for id in right:
        assert wrong[id] != pytest.approx(right[id], rel=1e-6)


def test_trap_a_mask_of_one_row_a_question_is_left_out_only_where_no_question_has_a_neighbour(run):
    for shared in (False, True):
        batch = laid_out(run, mixture(), shared)
        assert (batch["shared_prefix"] is not None) == shared == (int(batch["segments"].max()) > 1)


def test_the_mask_lets_a_token_see_the_prefix_and_its_own_question_up_to_itself():
    segments = torch.tensor([[0, 0, 1, 1, 2, -1]])
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
    ]
    assert modeling.attention_mask(segments)[0, 0, :5].int().tolist() == expected
