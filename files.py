"""Files and folders that appear whole or not at all: written beside their place, flushed to the disk, renamed last."""

import contextlib
import json
import os
import shutil
import time
from pathlib import Path

from errors import UserError


def save_atomically(folder: Path, write) -> tuple[int, float]:
    """Let `write(temporary_folder)` fill a folder that appears under its name only when it is complete and on disk.

    Returns (bytes, seconds). Errors: `UserError` with path and free space where the disk is full or not writable;
    what was there before stays, and nothing partial is left."""
    started = time.perf_counter()
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        with full_disk_is_said(folder):
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
def full_disk_is_said(folder: Path):
    """Errors: `UserError` with path and free space. torch and safetensors report a full disk in words of their own."""
    try:
        yield
    except Exception as error:
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(folder.parent).free
            if isinstance(error, OSError) or "No space left" in str(error) or "unexpected pos" in str(error):
                raise UserError(
                    f"cannot save {folder} ({' '.join(str(error).split())}); {free / 1e9:.2f} GB are free there. "
                    "Free some space and start again: the run resumes from the checkpoint before"
                ) from None
        raise


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


def write_text(path: Path, text: str) -> None:
    """Write beside, rename last."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
