"""The samples of a split as one block of JSON lines that all processes of a node share, and what is known about them.

A large file is read once, into a cache folder beside it (or under output_dir where that is not writable) that every
other process and every later start maps into memory: samples.jsonl, rows.npy, index.json, and what was found out about
the samples under given settings. A folder is named after the file's content and is never written to again, so that
runs that use it are safe from an edit of the file and from a job that builds the same. It may be deleted at any time
when no run uses it.
"""

import contextlib
import errno
import hashlib
import io
import json
import mmap
import shutil
import time
import uuid
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from config import Config
from errors import UserError, first_names
from files import file_sha256, flush, full_disk_is_said, read_json_lines, read_json_list, write_json
from templates import CONVERSATION_TEMPLATE, as_conversations, image_paths

VERSION = 1  # of the cache: one of another version is not used
CACHE_FOLDER = ".sample_cache"
IN_MEMORY_BYTES = 2**25  # a smaller file is read at every start, and nothing is left beside it
LEFT_BEHIND_SECONDS = 86_400  # what a build that was killed has left is removed after that
ROWS_HELD = 10_000  # in memory, of a cache that is read from beginning to end
CURE = "correct it, or run prepare_data.py"

_END, _IMAGES, _ID = range(3)  # columns of the table of rows
_encode = json.JSONEncoder(ensure_ascii=False).encode
_decode = json.JSONDecoder().decode


class SampleList(Sequence):
    """Samples of a split as one block of JSON lines: forked workers share it, where a list of dicts would be copied
    page by page as reference counts change."""

    def __init__(self, samples: Iterable[dict], source: str):
        """source: what messages call them, such as the file."""
        block = io.BytesIO()
        self._rows, self.sha256 = _write_lines(samples, block, source)
        self._bytes = np.frombuffer(block.getbuffer(), dtype=np.uint8)
        self.source = source
        self._found: dict[str, dict] = {}
        self._folders: list[Path] = []  # where it is looked up and kept what was found out

    @classmethod
    def mapped(cls, folder: Path, source: str, folders: list[Path]) -> "SampleList":
        """Those of a cache folder."""
        samples = cls.__new__(cls)
        samples._rows = np.load(folder / "rows.npy", mmap_mode="r").view(np.ndarray)
        samples._bytes = np.memmap(folder / "samples.jsonl", dtype=np.uint8, mode="r").view(np.ndarray)
        samples.sha256 = json.loads((folder / "index.json").read_text())["sha256"]
        samples.source, samples._found, samples._folders = source, {}, folders
        return samples

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> dict:
        start = self._rows[row - 1, _END] if row else 0
        return _decode(self._bytes[start : self._rows[row, _END]].tobytes().decode())

    def __iter__(self) -> Iterator[dict]:
        """One after the other; of a mapped file, what has been read leaves this process's memory again."""
        mapped = getattr(self._bytes.base, "base", None)
        for row in range(len(self)):
            yield self[row]
            if row % ROWS_HELD == ROWS_HELD - 1 and isinstance(mapped, mmap.mmap):
                mapped.madvise(mmap.MADV_DONTNEED)

    def name(self, row: int) -> str:
        """How messages call a sample: file, row (counted from 1) and id."""
        return f"{self.source} row {row + 1} (id {self[row]['id']})"

    @property
    def image_keys(self) -> np.ndarray:
        """(samples,): a negative number that samples of the same images share; of one without images, its row."""
        keys = self._rows[:, _IMAGES]
        return np.where(keys < 0, keys, np.arange(len(keys)))

    def one_of_each_image(self) -> Iterator[dict]:
        """The first sample that shows an image, or several together, of each."""
        keys = self.image_keys
        first_rows = np.sort(np.unique(keys, return_index=True)[1])
        return (self[row] for row in first_rows[keys[first_rows] < 0])

    def repeated_ids(self) -> list[str]:
        """The ids that stand for several samples."""
        _, first_rows, counts = np.unique(self._rows[:, _ID], return_index=True, return_counts=True)
        return [self[row]["id"] for row in np.sort(first_rows[counts > 1])]

    def remembered(self, what: str, settings: dict, find_out: Callable[[], dict]) -> dict:
        """`find_out()`, a JSON object; for a cached split it is kept for the next start under the same settings, but
        for one with "problems", which are looked for again when they are mended."""
        name = f"{what}-{_digest(settings)}.json"
        for folder in [] if name in self._found else self._folders:
            with contextlib.suppress(OSError, ValueError):
                self._found[name] = json.loads((folder / name).read_text(encoding="utf-8"))
                break
        if name not in self._found:
            self._found[name] = find_out()
            for folder in [] if self._found[name].get("problems") else self._folders:
                with contextlib.suppress(OSError):
                    folder.mkdir(parents=True, exist_ok=True)
                    write_json(folder / name, self._found[name])
                    break
        return self._found[name]


def _write_lines(samples: Iterable[dict], file, source: str) -> tuple[np.ndarray, str]:
    """Write a line for each sample. Returns the table of rows and the SHA-256 of the lines without their ends.

    The table is (samples, 3): where a line ends in the file, what stands for its images (0: none), what for its id."""
    digest, table, end = hashlib.sha256(), array("q"), 0
    for row, sample in enumerate(samples, 1):
        try:
            line = _encode(sample).encode()
        except UnicodeEncodeError:
            message = "a text holds a lone surrogate (invalid Unicode); correct it"
            raise UserError(f"{source} row {row}: {message}") from None
        digest.update(line)
        end += file.write(line + b"\n")
        try:
            images = image_paths(sample)
        except UserError:  # told when the sample is checked
            images = []
        table.extend((end, _key("\0".join(images)) if images else 0, _key(str(sample.get("id")))))
    return np.array(table, dtype=np.int64).reshape(-1, 3), digest.hexdigest()


def _key(text: str) -> int:
    """A negative number that no other text has, for all that matters: 63 bits of a hash."""
    return -1 - (int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1)


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------------- reading


def read_samples(path, max_samples: int | None = None) -> Iterator[dict]:
    """The samples of a file, one at a time: of a JSON list, or one object a line in a .jsonl file. A sample without an
    id gets its row number. Raises: `UserError` naming file and row."""
    path, row = Path(path), 0
    if path.suffix == ".jsonl":
        values = (sample for _, sample in read_json_lines(path, CURE, nan_allowed=True))
    else:
        values = read_json_list(path, CURE, nan_allowed=True)
    for row, sample in enumerate(values, 1):
        if not isinstance(sample, dict):
            raise UserError(f"{path} row {row}: expected an object, found {type(sample).__name__}")
        sample["id"] = str(sample.get("id", row))
        yield sample
        if row == max_samples:
            break
    if not row:
        raise UserError(f"{path} holds no samples; an empty split can't be used, prepare the data again")


def load_samples(path, max_samples: int | None = None) -> SampleList:
    """The samples of a file, in memory. Raises: as `read_samples`."""
    return SampleList(read_samples(path, max_samples), str(path))


def load_split(config: Config, split: str) -> SampleList:
    """A split of the config as it is trained on and evaluated: with `max_samples` (train), and one conversation per
    image where the template asks for it. A large one comes from its cache, which is built where it is missing: on
    several ranks, see `distributed.in_turns`."""
    path = Path(getattr(config.data, split))
    most = config.max_samples if split == "train" else None
    large = path.is_file() and path.stat().st_size >= IN_MEMORY_BYTES

    def held(form: dict, samples: Callable[[], Iterable[dict]]) -> SampleList:
        return _cached(path, form, samples, config.output_dir) if large else SampleList(samples(), str(path))

    samples = held({"max_samples": most}, lambda: read_samples(path, most))
    if split != "train":  # published training files repeat ids
        refuse_repeated_ids(samples)
    if config.template != CONVERSATION_TEMPLATE:
        return samples
    return held({"max_samples": most, "by": "image"}, lambda: as_conversations(samples))


def refuse_repeated_ids(samples: SampleList) -> None:
    """Raises: `UserError` where an id stands for several samples: their answers could not be told apart."""
    if repeated := samples.repeated_ids():
        raise UserError(
            f"{samples.source}: {len(repeated):,} id(s) repeat: {first_names(repeated)}; make them distinct"
        )


# --------------------------------------------------------------------------------------------------------------- cache


def _cached(path: Path, form: dict, samples: Callable[[], Iterable[dict]], output_dir: str) -> SampleList:
    """The samples of a file in a form, from the cache of its present content, which is built where there is none."""
    roots = [path.absolute().parent / CACHE_FOLDER, Path(output_dir).absolute() / CACHE_FOLDER]
    prefix = f"{path.name}-{_digest([VERSION, form])}-"
    stamp = _stamp(path)
    folders = [folder for root in roots if root.is_dir() for folder in root.iterdir() if folder.name.startswith(prefix)]
    folder = next((folder for folder in folders if (index := _index(folder)) and index["file"] == stamp), None)
    if folder is None:  # the content decides, where size or time differ
        name = prefix + file_sha256(path)[:16]
        folder = next((root / name for root in roots if _index(root / name)), None)
        if folder:
            with contextlib.suppress(OSError):  # another time of the same content: quick the next time
                write_json(folder / "index.json", {**_index(folder), "file": stamp})
        else:
            folder = _build([root / name for root in roots], samples, path, stamp)
    return SampleList.mapped(folder, str(path), [folder, roots[1] / folder.name])


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _index(folder: Path) -> dict | None:
    """The index of a complete cache folder of this version; None of any other."""
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        sizes = [(folder / name).stat().st_size for name in ("samples.jsonl", "rows.npy")]
        return index if index["version"] == VERSION and index["bytes"] == sizes else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _build(folders: list[Path], samples: Callable[[], Iterable[dict]], path: Path, stamp: list[int]) -> Path:
    """The first of the folders that can be written, with the samples of a file in it. Raises: `UserError`."""
    for folder in folders:
        temporary = folder.with_name(f".{folder.name}.tmp-{uuid.uuid4().hex[:8]}")  # two nodes may have equal pids
        try:
            temporary.mkdir(parents=True)
            _remove_left_behind(folder.parent)
            print(f"Reading {path} once, into {folder}", flush=True)
            _write_folder(temporary, samples(), path, stamp)
            _put_into_place(temporary, folder)
            return folder
        except OSError:
            if folder == folders[-1]:
                with full_disk_is_said(folder, "start again"):
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    raise AssertionError("a folder was written, or the last one's error raised")


def _write_folder(folder: Path, samples: Iterable[dict], path: Path, stamp: list[int]) -> None:
    with open(folder / "samples.jsonl", "wb") as file:
        rows, sha256 = _write_lines(samples, file, str(path))
    np.save(folder / "rows.npy", rows)
    if _stamp(path) != stamp:
        raise UserError(f"{path} was changed while it was read; start again when it is written")
    sizes = [flush(folder / name) for name in ("samples.jsonl", "rows.npy")]
    write_json(folder / "index.json", {"version": VERSION, "file": stamp, "bytes": sizes, "sha256": sha256})
    flush(folder)


def _put_into_place(temporary: Path, folder: Path) -> None:
    """Rename, unless another job that built the same was quicker. What is there and unusable is removed."""
    while True:
        try:
            temporary.rename(folder)
            flush(folder.parent)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if _index(folder):
            return
        with contextlib.suppress(FileNotFoundError):  # another job has just done it
            folder.rename(unusable := temporary.with_name(temporary.name + "-old"))
            shutil.rmtree(unusable, ignore_errors=True)


def _remove_left_behind(root: Path) -> None:
    for folder in root.glob(".*.tmp-*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > LEFT_BEHIND_SECONDS:
                shutil.rmtree(folder)
