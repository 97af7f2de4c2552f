"""How a process ends whose work is done or has failed, and what asks it to stop."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import REPO_ROOT
from support.document_runs import document_config, write_documents
from support.run_helpers import (
    children,
    finish,
    history,
    order,
    send,
    start,
    start_train,
    wait_for_step,
    weights,
    write_config,
    write_samples,
)
from support.tiny_runs import tiny_run, vqa_samples

import distributed
from batches import BatchPlan
from config import load_config
from dataset import StepDataset
from distributed import StopSignal, run_command
from errors import UserError
from preflight import open_encoder
from run_folder import OutputLock
from samples import SampleList, load_samples
from templates import IGNORE

WRAPPED = REPO_ROOT / "tests" / "support" / "wrapped_train.py"

# A thread that never ends and a data worker that ignores SIGTERM each hold up a Python that is taken apart; and the
# last object of the interpreter is one whose end must not be met.
SCRIPT = """
import atexit, multiprocessing, os, shutil, sys, threading, time
from distributed import end_process, ignore_stop_signals
from run_folder import rotate

class Last:
    def __del__(self):
        os.write(1, b"taken apart")

def hang(pipe):
    ignore_stop_signals()
    pipe.send("ready")
    time.sleep(600)

ours, theirs = multiprocessing.Pipe()
worker = multiprocessing.get_context("fork").Process(target=hang, args=(theirs,), daemon=True)
worker.start()
ours.recv()
worker.terminate()
worker.join(0.5)
assert worker.is_alive(), "what Python does at the end does not end it"
threading.Thread(target=time.sleep, args=(600,)).start()
sys.last = Last()

delete = shutil.rmtree
shutil.rmtree = lambda folder, **options: (time.sleep(1), delete(folder))
rotate(sys.argv[1], 1, None, 1)
atexit.register(print, "temporary files removed")
print("Done", worker.pid)
end_process()
"""


def test_a_finished_process_ends_with_its_output_and_deletions_done_and_without_its_workers(tmp_path):
    (tmp_path / ".deleted-checkpoint-1").mkdir()
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    ended = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    done, cleaned = ended.stdout.splitlines()
    assert cleaned == "temporary files removed"
    assert not list(tmp_path.iterdir()), "the deletion of an old checkpoint was cut off"
    worker = int(done.removeprefix("Done "))
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(worker)], capture_output=True, text=True).stdout.strip()
    assert state == "" or state.startswith("Z"), "the worker outlives the process"


KILLED_WORKER = """
import os, signal
from torch.utils.data import DataLoader
from distributed import ignore_stop_signals, run_command

class Samples(list):
    def __getitem__(self, index):
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does at the memory limit of a job
        return index

def main():
    for _ in DataLoader(Samples(range(99)), batch_size=None, num_workers=2, worker_init_fn=ignore_stop_signals):
        pass

run_command(main)
"""


def test_a_data_worker_that_was_killed_is_one_line_and_the_others_do_not_hold_up_the_end():
    """They ignore the SIGTERM that multiprocessing sends them before it waits for them."""
    command = [sys.executable, "-c", KILLED_WORKER]
    ended = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: DataLoader worker (pid") and ended.stderr.count("\n") == 1, ended.stderr
    assert "dataloader_num_workers" in ended.stderr and "--mem" in ended.stderr


def test_a_command_ends_with_0_or_with_2_and_a_line_or_with_1_and_a_traceback(monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(distributed, "end_process", lambda code=0: codes.append(code))

    def fails(error):
        raise error

    run_command(lambda: None)
    run_command(lambda: fails(SystemExit(0)))
    assert codes == [0, 0] and capsys.readouterr().err == ""
    run_command(lambda: fails(UserError("a wrong key")))
    assert capsys.readouterr().err == "error: a wrong key\n"
    run_command(lambda: fails(RuntimeError("ours")))
    assert capsys.readouterr().err.startswith("Traceback (most recent call last)")
    assert codes == [0, 0, 2, 1]


def test_a_users_mistake_is_left_for_the_report_of_torchrun(monkeypatch, tmp_path):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    monkeypatch.setattr(distributed, "end_process", lambda code=0: None)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))

    def fails():
        raise UserError("ünknown key")

    run_command(fails)
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))
    lines = ChildFailedError("train.py", {0: failure}).format_msg().splitlines()
    assert lines[-2] == "  traceback : error: ünknown key"


# ------------------------------------------------------------------------------------------------------ stop signals


def test_a_worker_whose_torchrun_is_gone_stops_and_a_process_without_torchrun_outlives_its_shell(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    alone = StopSignal()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    worker = StopSignal()
    assert not worker.requested and not alone.requested
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert worker.requested and worker.name == "the end of torchrun"
    assert not alone.requested, "`nohup python train.py &` goes on when its terminal is closed"


def test_before_the_ranks_have_met_only_the_warning_of_slurm_is_noted_and_then_every_stop_signal(monkeypatch):
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    stop = StopSignal()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "a rank in the rendezvous could not be ended"
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.requested and stop.name == "SIGUSR1"
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        stop = StopSignal()
        stop.ranks_have_met()
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested and stop.name == number.name
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    StopSignal().ranks_have_met()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


# ------------------------------------------------------------------------------------- real processes under torchrun


@pytest.fixture
def config(tiny_models, tmp_path):
    """config(**changes) writes the config of a small run into the folder `output`, with data workers."""
    write_samples(tmp_path / "data")

    def config(output="out", **changes):
        defaults = {"num_train_epochs": 500, "save_steps": 10_000, "dataloader_num_workers": 2}
        return write_config(tmp_path / "data", tiny_models["qwen3_vl"], tmp_path / output, **{**defaults, **changes})

    return config


def saved_steps(output) -> list[str]:
    return sorted(folder.name for folder in output.glob("checkpoint-*"))


@pytest.mark.slow
def test_workers_whose_torchrun_is_killed_save_end_and_leave_the_folder_free(config, tmp_path):
    output = tmp_path / "out"
    process = start(config(), ranks=2)
    wait_for_step(output, 3, process)
    process.kill()
    _, text = finish(process)  # the workers have closed their end of the pipe
    stopped = json.loads((output / "PREEMPTED").read_text())
    assert stopped["signal"] == "the end of torchrun" and saved_steps(output) == [f"checkpoint-{stopped['step']}"], text
    OutputLock(output)


@pytest.mark.slow
def test_a_worker_without_torchrun_ends_where_the_rank_that_it_waits_for_is_gone_too(config, tmp_path):
    output = tmp_path / "out"
    process = start(config(), ranks=2)
    wait_for_step(output, 3, process)
    rank_1 = children(process)[1]
    process.kill()
    send(rank_1, signal.SIGKILL)
    finish(process, timeout=60)
    OutputLock(output)


@pytest.mark.slow
def test_torchrun_told_to_stop_waits_for_a_save_of_more_than_30_seconds_with_the_grace_of_the_launcher(
    config, tmp_path
):
    lines = (REPO_ROOT / "slurm" / "launch.sh").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=")]
    told = subprocess.run(["bash", "-c", f"{line}; env"], capture_output=True, text=True).stdout
    grace = re.search(r"^TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)$", told, re.M).group(1)
    output = tmp_path / "out"
    environment = {"FAULT": "slow_save", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": grace}
    process = start(config(), ranks=2, script=WRAPPED, environment=environment)
    wait_for_step(output, 3, process)
    send(process.pid, signal.SIGTERM)
    _, text = finish(process)
    stopped = json.loads((output / "PREEMPTED").read_text())
    assert stopped["signal"] == "SIGTERM" and saved_steps(output) == [f"checkpoint-{stopped['step']}"], text


@pytest.mark.slow
def test_a_mistake_that_only_the_first_rank_meets_is_the_last_line_and_nobody_is_waited_for(config, tmp_path):
    """Here a folder in use; the other ranks have started, and handle SIGTERM."""
    lock = OutputLock(tmp_path / "out")
    code, text = finish(start(config(), ranks=2))
    assert lock and code == 1 and "exitcode  : 2 " in text
    told = f"error: output_dir {tmp_path / 'out'} is in use by process {os.getpid()} on "
    assert len(re.findall(f"^{re.escape(told)}", text, re.M)) == 1 and "error (rank 1)" not in text
    assert [line for line in text.splitlines() if line.strip("= ")][-1].startswith(f"  traceback : {told}")
    assert "SIGKILL" not in text and "forcefully" not in text


@pytest.mark.slow
def test_three_ranks_stopped_and_resumed_equal_an_uninterrupted_run_bit_for_bit(config, tmp_path):
    """Three addends tell in which order they were added: each step has work for every rank. Vision is trained, and
    some questions are without an image."""
    changes = {
        "num_train_epochs": 18,
        "train_bs": 5,
        "grad_accum": 1,
        "vision_frozen": False,
        "projector_frozen": False,
    }
    cut, whole = config(**changes), config(output="whole", **changes)
    path = tmp_path / "data" / "samples.json"
    samples = json.loads(path.read_text())
    for sample in samples[::3]:
        del sample["image"]
    path.write_text(json.dumps(samples))
    first = start_train(cut, ranks=3, script=WRAPPED, environment={"FAULT": "slow_steps"})
    wait_for_step(tmp_path / "out", 4, first)
    send(children(first)[2])
    code, text = finish(first)
    assert code == 0 and 4 <= json.loads((tmp_path / "out" / "PREEMPTED").read_text())["step"] < 18, text
    for path, resumed in ((cut, True), (whole, False)):
        code, text = finish(start_train(path, ranks=3))
        assert code == 0 and ("Resuming from" in text) == resumed, text
    assert len(order(tmp_path / "whole")) == 18
    assert history(tmp_path / "out") == history(tmp_path / "whole")
    assert order(tmp_path / "out") == order(tmp_path / "whole")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


# --------------------------------------------------------------------------------------------------------- an idle rank


def test_a_rank_without_a_question_has_nothing_supervised_neither_tokens_nor_classes(tiny_models, tmp_path):
    """It joins the step with somebody else's question, which must not count twice."""
    documents = write_documents(tmp_path / "documents", train=2, val=1, test=1)
    path = document_config(documents, tiny_models["qwen2"], tmp_path / "cls")
    classes = open_encoder(load_config(path), "c.yaml"), load_samples(documents / "text_train.json")
    run = tiny_run(tiny_models, "qwen3_vl")
    answers = run.encoder(), SampleList(vqa_samples(1, 2), "s")
    for encoder, samples in (classes, answers):
        plan = BatchPlan(len(samples), 3, 1, "sequential", 0)
        shares = [StepDataset(samples, encoder, False, plan, 1000, rank, 3)[0] for rank in range(3)]
        supervised = [sum(batch["answer_tokens"] for batch in share["passes"]) for share in shares]
        (idle,) = [share for share in shares if not share["sample_ids"]]
        (batch,) = idle["passes"]
        assert sorted(map(bool, supervised)) == [False, True, True]
        assert (batch["targets"] == IGNORE).all() and (batch.get("class_labels", IGNORE) == torch.tensor(IGNORE)).all()


def test_the_first_rank_reads_before_the_first_of_each_node_and_those_before_the_others(monkeypatch):
    turns: dict[int, list] = {}
    for rank, local_rank in ((0, 0), (1, 1), (4, 0), (5, 1)):
        turns[rank] = []
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        monkeypatch.setattr(distributed, "all_or_raise", lambda _, action, rank=rank: turns[rank].append(action()) or 7)
        assert distributed.in_turns(distributed.Ranks(rank, 6, torch.device("cpu")), lambda: "read") == 7
    later, now = None, "read"
    assert turns == {0: [now, later, later], 1: [later, later, now], 4: [later, now, later], 5: [later, later, now]}
