"""The host runs ahead of the GPU: what would make it wait for one is counted on the CPU, for every family."""

import contextlib
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.tiny_runs import FAMILIES, mixed_samples, tiny_run
from support.waits import waits

import model as modeling
import train
from batches import BatchPlan
from checkpoint import TrainerState
from dataset import StepDataset
from distributed import Ranks
from model import AnswerLoss, optimizer_groups, trainable_parameters
from samples import SampleList

CPU = torch.device("cpu")
IN_A_PASS = 3  # waits that are allowed; there were 13 to 27
IN_A_STEP = 2


def steps_of(run, **changes) -> tuple[types.SimpleNamespace, StepDataset]:
    """(what `training_step` takes of a run, its steps): six questions with no, one and three images, some behind a
    shared prefix."""
    samples, config = SampleList(mixed_samples(), "s"), replace(run.config, **changes)
    plan = BatchPlan(len(samples), 6, 1, "sequential", 0)
    dataset = StepDataset(samples, run.encoder(), True, plan, 100_000, 0, 1)
    model = run.fresh_model(torch.float32, **changes).train()
    optimizer = torch.optim.AdamW(optimizer_groups(model, config), foreach=True)
    started = types.SimpleNamespace(
        config=config,
        plan=plan,
        ranks=Ranks(0, 1, CPU),
        stop=types.SimpleNamespace(requested=False),
        state=TrainerState(),
        loss=AnswerLoss(model, run.family),
        trainable=trainable_parameters(model),
        optimizer=optimizer,
        peak_rates=[1e-4],
        autocast=contextlib.nullcontext,
    )
    return started, dataset


@pytest.mark.parametrize("vision_too", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_pass_makes_the_host_wait_three_times_at_most(tiny_models, name, vision_too):
    changes = {"vision_frozen": not vision_too, "projector_frozen": not vision_too}
    run, dataset = steps_of(tiny_run(tiny_models, name), **changes)
    batch = dataset[0]["passes"][0]
    assert "patches" in batch and batch["shared_prefix"]
    run.loss(modeling.to_device(batch, CPU))  # what is made once
    with waits(run.loss) as counted:
        run.loss(modeling.to_device(batch, CPU)).backward()
    assert len(counted.found) <= IN_A_PASS, counted.found


def test_a_step_makes_the_host_wait_twice_besides_its_passes(tiny_models):
    run, dataset = steps_of(tiny_run(tiny_models, "qwen3_vl"))
    loaded = dataset[0]
    step = loaded["passes"], loaded["answer_tokens"], 0.0
    train.training_step(run, *step)  # AdamW makes its moments
    with waits(run.loss) as of_its_pass:
        run.loss(modeling.to_device(loaded["passes"][0], CPU)).backward()
    run.loss.zero_grad()
    with waits(run.loss) as counted:
        train.training_step(run, *step)
    assert len(loaded["passes"]) == 1
    not_pinned = [wait for wait in counted.found if wait.startswith("to(device) at distributed.py")]
    assert len(not_pinned) == 1, "what `Ranks.sum` moves: pinned, and so no wait, on a GPU alone"
    assert len(counted.found) - len(of_its_pass.found) - len(not_pinned) <= IN_A_STEP, counted.found


@pytest.mark.parametrize(
    "read",
    [
        float,
        torch.nonzero,
        torch.Tensor.tolist,
        lambda x: x[x > 0],
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: torch.from_numpy(np.ones(1)).to(x.device, non_blocking=True),
    ],
)
def test_what_would_wait_is_counted_and_what_the_host_holds_is_not(read):
    module = torch.nn.Linear(1, 1, bias=False)
    held = torch.ones(1)
    with waits(module) as counted, torch.no_grad():
        read(module(held)[0])
        assert len(counted.found) == 1
        float(held), held.nonzero()
    assert len(counted.found) == 1
