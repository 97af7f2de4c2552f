"""How a command ends when something outside it is wrong."""

import os
import subprocess
import sys

import pytest
from conftest import REPO_ROOT

LINES = """
from errors import UserError, exit_on_user_error
with exit_on_user_error():
    for number in range(100_000):
        print(number)
"""


def ended_unread(*command):
    """(exit code, stderr) of a command whose output nobody reads."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=REPO_ROOT, env=env, stdout=pipe, stderr=pipe, text=True)
    process.stdout.close()
    return process.wait(), process.stderr.read()


@pytest.mark.parametrize(
    "command",
    [
        ["-c", LINES],
        ["-c", LINES.replace("print(number)", "print(number, flush=True)")],
        ["config.py", "--config", "configs/exp2.yaml"],
    ],
    ids=["buffered", "flushed", "config.py"],
)
def test_a_closed_pipe_ends_a_command_without_a_word_and_with_the_code_of_sigpipe(command):
    assert ended_unread(sys.executable, *command) == (141, "")
