"""One output folder, one run: which checkpoint it goes on from, what a resume may change, which checkpoints go."""

import json
import os
import shutil
import signal
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path

import pytest
from support.run_helpers import history, order, weights, write_config, write_samples

import checkpoint
import train
from checkpoint import TrainerState
from config import Config, Data, Lora, load_config, to_dict
from errors import UserError
from run_folder import checkpoints, find_resume, newest_complete, rotate


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_samples(folder, images=2, questions=4)
    return folder


@pytest.fixture
def run(data, tiny_models, tmp_path):
    """run(name, *overrides, **changes) trains 8 steps in this process, 2 an epoch; returns the output folder."""

    def run(name, *overrides, **changes):
        path = write_config(data, tiny_models["qwen3_vl"], tmp_path / name, **{"save_steps": 2, **changes})
        train.main(["--config", str(path), *overrides])
        return tmp_path / name

    return run


def stop_at(monkeypatch, step):
    record = train.RunLog.record

    def record_and_stop(self, values, prefix):
        record(self, values, prefix)
        if values["step"] == step - 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(train.RunLog, "record", record_and_stop)


def make_checkpoint(output, step, broken=False, **state):
    """A checkpoint folder with one file of weights; broken: cut off."""
    folder = Path(output) / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"1234")
    state = TrainerState(step=step, files={"weights": 4}, sha256=checkpoint.hash_files(folder, [folder / "weights"]),
                         **state)  # fmt: skip
    (folder / "trainer_state.json").write_text(json.dumps(asdict(state)))
    if broken:
        (folder / "weights").write_bytes(b"12")
    return folder


def left(output):
    return [int(folder.name.split("-")[1]) for folder in checkpoints(output)]


# ------------------------------------------------------------------------------------------------------------ rotation


@pytest.mark.parametrize(
    ("good", "broken", "keep", "best", "expected"),
    [
        ([2, 4, 6], [], 2, None, [4, 6]),
        ([2, 6], [4], 2, None, [2, 4, 6]),  # counted, the broken one would have cost a good one
        ([2, 4, 8], [6], 2, None, [4, 6, 8]),
        ([2, 6], [4], 1, None, [6]),  # never a good one before a broken one that is older or as old
        ([2, 4, 6, 8], [], 1, 4, [4, 8]),
        ([2, 4], [], 3, None, [2, 4]),
    ],
)
def test_the_newest_complete_checkpoints_and_the_best_are_kept(tmp_path, good, broken, keep, best, expected):
    for step in good + broken:
        make_checkpoint(tmp_path, step, broken=step in broken)
    rotate(tmp_path, keep, best, max(good)).join()
    assert left(tmp_path) == expected


def test_what_was_saved_last_is_never_deleted_whatever_stands_after_it(tmp_path):
    for step in (2, 4, 6, 8, 10):
        make_checkpoint(tmp_path, step)  # 6 to 10 may look complete, yet have a flipped byte
    rotate(tmp_path, 1, None, 4).join()
    assert left(tmp_path) == [4, 6, 8, 10]


def test_of_equally_good_checkpoints_the_earliest_is_the_best_and_a_step_without_one_never_is(run, monkeypatch):
    losses = iter([0.1, 0.5] * 4)  # every second step has a checkpoint
    monkeypatch.setattr(train, "scores_while_training", lambda *_: {"eval_loss": next(losses)})
    output = run("out", eval_steps=1, save_total_limit=1)
    assert json.loads((output / "checkpoint-8" / "trainer_state.json").read_text())["best_step"] == 2
    assert left(output) == [2, 8]


# -------------------------------------------------------------------------------------------------------------- resume

FREE = {"experiment", "data", "output_dir", "results_dir", "eval_bs", "eval_steps", "eval_max_samples", "logging_steps",
        "save_steps", "save_total_limit", "dataloader_num_workers", "resume", "share_prefix", "gradient_checkpointing",
        "train_bs", "grad_accum", "pass_tokens", "compile", "deterministic"}  # fmt: skip


def another(value):
    """A value of the same kind that differs."""
    if isinstance(value, Lora):
        return replace(value, alpha=value.alpha + 1)
    if isinstance(value, Data):
        return replace(value, image_root="elsewhere")
    if isinstance(value, bool):
        return not value
    if value is None:
        return 7
    return value + 1 if isinstance(value, int | float) else f"{value}-other"


@pytest.mark.parametrize("key", [field.name for field in fields(Config)])
def test_a_resume_refuses_every_changed_key_but_the_free_ones(key, data, tiny_models, tmp_path):
    config = load_config(write_config(data, tiny_models["qwen3_vl"], tmp_path / "out"))
    folder = make_checkpoint(tmp_path / "out", 2, config=to_dict(config), global_batch=4, train_data="same")
    assert find_resume(config, 4, "same")[0] == folder
    changed = replace(config, **{key: another(getattr(config, key))})
    if key == "output_dir":  # the checkpoint moves along
        shutil.move(tmp_path / "out", changed.output_dir)
    if key in FREE:
        assert find_resume(changed, 4, "same")[0].name == folder.name
    else:
        name = f"{key}.alpha" if is_dataclass(getattr(config, key)) else key
        with pytest.raises(UserError, match=rf"was trained with another config \({name}: "):
            find_resume(changed, 4, "same")


def test_a_path_counts_only_until_the_run_has_a_complete_checkpoint_of_its_own(data, tiny_models, tmp_path):
    config = load_config(write_config(data, tiny_models["qwen3_vl"], tmp_path / "out"))
    state = {"config": to_dict(config), "global_batch": 4, "train_data": "same"}
    first = make_checkpoint(tmp_path / "first", 20, **state)
    config = replace(config, resume=str(first))
    assert find_resume(config, 4, "same")[0] == first
    make_checkpoint(tmp_path / "out", 30, broken=True, **state)
    folder, notes = find_resume(config, 4, "same")
    assert folder == first and "Ignoring" in notes[0] and "weights has 2 bytes instead of 4" in notes[0]
    own = make_checkpoint(tmp_path / "out", 25, **state)
    folder, notes = find_resume(config, 4, "same")
    assert folder == own and f"resume: {first} no longer counts: {own} is this run's own" in notes
    with pytest.raises(UserError, match="is no complete checkpoint"):
        find_resume(replace(config, output_dir=str(tmp_path / "new"), resume=str(tmp_path / "none")), 4, "same")


def test_a_run_resumed_from_a_path_and_stopped_goes_on_from_its_own_checkpoint(run, monkeypatch, capsys):
    whole = run("whole")
    start = f"resume={whole / 'checkpoint-4'}"
    with monkeypatch.context() as patched:
        stop_at(patched, 6)
        output = run("out", start, save_steps=100, save_total_limit=1)
    assert left(output) == [6]
    capsys.readouterr()
    run("out", start, save_steps=100, save_total_limit=1)
    assert f"Resuming from {output}/checkpoint-6: step 6/8" in capsys.readouterr().out
    assert history(output) == history(whole)[4:] and order(output) == order(whole)[4:]
    assert weights(output) == weights(whole)
    run("out", start, save_steps=100, save_total_limit=1)
    assert "already complete at step 8" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.safetensors"])
def test_a_flipped_byte_makes_a_checkpoint_named_and_ignored_and_the_one_before_is_used(file, run, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        stop_at(patched, 5)
        output = run("out", num_train_epochs=3)
    path = output / "checkpoint-5" / file
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert newest_complete(output) == (
        output / "checkpoint-4",
        [f"Ignoring {output}/checkpoint-5: {file} has changed since it was saved"],
    )
    capsys.readouterr()
    run("out", num_train_epochs=3)
    text = capsys.readouterr().out
    assert "has changed since it was saved" in text and f"Resuming from {output}/checkpoint-4: step 4/6" in text
