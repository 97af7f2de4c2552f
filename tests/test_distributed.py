"""How a process ends whose work is done."""

import subprocess
import sys

from conftest import REPO_ROOT

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
