"""Commands in processes of their own without the seconds that each would spend on imports: they are forked from a
process that has imported torch, transformers and this repo (one for each process of pytest, started when needed).

What `start_forked` returns stands in for a Popen of torchrun: several ranks, and when one fails the others end too.
"""

import atexit
import contextlib
import functools
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

REPO = Path(__file__).resolve().parents[2]
CONTEXT = multiprocessing.get_context("forkserver")


class ForkedRun:
    """The part of a Popen that tests use: pid, returncode, poll, wait, communicate, kill."""

    def __init__(self, arguments, ranks: int, folder, environment: dict):
        self.args, self.returncode = arguments, None
        self.output = tempfile.NamedTemporaryFile("r", prefix="run-", suffix=".out")  # noqa: SIM115 - as long as self
        self.process = CONTEXT.Process(
            target=_launch, args=([*map(str, arguments)], ranks, str(folder), environment, self.output.name)
        )
        self.process.start()
        self.pid = self.process.pid

    def poll(self):
        self.returncode = self.process.exitcode
        return self.returncode

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout=None):
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        self.output.seek(0)
        return self.output.read(), None

    def kill(self):
        if self.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.join()


def start_forked(*arguments, ranks: int = 0, folder=REPO, environment=None) -> ForkedRun:
    """`python ARGUMENTS`, the first of them a script of the repo; with ranks, as under torchrun."""
    _start_server()
    run = ForkedRun(arguments, ranks, folder, {**os.environ, **(environment or {})})
    atexit.register(run.kill)  # else pytest would wait for what a failed test has left running
    return run


@functools.cache
def _start_server() -> None:
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join([str(REPO), str(REPO / "tests")])):
        CONTEXT.set_forkserver_preload(["support.preloaded"])
        forkserver.ensure_running()


def _launch(arguments, ranks, folder, environment, output) -> None:
    multiprocessing.set_start_method(None, force=True)  # the platform's, as in a process that nobody forked
    os.setpgid(0, 0)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    if not ranks:
        _run(arguments)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(ranks))
    running = set()
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            _run(arguments)
        running.add(pid)
    failed = False
    while running:
        pid, status = os.wait()
        running.discard(pid)
        if status and not failed:
            failed = True
            print(f"a rank ended with {status}: the others are ended", flush=True)
            time.sleep(0.5)  # they may be about to say the same
            for other in running:
                os.kill(other, signal.SIGKILL)
    os._exit(int(failed))


def _run(arguments) -> None:
    """Become `python ARGUMENTS`."""
    script = str(REPO / arguments[0])
    sys.argv = [script, *arguments[1:]]
    sys.path.insert(0, str(Path(script).parent))
    code = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
