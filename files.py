"""Files and folders that appear whole or not at all: written beside their place, flushed to the disk, renamed last.
And JSON read with errors that name file and line."""

import codecs
import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from errors import UserError

CHUNK_BYTES = 2**22  # of a file, looked at at a time
LONGEST_TOKEN = 16  # characters of JSON's longest one that is no text, such as -Infinity

_WHITE_SPACE = re.compile(r"[ \t\n\r]*")

RESUME = "start again: the run resumes from its newest checkpoint"


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
def full_disk_is_said(path: Path, then: str = RESUME):
    """Raises: `UserError` with path and free space. torch and safetensors report a full disk in words of their own.

    path: the file or folder that is written. then: what to do when there is space again."""
    try:
        yield
    except Exception as error:
        told = " ".join(str(error).split())
        if "No space left" in told or "unexpected pos" in told or "quota exceeded" in told:
            free = shutil.disk_usage(_nearest(path.absolute().parent)).free
            raise UserError(
                f"cannot save {path} ({told}); {free / 1e9:.2f} GB are free there. Free some space and {then}"
            ) from None
        if isinstance(error, OSError):
            raise UserError(f"cannot save {path} ({told}); mend this, or choose another place") from None
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
    """Temporary paths beside `paths`, to be written instead of them. At the end all are flushed before the first is
    renamed into place; where the caller raises, none is, what was there before stays, and nothing is left."""
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


def file_sha256(path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(CHUNK_BYTES):
            digest.update(part)
    return digest.hexdigest()


def complete_json_lines(path: Path) -> Iterator:
    """The values of a file of JSON lines, none where there is no file. The last line of a killed run may be cut, and is
    left out: no list or object that lacks its end is JSON."""
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        with contextlib.suppress(ValueError):  # of a line cut inside a character, too
            yield json.loads(line)


def read_json(path: Path, what_to_do: str, nan_allowed: bool = False):
    """The value in a JSON file. what_to_do: the cure that the message ends with, such as "run evaluate.py again".
    nan_allowed: for files of others, in which pandas writes it for a missing value.

    Raises: `UserError` with file, line and cure where it cannot be read or is not JSON (NaN is not)."""
    return _parse(_read_text(path, what_to_do), f"{path} line ", 1, what_to_do, nan_allowed)


def read_json_lines(path: Path, what_to_do: str, nan_allowed: bool = False) -> Iterator[tuple[int, object]]:
    """(line number, value) of each line of a .jsonl file that is not blank, one at a time. Raises: as `read_json`."""
    with _opened(path, what_to_do) as file:
        for number, line in enumerate(file, 1):  # split at \n alone: a text may hold U+2028
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path} line {number}: not UTF-8 text ({error.reason}); {what_to_do}") from None
            if text.strip():
                yield number, _parse(text, f"{path} line ", number, what_to_do, nan_allowed)


def read_json_list(path: Path, what_to_do: str, nan_allowed: bool = False) -> Iterator:
    """The values of a JSON list, one at a time: a list of a million samples needs several times its file's size as
    Python objects. Raises: as `read_json`, and where the file holds no list."""
    with _opened(path, what_to_do) as file:
        text = _JsonText(file, path, what_to_do, _LENIENT if nan_allowed else _STRICT)
        if text.next_character() != "[":
            value = read_json(path, what_to_do, nan_allowed)
            raise UserError(f"{path}: expected a list of samples, found {type(value).__name__}; {what_to_do}")
        text.at += 1
        if text.next_character() != "]":
            yield text.value()
            while text.next_character() == ",":
                text.at += 1
                text.next_character()
                yield text.value()
        text.expect("]", "Expecting ',' delimiter")
        text.expect("", "Extra data")


@contextlib.contextmanager
def _opened(path: Path, what_to_do: str):
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); {what_to_do}") from None


def _read_text(path: Path, what_to_do: str) -> str:
    try:
        with _opened(path, what_to_do) as file:
            return file.read().decode("utf-8-sig")  # -sig: some editors put a byte order mark first
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path} line {number}: not UTF-8 text ({error.reason}); {what_to_do}") from None


class _JsonText:
    """The part of a JSON file that is being looked at: `text` from `at` on."""

    def __init__(self, file, path: Path, what_to_do: str, decoder: json.JSONDecoder):
        self.file, self.path, self.what_to_do, self.decoder = file, path, what_to_do, decoder
        self.utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.line, self.is_all = "", 0, 1, False  # line: the number of the text's first one

    def read_more(self) -> None:
        """Drop what is done with and read on, twice as much as is left: a value may be as large as the file."""
        data = self.file.read(max(CHUNK_BYTES, len(self.text) - self.at))
        self.is_all = not data
        self.line += self.text.count("\n", 0, self.at)
        self.text, self.at = self.text[self.at :], 0
        try:
            self.text += self.utf8.decode(data, final=self.is_all)
        except UnicodeDecodeError as error:
            line = self.line + self.text.count("\n") + error.object[: error.start].count(b"\n")
            raise self.error(line, None, f"not UTF-8 text ({error.reason})") from None

    def next_character(self) -> str:
        """The next one that is not white space; "" at the end."""
        while True:
            self.at = _WHITE_SPACE.match(self.text, self.at).end()
            if self.at < len(self.text) or self.is_all:
                return self.text[self.at : self.at + 1]
            self.read_more()

    def expect(self, character: str, otherwise: str) -> None:
        if self.next_character() != character:
            raise self.error(self.line, self.at, f"not valid JSON ({otherwise})")
        self.at += len(character)

    def value(self):
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
                if end < len(self.text) or self.is_all:
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                cut_short = error.msg.startswith("Unterminated") or error.pos + LONGEST_TOKEN > len(self.text)
                if self.is_all or not cut_short:
                    raise self.error(self.line, error.pos, f"not valid JSON ({error.msg})") from None
            except RecursionError:
                raise self.error(self.line, self.at, "not valid JSON (nested too deeply)") from None
            except ValueError as error:
                raise self.error(self.line, self.at, f"not valid JSON ({error})") from None
            self.read_more()

    def error(self, line: int, position: int | None, reason: str) -> UserError:
        """position: in the text, if `line` is that of its beginning."""
        line += self.text.count("\n", 0, position) if position else 0
        return UserError(f"{self.path} line {line}: {reason}; {self.what_to_do}")


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
