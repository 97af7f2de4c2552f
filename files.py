"""Files and folders that appear whole or not at all: written beside their place, flushed to the disk, renamed last.
And JSON read with errors that name file and line."""

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from errors import UserError

RESUME = "start again: the run resumes from the checkpoint before"


def save_atomically(folder: Path, write, then: str = RESUME) -> tuple[int, float]:
    """Let `write(temporary_folder)` fill a folder that appears under its name only when it is complete and on disk.

    Returns (bytes, seconds). Raises: `UserError` with path and free space where the disk is full or not writable;
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


@contextlib.contextmanager
def folder_beside(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, to be filled instead of it. At the end it takes the place of what was there;
    where anything raises, what was there before stays, and nothing is left."""
    temporary, old = (folder.with_name(f".{folder.name}.{kind}-{os.getpid()}") for kind in ("tmp", "old"))
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    finally:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def refuse_unusable_folder(folder: Path, name: str) -> None:
    """Raises: `UserError` where no file could be written into `folder`, or no folder be made there. name: what the user
    calls it, such as --out."""
    nearest = _nearest(folder.absolute())
    if not nearest.is_dir():
        kind = "a link to nothing" if nearest.is_symlink() and not nearest.exists() else "no folder"
        raise UserError(f"{name} {folder}: {nearest} is {kind}; give another place")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{name} {folder}: {nearest} is not writable; give another place")


def write_text(path: Path, text: str) -> None:
    """Write beside, rename last."""
    with written_beside(path) as (temporary,):
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


# ------------------------------------------------------------------------------------------------------------- reading


def read_json(path: Path, what_to_do: str, nan_allowed: bool = False):
    """The value in a JSON file. what_to_do: the cure that the message ends with, such as "run evaluate.py again".
    nan_allowed: for files of others, in which pandas writes it for a missing value.

    Raises: `UserError` with file, line and cure where it cannot be read or is not JSON (NaN is not)."""
    return _parse(_read_text(path, what_to_do), f"{path} line ", 1, what_to_do, nan_allowed)


def read_json_lines(path: Path, what_to_do: str, nan_allowed: bool = False) -> list[tuple[int, object]]:
    """(line number, value) of each line of a .jsonl file that is not blank. Raises: as `read_json`."""
    lines = enumerate(_read_text(path, what_to_do).split("\n"), 1)  # not splitlines: a text may hold U+2028
    lines = [(number, line) for number, line in lines if line.strip()]
    return [(number, _parse(line, f"{path} line ", number, what_to_do, nan_allowed)) for number, line in lines]


def _read_text(path: Path, what_to_do: str) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8-sig")  # -sig: some editors put a byte order mark first
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); {what_to_do}") from None
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path} line {number}: not UTF-8 text ({error.reason}); {what_to_do}") from None


def _parse(text: str, where: str, first_line: int, what_to_do: str, nan_allowed: bool):
    line = first_line
    try:
        return (_LENIENT if nan_allowed else _STRICT).decode(text)
    except json.JSONDecodeError as error:
        line, reason = first_line + error.lineno - 1, error.msg
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as error:  # NaN, or a number that no float can hold: arithmetic would fail far from here
        reason = str(error)
    raise UserError(f"{where}{line}: not valid JSON ({reason}); {what_to_do}")


def _refuse_constant(name: str):
    raise ValueError(f"{name} is no JSON number")


def _int(digits: str) -> int:
    if len(digits) > 300:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {digits[:20]} is too large")
    return value


_LENIENT = json.JSONDecoder(parse_int=_int, parse_float=_float)
_STRICT = json.JSONDecoder(parse_constant=_refuse_constant, parse_int=_int, parse_float=_float)
