"""Compiled decoder layers: the same numbers, in few forms however many shapes a run meets."""

import random
from dataclasses import replace

import pytest
import torch
from support.tiny_runs import (
    FAMILIES,
    largest_relative_difference,
    loss_and_gradients,
    tiny_run,
    vqa_samples,
    write_config,
)

import model as modeling
from batches import BatchPlan
from config import load_config
from dataset import StepDataset
from errors import UserError
from model import AnswerLoss, compile_layers, compiled_so_far, text_layers
from samples import SampleList

CPU = torch.device("cpu")
MOST_FORMS = 6


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch._dynamo.utils.compilation_time_metrics.clear()
    yield
    torch._dynamo.reset()


def passes_of_many_shapes(run, count: int) -> list[dict]:
    """Each with another number of rows and tokens: one row and several, alone and behind shared prefixes."""
    chosen, passes, shapes = random.Random(0), [], set()
    while len(passes) < count:
        samples = vqa_samples(chosen.randint(1, 3), chosen.choice([1, 1, 2, 4, 7]))
        samples = [{**sample, "question": sample["question"] + " word" * chosen.randrange(40)} for sample in samples]
        plan = BatchPlan(len(samples), len(samples), 1, "sequential", 0)
        for batch in StepDataset(SampleList(samples, "s"), run.encoder(), True, plan, 100_000, 0, 1)[0]["passes"]:
            if batch["input_ids"].shape not in shapes:
                shapes.add(batch["input_ids"].shape)
                passes.append(batch)
    kinds = {(len(batch["slots"]) > 1, batch["shared_prefix"] is None) for batch in passes}
    assert count < 40 or kinds == {(False, False), (True, False), (True, True)}
    return passes


def compiled(run, backend: str, **changes) -> tuple[AnswerLoss, AnswerLoss]:
    """(as it is, compiled): two losses of the same weights."""
    losses = []
    for _ in range(2):
        losses.append(AnswerLoss(run.fresh_model(torch.float32, **changes).train(), run.family))
    for layer in text_layers(losses[1].model):
        layer.compile(dynamic=True, fullgraph=True, backend=backend)  # fullgraph: a graph break is an error
    return losses[0], losses[1]


def assert_equal(run, losses, passes, tolerance: float) -> None:
    for batch in passes:
        (expected, gradients), (found, of_compiled) = (loss_and_gradients(loss, batch) for loss in losses)
        assert found == pytest.approx(expected, rel=tolerance)
        assert largest_relative_difference(gradients, of_compiled) < 10 * tolerance


@pytest.mark.slow
def test_forty_shapes_need_six_forms_at_most_and_no_graph_breaks(tiny_models):
    run = tiny_run(tiny_models, "qwen3_vl", layers=4)  # of which DeepStack reaches two
    _, loss = compiled(run, "eager")
    for batch in passes_of_many_shapes(run, 40):
        loss(batch)
    forms, seconds = compiled_so_far()
    assert 4 <= forms <= MOST_FORMS and seconds > 0


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_layers_give_the_loss_and_every_gradient_of_the_adapter(tiny_models, family, checkpointing):
    """Traced forward and backward as for a GPU; only the kernels are PyTorch's own."""
    run = tiny_run(tiny_models, family)
    losses = compiled(run, "aot_eager", gradient_checkpointing=checkpointing)
    assert_equal(run, losses, passes_of_many_shapes(run, 12), 1e-5)
    assert compiled_so_far()[0] <= MOST_FORMS


@pytest.mark.slow
def test_generated_kernels_give_the_loss_and_every_gradient_of_the_adapter(tiny_models):
    run = tiny_run(tiny_models, "qwen3_vl")
    if reason := modeling._compiler_fails(CPU):
        pytest.skip(f"no compiler works here: {reason}")
    assert_equal(run, compiled(run, "inductor"), passes_of_many_shapes(run, 1), 1e-4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({}, "no GPU"), ({"compile": False}, "compile: false"), ({"deterministic": True}, "deterministic: true")],
)
def test_layers_that_are_not_compiled_say_why(tiny_models, changes, said):
    run = tiny_run(tiny_models, "qwen3_vl")
    model = run.fresh_model(torch.float32)
    assert compile_layers(model, replace(run.config, **changes), CPU) == f"Decoder layers run uncompiled ({said})"
    assert all(layer._compiled_call_impl is None for layer in text_layers(model))


def test_a_compiler_that_fails_is_an_error_where_compilation_is_asked_for_and_else_a_line(tiny_models, monkeypatch):
    run = tiny_run(tiny_models, "qwen3_vl")
    monkeypatch.setattr(modeling, "_compiler_fails", lambda device: "g++ is not there")
    with pytest.raises(UserError, match=r"compile: true, and no compiler works here \(g\+\+ is not there\); install a"):
        compile_layers(run.model(), replace(run.config, compile=True), CPU)
    said = compile_layers(run.model(), run.config, torch.device("cuda"))
    assert said == "Decoder layers run uncompiled (no compiler works here: g++ is not there)"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("qwen3_vl", "{all} of {all} decoder layers are compiled, each form at its first use"),
        (
            "qwen3_5",
            "{some} of {all} decoder layers are compiled, each form at its first use, the recurrent ones are not",
        ),
    ],
)
def test_the_log_says_how_many_of_the_layers_are_compiled(tiny_models, monkeypatch, name, said):
    monkeypatch.setattr(modeling, "_compiler_fails", lambda device: None)
    run = tiny_run(tiny_models, name)
    model = run.fresh_model(torch.float32)
    layers = modeling.all_text_layers(model)
    some = sum(hasattr(layer, "self_attn") for layer in layers)
    assert compile_layers(model, run.config, torch.device("cuda")) == said.format(all=len(layers), some=some)
    assert sum(layer._compiled_call_impl is not None for layer in layers) == some
    assert (some < len(layers)) == (name == "qwen3_5")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"deterministic": True}, "compile: true cannot be deterministic: true; remove one"),
        ({"parallel": "fsdp", "finetuning": "full"}, "compile: true works under parallel: ddp"),
        ({"quantization": "nf4"}, "compile: true works under parallel: ddp and quantization: none"),
    ],
)
def test_keys_that_compilation_does_not_go_with_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load_config(write_config(tmp_path, "model", compile=True, **changes))


def test_an_evaluation_runs_the_layers_as_they_are(tiny_models):
    run = tiny_run(tiny_models, "qwen3_vl")
    model = run.fresh_model(torch.float32).eval()
    loss, batch = AnswerLoss(model, run.family), passes_of_many_shapes(run, 1)[0]
    for layer in text_layers(model):
        layer.compile(dynamic=True, backend=None)  # calling it would be an error
    with torch.no_grad(), modeling.uncompiled(model):
        assert float(loss(batch)) > 0
    assert compiled_so_far()[0] == 0
