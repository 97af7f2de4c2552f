"""How a process ends whose work is done or has failed, and what asks it to stop."""

import os
import signal
import subprocess
import sys

from conftest import REPO_ROOT

import distributed
from distributed import StopSignal, run_command
from errors import UserError

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
