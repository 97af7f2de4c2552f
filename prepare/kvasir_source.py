"""Read Kvasir-VQA in either of its published forms: a folder with metadata.csv, or parquet from its hub."""

import contextlib
import csv
import hashlib
import os
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from errors import UserError, first_names

COLUMNS = ("source", "question", "answer", "img_id")
INSTALL = "pip install -r requirements-extra.txt"
SUFFIXES = {b"\xff\xd8": ".jpg", b"\x89P": ".png"}  # by a file's first two bytes


@dataclass
class Raw:
    """The set as read."""

    rows: list[dict]  # every column of COLUMNS, stripped, and "row": its number for messages
    images: dict[str, str]  # img_id -> path relative to image_root, as the samples will say it
    folder: Path  # where those paths start while we work
    image_root: Path  # where they start when we are done
    unused_images: int  # files in images/ that no row names

    def move_images(self) -> None:
        """Put images that came out of parquet files in their final place. Other files there are left alone."""
        if self.folder == self.image_root:
            return
        try:
            for path in self.images.values():
                (self.image_root / path).parent.mkdir(parents=True, exist_ok=True)
                os.replace(self.folder / path, self.image_root / path)
        except OSError as error:
            raise UserError(f"{self.image_root}: cannot put the images there ({error})") from None


@contextlib.contextmanager
def opened(source: str, out: Path) -> Iterator[Raw]:
    """Read `source`: a folder with images/ and metadata.csv, a folder of parquet files, or a hub name.

    Images from parquet lie in a temporary folder inside `out` until `move_images`; leaving the context removes it.
    """
    folder = Path(source)
    if (folder / "metadata.csv").is_file():
        yield _read_folder(folder)
        return
    parquet = sorted(str(path) for path in folder.rglob("*.parquet")) if folder.is_dir() else []
    if not parquet and (folder.exists() or source.count("/") != 1 or source.startswith((".", "/", "~"))):
        found = (
            "has neither metadata.csv (with images/ beside it) nor parquet files" if folder.is_dir() else "is no folder"
        )
        raise UserError(
            f"--source {source} {found}; give the folder of the published set, or a hub name such as ORG/NAME"
        )
    is_new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=".partial-") as partial:
            yield _read_parquet(source, parquet, Path(partial), out)
    finally:
        if is_new:
            with contextlib.suppress(OSError):
                out.rmdir()  # only succeeds while it is empty, that is, when nothing came of it


def _read_folder(folder: Path) -> Raw:
    path = folder / "metadata.csv"
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # -sig: spreadsheets put a byte order mark first
            reader = csv.DictReader(file, strict=True)
            _check_columns(reader.fieldnames or (), path)
            rows = []
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(
                        f"{path} line {reader.line_num}: {len(reader.fieldnames)} columns expected; repair it"
                    )
                rows.append({key: row[key].strip() for key in COLUMNS} | {"row": reader.line_num})
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except (OSError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    images = _image_paths(rows)
    missing = [path for path in images.values() if not (folder / path).is_file()]
    if missing:
        raise UserError(
            f"{len(missing):,} of {len(images):,} images named in {path} are missing in {folder / 'images'}: "
            f"{first_names(missing)}; fetch them, or remove their rows"
        )
    used = set(images.values())
    unused = sum(f"images/{path.name}" not in used for path in folder.glob("images/*") if path.is_file())
    return Raw(rows, images, folder, folder, unused)


def _image_paths(rows: list[dict], suffix: str = ".jpg") -> dict[str, str]:
    """img_id -> images/<img_id>.jpg, for ids that are plain file names."""
    wrong = [f"row {row['row']} ('{row['img_id']}')" for row in rows if not _is_plain_name(row["img_id"])]
    if wrong:
        raise UserError(f"{len(wrong)} row(s) whose img_id is empty or no plain file name: {first_names(wrong)}")
    return {row["img_id"]: f"images/{row['img_id']}{suffix}" for row in rows}


def _is_plain_name(name: str) -> bool:
    return bool(name) and not name.startswith(".") and not set(name) & set("/\\\0")


def _read_parquet(source: str, parquet: list[str], partial: Path, out: Path) -> Raw:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"--source {source}: parquet files and hub names need the datasets library: {INSTALL}"
        ) from None
    try:
        if parquet:  # streaming: no second copy of the set in the library's cache
            parts = [datasets.load_dataset("parquet", data_files=parquet, split="train", streaming=True)]
        else:
            parts = list(datasets.load_dataset(source).values())
        for part in parts:
            _check_columns(part.column_names or next(iter(part), ()), source, (*COLUMNS, "image"))
        # the file as it was published, byte for byte, instead of decoded pixels
        parts = [part.cast_column("image", datasets.Image(decode=False)) for part in parts]
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"--source {source}: no folder of that name here, and not readable as a data set ({reason})"
        ) from None
    rows, images, digests, changed, absent = [], {}, {}, {}, []
    (partial / "images").mkdir()
    for number, row in enumerate(
        tqdm((row for part in parts for row in part), desc="rows", unit="row", disable=None), 1
    ):
        image = row["image"]
        rows.append({key: str(row[key] if row[key] is not None else "").strip() for key in COLUMNS} | {"row": number})
        img_id = rows[-1]["img_id"]
        _image_paths(rows[-1:])
        content = image and (
            image["bytes"] or (Path(image["path"]).read_bytes() if os.path.isfile(image["path"] or "") else None)
        )
        if not content:
            absent.append(f"row {number} ({img_id})")
            continue
        digest = hashlib.sha256(content).digest()
        if digests.setdefault(img_id, digest) != digest:
            changed[img_id] = True
        if img_id not in images:
            images[img_id] = f"images/{img_id}{SUFFIXES.get(content[:2], '.jpg')}"
            (partial / images[img_id]).write_bytes(content)
    if absent:
        raise UserError(f"--source {source}: {len(absent)} row(s) without an image: {first_names(absent)}")
    if changed:
        raise UserError(f"--source {source}: {len(changed)} img_id(s) stand for several images: {first_names(changed)}")
    return Raw(rows, images, partial, out, 0)


def _check_columns(found: Collection[str], where: str | Path, wanted: Collection[str] = COLUMNS) -> None:
    missing = [column for column in wanted if column not in found]
    if missing:
        raise UserError(f"{where}: column(s) {', '.join(missing)} missing; found {', '.join(found) or 'none'}")
