"""A user's mistake: one line on stderr that names the file, the key or the row, and the cure."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterable

NAMES_SHOWN = 10


class UserError(ValueError):
    """A mistake in the user's input. The message is one line that names the file, key or row, and the cure."""


@contextlib.contextmanager
def exit_on_user_error():
    """Turn a `UserError` into one line on stderr and exit code 2; anything else keeps its traceback.

    Where nobody reads stdout any more (`| head -1`), end with the exit code of a process that SIGPIPE has ended."""
    try:
        try:
            yield
        except UserError as error:
            rank = int(os.environ.get("RANK", "0"))
            told = f"error: {error}" if rank == 0 else f"error (rank {rank}): {error}"
            happened = time.time()
            if rank > 0:  # every rank meets the same bad config: rank 0 speaks, and torchrun ends the others meanwhile
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(2)
            _tell_torchrun(told, happened)
            print(told, file=sys.stderr, flush=True)
            raise SystemExit(2) from None
        finally:
            sys.stdout.flush()  # a closed pipe is met here, not at the interpreter's exit
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        raise SystemExit(128 + signal.SIGPIPE) from None


def _tell_torchrun(message: str, happened: float) -> None:
    """torchrun's own report, the last thing on the screen, ends with what the worker that failed first has left in this
    file."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    extra = {"py_callstack": message, "timestamp": str(int(happened))}
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump({"message": {"message": message, "extraInfo": extra}}, file)


def first_names(names: Iterable) -> str:
    """The first ten names for an error message, and how many more there are."""
    names = [str(name) for name in names]
    more = f", ... ({len(names) - NAMES_SHOWN:,} more)" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
