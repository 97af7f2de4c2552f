"""Files and folders that appear whole or not at all: written beside their place, flushed to the disk, renamed last.
And JSON read with errors that name file and line."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from errors import UserError

RESUME = "start again: the run resumes from the checkpoint before"


def save_atomically(folder: Path, write, then: str = RESUME) -> tuple[int, float]:
    """Let `write(temporary_folder)` fill a folder that appears under its name only when it is complete and on disk.

    Returns (bytes, seconds). Errors: `UserError` with path and free space where the disk is full or not writable;
    what was there before stays, and nothing partial is left."""
    started = time.perf_counter()
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        with full_disk_is_said(folder, then):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            write(temporary)
            mode = 0o666 & ~_umask()
            files = [path for path in temporary.rglob("*") if path.is_file()]
            for path in files:
                path.chmod(mode)  # safetensors makes its files private to the user, and colleagues share checkpoints
            size = sum(map(flush, files))
            flush(temporary)
            if folder.exists():  # incomplete, and already reported; moved aside, so that nothing is ever half deleted
                folder.rename(folder.with_name(f".deleted-{folder.name}"))
            temporary.rename(folder)
            flush(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return size, time.perf_counter() - started


@contextlib.contextmanager
def full_disk_is_said(folder: Path, then: str = RESUME):
    """Raises: `UserError` with path and free space. torch and safetensors report a full disk in words of their own.

    then: what to do when there is space again."""
    try:
        yield
    except Exception as error:
        told = " ".join(str(error).split())
        if "No space left" in told or "unexpected pos" in told or "quota exceeded" in told:
            free = shutil.disk_usage(_nearest(folder.absolute().parent)).free
            raise UserError(
                f"cannot save {folder} ({told}); {free / 1e9:.2f} GB are free there. Free some space and {then}"
            ) from None
        if isinstance(error, OSError):
            raise UserError(f"cannot save {folder} ({told}); mend this, or choose another place") from None
        raise


def check_place(folder: Path, name: str) -> None:
    """Raises: `UserError` where a folder could not be made and written to. name: what messages call it."""
    nearest = _nearest(folder.absolute())
    if not nearest.is_dir():
        what = "a link to nowhere" if nearest.is_symlink() else "no folder"
        raise UserError(f"{name}: nothing can be written in {folder}: {nearest} is {what}; choose another place")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"{name}: nothing can be written in {folder}: {nearest} is read-only; choose another place")


def _nearest(path: Path) -> Path:
    """The path itself, or the first one above it that is there."""
    return next(place for place in (path, *path.parents) if os.path.lexists(place))


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def flush(path: Path) -> int:
    """fsync a file or folder; returns its size in bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def written_beside(*paths: Path) -> Iterator[list[Path]]:
    """Temporary paths beside `paths`, to be written instead of them. At the end all are flushed and renamed into place;
    where anything raises, none is, what was there before stays, and nothing is left."""
    temporary = [path.with_name(f".{path.name}.tmp-{os.getpid()}") for path in paths]
    try:
        yield temporary
        for path in temporary:
            flush(path)
        for path, final in zip(temporary, paths, strict=True):
            path.replace(final)
    finally:
        for path in temporary:
            with contextlib.suppress(OSError):
                path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write beside, rename last."""
    with written_beside(path) as (temporary,):
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


# ------------------------------------------------------------------------------------------------------------- reading


def read_json(path: Path, what_to_do: str):
    """The value in a JSON file. what_to_do: the cure that the message ends with, such as "run evaluate.py again".

    Raises: `UserError` with file, line and cure where it cannot be read or is not JSON (NaN is not)."""
    return _parse(_read_text(path, what_to_do), f"{path} line ", 1, what_to_do)


def read_json_lines(path: Path, what_to_do: str) -> list[tuple[int, object]]:
    """(line number, value) of each line of a .jsonl file that is not blank. Raises: as `read_json`."""
    lines = enumerate(_read_text(path, what_to_do).split("\n"), 1)  # not splitlines: a text may hold U+2028
    return [(number, _parse(line, f"{path} line ", number, what_to_do)) for number, line in lines if line.strip()]


def _read_text(path: Path, what_to_do: str) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8-sig")  # -sig: some editors put a byte order mark first
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); {what_to_do}") from None
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path} line {number}: not UTF-8 text ({error.reason}); {what_to_do}") from None


def _parse(text: str, where: str, first_line: int, what_to_do: str):
    line = first_line
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        line, reason = first_line + error.lineno - 1, error.msg
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as error:  # NaN, or a number of thousands of digits
        reason = str(error).partition(";")[0]
    raise UserError(f"{where}{line}: not valid JSON ({reason}); {what_to_do}")


def _refuse_constant(name: str):
    raise ValueError(f"{name} is no JSON number")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
