"""Two processes give the numbers of one: losses, gradients, answers. (All in one start of two_ranks_worker.py.)"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.forked import start_forked
from support.tiny_runs import (
    CUTS,
    TRAINED,
    build_items,
    largest_relative_difference,
    loss_and_gradients,
    mixed_run,
    short_answers,
    step_gradients,
    steps_to_compare,
    tiny_run,
    vqa_samples,
)

from batches import collate
from distributed import Ranks
from inference import answer_split, split_loss
from model import AnswerLoss
from samples import SampleList

ALONE = Ranks(0, 1, torch.device("cpu"))


def on_ranks(world_size: int, results: Path, *arguments) -> list[dict]:
    """What each rank of two_ranks_worker.py found. arguments: the model's folder, and what goes behind `results`."""
    model, *others = arguments
    worker = start_forked("tests/support/two_ranks_worker.py", model, results, *others, ranks=world_size)
    text, _ = worker.communicate(timeout=600)
    assert worker.returncode == 0, text
    found = [json.loads((results / f"rank{rank}.json").read_text()) for rank in range(world_size)]
    return [{**f, "folder": results} for f in found]


@pytest.fixture(scope="module")
def two_ranks(tiny_models, tmp_path_factory) -> list[dict]:
    """What each of the two ranks found."""
    return on_ranks(2, tmp_path_factory.mktemp("two_ranks"), tiny_models["qwen3_vl"])


@pytest.fixture
def run(tiny_models):
    return tiny_run(tiny_models, "qwen3_vl")


# ------------------------------------------------------------------------------------------------ the ranks themselves


def test_each_process_knows_its_rank_and_the_run_says_how_many_there_are(two_ranks):
    assert [(f["rank"], f["world"]) for f in two_ranks] == [(0, 2), (1, 2)]
    assert two_ranks[0]["describe"] == "Running in distributed mode with 2 CPU processes (gloo)"


def test_sums_are_those_of_float64_and_the_same_on_both_ranks(two_ranks):
    expected = [(1 / 3) + (1 / 3 + 1), 2e16, 1.0, -(2.0**-59)]
    assert [f["sum"] for f in two_ranks] == [expected, expected]


def test_one_rank_is_enough_to_agree_on_a_flag(two_ranks):
    assert [f["any"] for f in two_ranks] == [[True, True, False, True]] * 2


def test_rows_are_collected_in_the_order_of_the_ranks_whatever_their_number_and_length(two_ranks):
    expected = [[0, "ünï 🙂", True], {"a": None}, [1, "x" * 5000, 0.1], 7, []]
    for found in two_ranks:
        assert found["gather"] == expected
        assert found["gather_from_one"] == ["only rank 1"] and found["gather_nothing"] == []


def test_a_rank_alone_needs_no_process_group():
    assert ALONE.sum(1, 2.5) == [1, 2.5] and ALONE.gather([3]) == [3] and ALONE.any(True) and not ALONE.any(False)
    ALONE.barrier()


# ------------------------------------------------------------------------------------------------- the training step


@pytest.mark.parametrize("name", ["eight", "eight_by_ones", "uneven", "one_question", "crowded"])
def test_loss_and_gradients_do_not_depend_on_how_a_step_is_cut_into_ranks_and_passes(two_ranks, run, name):
    """float64: one rank with all questions at once, one rank with many passes, and two ranks."""
    samples, pass_tokens = steps_to_compare()[name]
    whole, gradients = step_gradients(run, samples, 10**6, ALONE)
    cut, cut_gradients = step_gradients(run, samples, pass_tokens, ALONE)
    assert cut["answer_tokens"] == whole["answer_tokens"] == sum(f["losses"][name][1] for f in two_ranks) / 2
    assert cut["nll"] == pytest.approx(whole["nll"], rel=1e-12)
    assert sum(f["losses"][name][0] for f in two_ranks) == pytest.approx(whole["nll"], rel=1e-12)
    assert largest_relative_difference(gradients, cut_gradients) < 1e-10
    for rank in range(2):
        of_rank = load_file(two_ranks[0]["folder"] / f"{name}-rank{rank}.safetensors")
        assert largest_relative_difference(gradients, of_rank) < 1e-10


def test_the_gradient_is_that_of_the_mean_over_the_answer_tokens_of_the_whole_step(run):
    """Not the mean of means, which would weigh a short answer's tokens more than a long one's."""
    samples, _ = steps_to_compare()["eight"]
    _, gradients = step_gradients(run, samples, 2, ALONE)
    loss = AnswerLoss(run.model(torch.float64), run.family)
    items, images = build_items(run.encoder(), samples)
    batch = collate(items, images, False, run.tokenizer.pad_token_id)
    _, summed = loss_and_gradients(loss, batch)
    mean = {name: gradient / batch["answer_tokens"] for name, gradient in summed.items()}
    assert largest_relative_difference(mean, gradients) < 1e-10
    lengths = {len(sample["answer"]) for sample in samples}
    assert len(lengths) > 2, "answers of one length could not tell the two apart"


def assert_as_in_one_process(run, found: list[dict], trained: str, cuts) -> None:
    """found: what each rank says of its runs over mixed samples."""
    gradients, weights = mixed_run(run, trained, CUTS[-1], ALONE)
    with_vision = [any("visual" in name for name in step) for step in gradients]
    vision_is_trained = TRAINED[trained].get("projector_frozen") is False
    assert with_vision == [vision_is_trained, False, vision_is_trained, vision_is_trained]
    for pass_tokens in cuts:
        name = f"{trained}-{pass_tokens}"
        assert all(of_rank["mixed"][name] == found[0]["mixed"][name] for of_rank in found), "a rank stepped alone"
        for step, expected in enumerate([*gradients, weights]):
            on_ranks = load_file(found[0]["folder"] / f"{name}-{step}.safetensors")
            assert largest_relative_difference(expected, on_ranks) < 1e-10, (name, step)


def test_with_a_trained_vision_tower_ranks_whose_passes_hold_no_image_step_with_the_others(two_ranks, run):
    """Steps with images on both ranks, on none, and on one alone, the last step of the run among them."""
    assert_as_in_one_process(run, two_ranks, "everything", CUTS[:1])


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_whatever_is_trained_and_however_a_step_is_cut_the_ranks_step_as_one_process(
    tiny_models, tmp_path, run, world_size
):
    found = on_ranks(world_size, tmp_path, tiny_models["qwen3_vl"], ",".join(TRAINED))
    for trained in TRAINED:
        assert_as_in_one_process(run, found, trained, CUTS)


@pytest.mark.slow
def test_recurrent_layers_step_on_two_ranks_as_in_one_process(tiny_models, tmp_path):
    run = tiny_run(tiny_models, "qwen3_5")
    found = on_ranks(2, tmp_path, tiny_models["qwen3_5"], "adapter,everything")
    for trained in ("adapter", "everything"):
        assert_as_in_one_process(run, found, trained, CUTS)


@pytest.mark.slow
@pytest.mark.parametrize("trained", TRAINED)
def test_one_process_steps_alike_however_a_step_is_cut(run, trained):
    whole, weights = mixed_run(run, trained, CUTS[-1], ALONE)
    for pass_tokens in CUTS[:-1]:
        cut, cut_weights = mixed_run(run, trained, pass_tokens, ALONE)
        for expected, found in zip([*whole, weights], [*cut, cut_weights], strict=True):
            assert largest_relative_difference(expected, found) < 1e-10


def test_only_the_first_rank_checks_the_samples_after_it_has_locked_the_folder(two_ranks):
    told = "as far as this test goes"
    (source, locked), error = two_ranks[0]["checked"]
    assert source.endswith("train.json") and locked and error == told
    assert two_ranks[1]["checked"] == [told]


# ------------------------------------------------------------------------------------------------------- evaluation


def test_answers_are_the_same_on_one_and_two_ranks_in_batches_of_1_and_16_none_missing_or_double(two_ranks, run):
    samples = SampleList(vqa_samples(3, 3), "samples")
    with short_answers():
        expected = answer_split(run.model(), samples, run.encoder(eval_bs=1), ALONE)
        assert answer_split(run.model(), samples, run.encoder(eval_bs=16), ALONE) == expected
    assert [row["id"] for row in expected] == [sample["id"] for sample in samples]
    for found in two_ranks:
        for eval_bs in (1, 4, 16):
            assert found[f"answers_{eval_bs}"] == expected
        assert found["answers_of_rows"] == [expected[5]]


def test_the_loss_of_a_split_is_the_same_on_one_and_two_ranks_in_batches_of_any_size(two_ranks, run):
    samples = SampleList(vqa_samples(3, 3), "samples")
    expected = split_loss(AnswerLoss(run.model(), run.family), samples, run.encoder(eval_bs=1), ALONE)
    losses = [found[f"loss_{eval_bs}"] for found in two_ranks for eval_bs in (1, 4, 16)]
    assert losses == pytest.approx([expected] * 6, rel=1e-6)
    some = SampleList([samples[3], samples[5]], "samples")
    expected = split_loss(AnswerLoss(run.model(), run.family), some, run.encoder(), ALONE)
    assert [found["loss_of_rows"] for found in two_ranks] == pytest.approx([expected] * 2, rel=1e-6)


def test_a_request_to_stop_on_one_rank_ends_the_evaluation_on_both(two_ranks):
    assert [found["stopped"] for found in two_ranks] == [True, True]
