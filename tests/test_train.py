"""A run that cannot be lost: exact resume, stopping, and every fault with its exact outcome."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
from support.forked import start_forked
from support.run_helpers import (
    REPO,
    children,
    finish,
    history,
    log_rows,
    order,
    send,
    start,
    start_train,
    wait_for_step,
    weights,
    write_config,
    write_samples,
)

import forecast
import inference
import run_folder
import train
from checkpoint import TrainerState, whats_wrong
from errors import UserError
from run_folder import OutputLock

WRAPPED = REPO / "tests" / "support" / "wrapped_train.py"


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_samples(folder)
    return folder


@pytest.fixture
def run(data, tiny_models, tmp_path):
    """run(name, **changes) trains in this process; returns the output folder."""

    def run(name, *overrides, **changes):
        output = tmp_path / name
        train.main(["--config", str(write_config(data, tiny_models["qwen3_vl"], output, **changes)), *overrides])
        return output

    return run


def stop_at(monkeypatch, step, number=signal.SIGUSR1):
    """Make a run in this process stop after a step: the signal comes when the step before is logged."""
    record = train.RunLog.record

    def record_and_stop(self, values, prefix):
        record(self, values, prefix)
        if prefix == "train" and values["step"] == step - 1:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(train.RunLog, "record", record_and_stop)


# ------------------------------------------------------------------------------------------------------- schedule


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup_steps, total_steps", [(0, 7), (5, 40), (3, 3)])
def test_the_schedule_equals_that_of_transformers_at_every_step(kind, warmup_steps, total_steps):
    import transformers

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=1.0)
    name = "constant_with_warmup" if kind == "constant" else kind
    schedule = transformers.get_scheduler(name, optimizer, warmup_steps, total_steps)
    for step in range(total_steps):
        assert train.learning_rate_factor(kind, step, warmup_steps, total_steps) == optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()


# -------------------------------------------------------------------------------------------------- stop and resume


def test_two_ranks_stopped_by_one_signal_and_resumed_equal_an_uninterrupted_run(data, tiny_models, tmp_path):
    """Dropout on, accumulation, cut in the middle of an epoch, the signal to one rank only and twice."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    changes = {"num_train_epochs": 10, "dataloader_num_workers": 1, "save_steps": 100}
    slow = {"FAULT": "slow_steps"}
    first = start_train(
        write_config(data, tiny_models["qwen3_vl"], cut, **changes), ranks=2, script=WRAPPED, environment=slow
    )
    wait_for_step(cut, 6, first)
    rank_1 = children(first)[1]
    send(rank_1)
    send(rank_1, signal.SIGTERM)
    code, text = finish(first)
    assert code == 0, text
    stopped_at = json.loads((cut / "PREEMPTED").read_text())["step"]
    assert 6 <= stopped_at < 20 and (cut / f"checkpoint-{stopped_at}").is_dir()
    assert text.count("Saved checkpoint-") == 1 and f"Stopped at step {stopped_at}/20 on request" in text
    assert not (cut / "adapter_model.safetensors").exists()

    resumed = start_train(data / "cut.yaml", ranks=2)
    uninterrupted = start_train(write_config(data, tiny_models["qwen3_vl"], whole, **changes), ranks=2)
    code, text = finish(resumed)
    assert code == 0 and f"Resuming from {cut}/checkpoint-{stopped_at}: step {stopped_at}/20" in text
    assert "[transformers]" not in text and "Failed to load" not in text, "the log's head is ours, no library's"
    assert finish(uninterrupted)[0] == 0
    assert history(cut) == history(whole)
    assert [row["step"] for row in log_rows(cut)] == list(range(1, 21))
    assert order(cut) == order(whole)
    assert weights(cut) == weights(whole)
    assert not (cut / "PREEMPTED").exists()


def test_a_run_goes_on_under_another_number_of_ranks_with_the_same_batches_and_losses(
    data, tiny_models, tmp_path, run, monkeypatch
):
    changes = {"lora": {"r": 8, "alpha": 16, "dropout": 0.0}, "save_steps": 5}
    one = run("one", grad_accum=4, **changes)
    stop_at(monkeypatch, 3)
    mixed = run("mixed", grad_accum=4, **changes)
    monkeypatch.undo()
    assert order(mixed) == order(one)[:3]
    code, text = finish(start_train(data / "mixed.yaml", "grad_accum=2", ranks=2))
    assert code == 0, text
    assert order(mixed) == order(one)  # no sample twice, none missing
    for mine, theirs in zip(history(mixed), history(one), strict=True):
        assert mine == pytest.approx(theirs, rel=2e-4)


@pytest.mark.slow
def test_a_run_with_recurrent_layers_stopped_and_resumed_equals_an_uninterrupted_one(run, tiny_models, monkeypatch):
    arguments = [f"model_name={tiny_models['qwen3_5']}", "image_size=128", "gradient_checkpointing=true"]
    changes = {"num_train_epochs": 2, "save_steps": 100, "eval_steps": 4, "eval_max_samples": 4}
    whole = run("whole", *arguments, **changes)
    stop_at(monkeypatch, 3)
    cut = run("cut", *arguments, **changes)
    assert json.loads((cut / "PREEMPTED").read_text())["step"] == 3
    monkeypatch.undo()
    run("cut", *arguments, **changes)
    assert history(cut) == history(whole) and weights(cut) == weights(whole) and order(cut) == order(whole)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_each_stop_signal_saves_the_step_it_met_and_leaves_the_marker(run, monkeypatch, number):
    stop_at(monkeypatch, 2, number)
    output = run("stopped")
    assert json.loads((output / "PREEMPTED").read_text())["step"] == 2
    assert [folder.name for folder in output.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_signal_inside_an_evaluation_stops_it_and_the_resumed_run_evaluates_again(run, monkeypatch):
    changes = {"eval_steps": 3, "eval_max_samples": 4, "eval_bs": 2, "num_train_epochs": 2}
    whole = run("whole", **changes)
    split_loss = inference.split_loss

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGUSR1)
        return split_loss(*arguments)

    monkeypatch.setattr(inference, "split_loss", interrupted)
    cut = run("cut", **changes)
    assert json.loads((cut / "checkpoint-3" / "trainer_state.json").read_text())["evaluation_due"]
    assert not log_rows(cut, "eval_loss")
    monkeypatch.undo()
    save = train.checkpoint.save
    monkeypatch.setattr(train.checkpoint, "save", lambda *_: os._exit(1))  # killed after the evaluation was logged
    pid = os.fork()
    if pid == 0:
        run("cut", **changes)
    os.waitpid(pid, 0)
    assert [row["step"] for row in log_rows(cut, "eval_loss")] == [3]
    monkeypatch.setattr(train.checkpoint, "save", save)
    run("cut", **changes)
    assert history(cut) == history(whole) and weights(cut) == weights(whole)
    keys = ("step", "eval_loss", "eval_accuracy")
    assert [[row[k] for k in keys] for row in log_rows(cut, "eval_loss")] == [
        [row[k] for k in keys] for row in log_rows(whole, "eval_loss")
    ]


def test_evaluations_score_the_same_whole_images_and_the_last_one_all(run, capsys):
    output = run("out", eval_steps=4, eval_max_samples=7, num_train_epochs=2)
    rows = log_rows(output, "eval_loss")
    assert [(row["step"], row["eval_questions"]) for row in rows] == [(4, 5), (8, 15)]
    assert "eval_subset_loss" not in rows[0] and rows[1]["eval_subset_loss"] != rows[1]["eval_loss"]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Evaluation: ")]
    assert line.startswith("Evaluation: 1 times 5 and all 15 of val's questions at the end: ")


def test_a_loss_of_other_questions_is_no_best_of_a_resumed_run(run, monkeypatch, capsys):
    changes = {"eval_steps": 2, "save_steps": 2, "num_train_epochs": 2}
    for loss, most, step, best in ((0.1, 5, 4, 2), (0.5, 10, 8, 6)):
        monkeypatch.setattr(train, "scores_while_training", lambda *_, loss=loss: {"eval_loss": loss})
        if step == 4:
            stop_at(monkeypatch, step)
        output = run("out", eval_max_samples=most, **changes)
        monkeypatch.undo()
        state = json.loads((output / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["best_step"] == best
    assert "The best so far was chosen on another val, or another eval_max_samples" in capsys.readouterr().out


def test_a_loss_of_another_val_is_no_best_of_a_resumed_run(run, data, tmp_path, monkeypatch):
    val = tmp_path / "val.json"
    samples = json.loads((data / "samples.json").read_text())
    val.write_text(json.dumps([{"question": s["question"], "answer": s["answer"]} for s in samples]))
    for loss, step, best in ((0.1, 4, 2), (0.5, 8, 6)):
        monkeypatch.setattr(train, "scores_while_training", lambda *_, loss=loss: {"eval_loss": loss})
        if step == 4:
            stop_at(monkeypatch, step)
        output = run("out", f"data.val={val}", eval_steps=2, save_steps=2, num_train_epochs=2)
        monkeypatch.undo()
        val.write_text(json.dumps(json.loads(val.read_text())[:3]))
        state = json.loads((output / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["best_step"] == best


def test_an_evaluation_without_a_finite_loss_is_never_the_best_and_spoils_no_checkpoint(run, monkeypatch, capsys):
    losses = iter([float("nan"), 0.5, float("inf"), 0.7])
    monkeypatch.setattr(train, "scores_while_training", lambda *_: {"eval_loss": next(losses)})
    output = run("out", eval_steps=2, save_steps=2, num_train_epochs=2, save_total_limit=9)
    assert capsys.readouterr().out.count("is not finite: it is never the best") == 2
    assert [whats_wrong(folder, content=True) for folder in run_folder.checkpoints(output)] == [None] * 4
    assert json.loads((output / "checkpoint-8" / "trainer_state.json").read_text())["best_step"] == 4


def test_a_stop_while_the_run_is_set_up_ends_it_before_the_first_step(run, monkeypatch, capsys):
    load_model = train.load_model

    def load_and_stop(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return load_model(*arguments)

    whole = run("whole")
    monkeypatch.setattr(train, "load_model", load_and_stop)
    capsys.readouterr()
    output = run("stopped")
    assert "Stopped at step 0, before training, on request" in capsys.readouterr().out
    assert json.loads((output / "PREEMPTED").read_text()) == {"step": 0, "signal": "SIGTERM"}
    assert not list(output.glob("checkpoint-*"))
    monkeypatch.undo()
    assert weights(run("stopped")) == weights(whole) and not (output / "PREEMPTED").exists()


def test_a_resumed_run_does_without_the_adapter_that_it_started_from(run, monkeypatch):
    first = run("first")
    stop_at(monkeypatch, 3)
    run("second", f"init_adapter={first}", "seed=7")
    monkeypatch.undo()
    first.rename(first.with_name("archived"))
    assert (run("second", f"init_adapter={first}", "seed=7") / "checkpoint-16").is_dir()
    with pytest.raises(UserError, match=r"init_adapter: .* holds no"):
        run("third", f"init_adapter={first}")


def test_the_interval_of_a_log_line_survives_an_interruption(run, monkeypatch):
    whole = run("whole", logging_steps=4)
    save = train.checkpoint.save

    def save_and_stop(*arguments):
        os.kill(os.getpid(), signal.SIGUSR1)
        return save(*arguments)

    monkeypatch.setattr(train.checkpoint, "save", save_and_stop)
    cut = run("cut", logging_steps=4, save_steps=6)
    monkeypatch.undo()
    assert (cut / "PREEMPTED").exists()
    run("cut", logging_steps=4, save_steps=6)
    assert history(cut) == history(whole)


def test_a_complete_run_started_again_says_so_and_changes_nothing(run, capsys):
    output = run("done")
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.name != ".lock"}
    run("done")
    assert "already complete at step 16" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.name != ".lock"}


def test_tensorboard_curves_go_on_across_a_resume_without_a_jump_or_an_overlap(run, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record = train.RunLog.record

    def killed_after_5(self, values, prefix):
        record(self, values, prefix)
        if values["step"] == 5:
            raise KeyboardInterrupt  # as a SIGKILL would: step 5 is on the curves, but in no checkpoint

    monkeypatch.setattr(train.RunLog, "record", killed_after_5)
    with pytest.raises(KeyboardInterrupt):
        run("curves")
    monkeypatch.undo()
    output = run("curves")
    events = EventAccumulator(str(output / "runs"))
    events.Reload()
    scalars = events.Scalars("train/loss")
    assert [scalar.step for scalar in scalars] == list(range(1, 17))
    assert [scalar.value for scalar in scalars] == pytest.approx([row[2] for row in history(output)])


# ----------------------------------------------------------------------------------------------- refusing to resume


def test_a_resume_with_changed_mathematics_is_refused_and_names_the_keys(run):
    run("first", "num_train_epochs=1")
    with pytest.raises(UserError, match=r"checkpoint-4 was trained with another config \(learning_rate: 0.01 -> 0.1\)"):
        run("first", "num_train_epochs=1", "learning_rate=0.1")
    with pytest.raises(UserError, match="train_bs × grad_accum × GPUs: 4 -> 8"):
        run("first", "num_train_epochs=1", "train_bs=4")
    run("first", "num_train_epochs=1", "train_bs=4", "grad_accum=1", "logging_steps=2")  # the same mathematics


def test_a_resume_with_other_training_samples_under_the_same_path_is_refused(run, data, tmp_path):
    copy = tmp_path / "samples.json"
    copy.write_text((data / "samples.json").read_text())
    overrides = [*(f"data.{split}={copy}" for split in ("train", "val", "test")), "num_train_epochs=1"]
    run("first", *overrides)
    copy.write_text(json.dumps(list(reversed(json.loads(copy.read_text())))))
    with pytest.raises(UserError, match=r"the samples in data\.train"):
        run("first", *overrides)


def test_a_fresh_run_into_a_folder_with_checkpoints_is_refused(run):
    run("first", "num_train_epochs=1")
    with pytest.raises(UserError, match="already holds checkpoint-4 and resume is 'never'"):
        run("first", "num_train_epochs=1", "resume=never")


def test_damaged_checkpoints_are_reported_and_the_newest_sound_one_is_used(run, monkeypatch, capsys):
    """One is cut off, one lacks a file, one has half a state."""
    changes = {"save_steps": 2, "save_total_limit": 9}
    whole = run("whole", **changes)
    stop_at(monkeypatch, 10)
    output = run("damaged", **changes)
    monkeypatch.undo()
    adapter = output / "checkpoint-10" / "adapter_model.safetensors"
    os.truncate(adapter, adapter.stat().st_size // 2)
    (output / "checkpoint-8" / "adapter_model.safetensors").unlink()
    (output / "checkpoint-6" / "trainer_state.json").write_text('{"step": 6')
    run("damaged", **changes)
    text = capsys.readouterr().out
    assert all(f"Ignoring {output}/checkpoint-{step}: " in text for step in (10, 8, 6))
    assert f"Resuming from {output}/checkpoint-4: step 4/16" in text
    assert history(output) == history(whole) and weights(output) == weights(whole)


# ----------------------------------------------------------------------------------------------------------- faults


def test_nan_on_one_rank_skips_the_step_everywhere_names_the_samples_and_stops_the_run(data, tiny_models, tmp_path):
    output = tmp_path / "nan"
    config = write_config(data, tiny_models["qwen3_vl"], output, save_steps=1, save_total_limit=9, num_train_epochs=9)
    code, text = finish(start_train(config, ranks=2, script=WRAPPED, environment={"FAULT": "nan_on_rank_1"}))
    assert code != 0
    assert [folder.name for folder in run_folder.checkpoints(output)] == [f"checkpoint-{step}" for step in range(1, 7)]
    saved = {step: (output / f"checkpoint-{step}" / "adapter_model.safetensors").read_bytes() for step in range(1, 7)}
    assert saved[1] == saved[2] and saved[2] != saved[3] != saved[4] and saved[4] == saved[5] == saved[6]
    trained = dict(order(output))
    named = re.search(
        r"step 2: loss nan, grad_norm nan: not finite, no update. Samples of the ranks concerned: (.*)", text
    )
    rank_1 = set(named.group(1).split(", "))
    assert rank_1 < set(trained[2]) and len(trained[2]) == 7, "those of one rank, and of this step"
    assert "error: 3 steps in a row without a finite loss, the last at step 7; lower learning_rate" in text


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_within_a_minute(data, tiny_models, tmp_path):
    output = tmp_path / "killed"
    config = write_config(data, tiny_models["qwen3_vl"], output, num_train_epochs=200)
    process = start(config, ranks=2)
    wait_for_step(output, 3, process)
    send(children(process)[1], signal.SIGKILL)
    killed = time.monotonic()
    code, _ = finish(process)
    assert code != 0 and time.monotonic() - killed < 60


def test_a_full_disk_stops_the_run_with_path_and_free_space_and_keeps_the_checkpoint_before(
    data, tiny_models, tmp_path
):
    mount = tmp_path / "small"
    mount.mkdir()
    size = 420_000  # bytes: one checkpoint of about 190 kB and the logs, not two
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(mount)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        output = mount / "run"
        config = write_config(data, tiny_models["qwen3_vl"], output, save_total_limit=9)
        code, text = finish(start_train(config, ranks=2))
        assert code != 0
        assert f"cannot save {output}/checkpoint-" in text and "GB are free there" in text
        assert (output / "checkpoint-4" / "trainer_state.json").is_file()
        assert whats_wrong(output / "checkpoint-4") is None
        assert not list(output.glob(".checkpoint-*"))
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_second_job_in_the_same_folder_fails_at_once_and_names_the_owner(run, tmp_path):
    output = tmp_path / "owned"
    held, hold = os.pipe()
    owner = os.fork()
    if owner == 0:
        try:
            lock = OutputLock(output)  # noqa: F841 - held until the process ends
            os.write(hold, b"held")
            time.sleep(600)
        finally:
            os._exit(0)
    try:
        assert os.read(held, 4) == b"held"
        with pytest.raises(UserError, match=f"output_dir {output} is in use by process {owner} on "):
            run("owned")
    finally:
        os.kill(owner, signal.SIGKILL)
        os.waitpid(owner, 0)
    OutputLock(output)  # a dead owner's lock does not block the next


def run_out_of_memory(monkeypatch, fits):
    """Passes for which fits(rows, tokens of a row) is False run out of memory; tried at the start, as on a GPU."""
    forward, tried = train.modeling.AnswerLoss.forward, []

    def limited(self, batch):
        if torch.is_grad_enabled():
            tried.append(tuple(batch["input_ids"].shape))
            if not fits(*tried[-1]):
                raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch)

    monkeypatch.setattr(train.modeling.AnswerLoss, "forward", limited)
    monkeypatch.setattr(forecast, "TRIED_ON", ("cpu",))
    return tried


def test_a_budget_that_does_not_fit_is_halved_before_the_first_step_and_kept_on_resume(run, monkeypatch, capsys):
    tried = run_out_of_memory(monkeypatch, lambda rows, tokens: rows * tokens <= 300)
    whole = run("whole", pass_tokens=1000)
    said = capsys.readouterr().out
    assert "Out of memory on a pass of 1,000 tokens: going on with pass_tokens=500" in said
    assert "going on with pass_tokens=250" in said and "in passes of up to 250 tokens" in said
    assert max(rows * tokens for rows, tokens in tried[-20:]) <= 250
    state = json.loads((run_folder.checkpoints(whole)[-1] / "trainer_state.json").read_text())
    assert (state["pass_tokens"], state["device"]) == (250, "cpu")
    monkeypatch.setattr(forecast, "TRIED_ON", ("cuda",))
    untouched = run("untouched", pass_tokens=250)
    assert weights(whole) == weights(untouched), "trying passes out leaves no trace"
    first = run_folder.checkpoints(whole)[0]  # made under the halved budget
    shutil.copytree(first, whole.with_name("stopped") / first.name)
    capsys.readouterr()
    assert weights(run("stopped", pass_tokens=1000)) == weights(whole), "a resumed run keeps the halved budget"
    assert "Resuming from" in capsys.readouterr().out


def test_the_rank_with_the_least_memory_decides_on_the_budget_of_a_pass(monkeypatch):
    monkeypatch.setattr(forecast, "_that_fit", lambda *_: 4096)
    ranks = SimpleNamespace(device=torch.device("cpu"), gather=lambda own: [*own, {"cpu": "cpu", 4096: 1024}[own[0]]])
    found = forecast.pass_budget(SimpleNamespace(pass_tokens=None), TrainerState(), None, 0, None, ranks)
    assert found == (1024, [])


def test_a_single_sample_that_does_not_fit_is_one_line_with_its_name_and_three_remedies(run, monkeypatch):
    run_out_of_memory(monkeypatch, lambda rows, tokens: False)
    with pytest.raises(UserError) as raised:
        run("oom")
    message = str(raised.value)
    assert "out of memory on" in message and "(id " in message and "1 rows of" in message and "4×4 patches" in message
    assert "gradient_checkpointing=true" in message and "image_size" in message and "quantization=nf4" in message
    assert "\n" not in message


def test_out_of_memory_in_a_step_names_the_pass_and_the_remedies(run, monkeypatch):
    def out_of_memory(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train.modeling.AnswerLoss, "forward", out_of_memory)
    with pytest.raises(UserError, match=r"out of memory on a pass of step 1: .* 4×4 patches.*checkpointing=true"):
        run("oom")


@pytest.mark.parametrize(("where", "what"), [("load_model", "the weights of the model"), ("empty", "the state of the")])
def test_out_of_memory_before_the_first_pass_is_one_line_with_remedies(run, monkeypatch, where, what):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    run_out_of_memory(monkeypatch, lambda rows, tokens: True)
    if where == "load_model":
        monkeypatch.setattr(train, where, out_of_memory)
    else:
        monkeypatch.setattr(forecast, "torch", SimpleNamespace(**{**vars(torch), "empty": out_of_memory}))
    with pytest.raises(UserError, match=f"out of memory on {what}.*. Set gradient_checkpointing=true; or quantization"):
        run("oom")


def test_a_busy_rendezvous_port_is_one_line_that_names_it(data, tiny_models, tmp_path):
    import socket

    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        environment = {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        config = write_config(data, tiny_models["qwen3_vl"], tmp_path / "busy")
        code, text = finish(start_forked("train.py", "--config", config, environment=environment))
    assert code == 2 and "Traceback" not in text
    assert f"the ranks cannot meet at 127.0.0.1:{port}" in text and "--standalone" in text


# -------------------------------------------------------------------------------------------------------------- soak


@pytest.mark.slow
def test_thirty_kills_at_random_moments_lose_nothing(data, tiny_models, tmp_path):
    """A run that saves every 2 steps, killed 30 times, inside saves included, equals one that was left alone."""
    import random

    changes = {"num_train_epochs": 60, "save_steps": 2}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert finish(start(write_config(data, tiny_models["qwen3_vl"], whole, **changes)))[0] == 0
    config = write_config(data, tiny_models["qwen3_vl"], killed, **changes)
    generator = random.Random(0)
    kills = 0
    while kills < 30:
        process = start(config)
        steps_before = len(order(killed)) if (killed / "order.jsonl").exists() else 0
        if kills < 28:  # let it get into its stride, then at any moment
            try:
                wait_for_step(killed, min(steps_before + generator.randint(1, 8), 236), process)
            except AssertionError:
                break
        time.sleep(generator.random() * 0.3)
        process.kill()
        process.communicate()
        kills += 1
    code, text = finish(start(config), timeout=300)
    assert code == 0 and kills == 30, text
    assert history(killed) == history(whole)
    assert order(killed) == order(whole)
    assert weights(killed) == weights(whole)


# -------------------------------------------------------------------------------------------------------- deterministic


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [3, 4])
def test_three_and_four_ranks_end_bit_for_bit_alike_when_resumed(data, tiny_models, tmp_path, ranks):
    """Sums over more than two ranks depend on their order."""
    changes = {"num_train_epochs": 2, "train_bs": 1, "save_steps": 2, "save_total_limit": 9}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code, text = finish(start_train(write_config(data, tiny_models["qwen3_vl"], whole, **changes), ranks=ranks))
    assert code == 0, text
    middle = str(whole / "checkpoint-2")
    path = write_config(data, tiny_models["qwen3_vl"], cut, resume=middle, **changes)
    code, text = finish(start_train(path, ranks=ranks))
    assert code == 0 and f"Resuming from {middle}" in text
    assert history(cut) == history(whole)[2:] and weights(cut) == weights(whole)


def test_a_deterministic_run_asks_for_deterministic_algorithms_before_cuda_starts_and_ends_alike(run, monkeypatch):
    """On a CPU all runs are: no operation of a step, an evaluation or an answer lacks a deterministic form."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
    try:
        outputs = [run(name, deterministic=name != "plain", eval_steps="epoch") for name in ("plain", "one", "other")]
        assert torch.are_deterministic_algorithms_enabled() and not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
    assert seen[0] is None and ":4096:8" in seen
    assert weights(outputs[1]) == weights(outputs[2])


def test_the_deterministic_layout_of_heads_is_the_one_that_leaves_no_processor_idle(monkeypatch):
    from attention import heads_together

    assert heads_together(torch.device("cuda"), 32, 8) == 4
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert heads_together(torch.device("cuda"), 32, 8) == 1


def test_the_time_that_compilation_took_is_logged_once(run, monkeypatch, capsys):
    monkeypatch.setattr(train.modeling, "compiled_so_far", lambda: (4, 12.34))
    run("compiled", save_steps=1, num_train_epochs=1)
    assert capsys.readouterr().out.count("Compiled 4 forms of a decoder layer in 12.3 s so far") == 1
