"""The rows of a source, one object for each sample, and what is wrong with those that cannot be used."""

import contextlib
import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from errors import UserError, first_names
from files import read_json, read_json_lines, write_text

REFUSED = "refused_rows.jsonl"
SUFFIXES = (".json", ".jsonl", ".csv")
WRITTEN = ("train.json", "val.json", "test.json", "report.md", REFUSED)  # by every kind of source


def read_rows(source: Path) -> list[dict]:
    """The objects of a .jsonl file, or of a .json file with a list of them.

    Raises: `UserError` with the line.
    """
    cure = "give a .jsonl or .json file with one object for each sample"
    if source.suffix == ".json":
        rows = read_json(source, cure, nan_allowed=True)
    else:
        rows = [row for _, row in read_json_lines(source, cure, nan_allowed=True)]
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{source}: expected one JSON object a line, or a list of objects; {cure}")
    return rows


def read_table(path: Path) -> list[dict]:
    """The rows of a CSV file whose first line names the columns; empty cells are left out.

    Raises: `UserError` with the line."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # -sig: spreadsheets put a byte order mark first
            reader = csv.DictReader(file, strict=True)
            rows = []
            for row in reader:
                if None in row or None in row.values():
                    columns = len(reader.fieldnames)
                    raise UserError(f"{path} line {reader.line_num}: {columns} columns expected; repair it")
                rows.append({key.strip(): cell.strip() for key, cell in row.items() if cell.strip()})
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except (OSError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not rows:
        raise UserError(f"{path}: no rows under the line that names the columns")
    return rows


def source_files(source: Path, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """The file itself, or every data file that lies directly in a folder. Raises: `UserError` where there is none."""
    if not source.is_dir():
        return [source]
    written_by_us = (REFUSED, "near_identical.json")
    found = sorted(path for path in source.iterdir() if path.suffix in suffixes and path.name not in written_by_us)
    if not found:
        raise UserError(
            f"--source {source}: no {', '.join(suffixes)} file in this folder; give the file, or its folder"
        )
    return found


def refuse_overwriting(sources: Iterable[Path], out: Path, more: Iterable[str] = ()) -> None:
    """Raises: `UserError` where a file of the source is one that would be written, or removed, in `out`, under whatever
    path. more: names of such files beside `WRITTEN`."""
    written = {(out / name).resolve() for name in (*WRITTEN, *more)}
    for source in sources:
        if source.resolve() in written:
            raise UserError(f"--source {source} is a file that --out {out} would overwrite; give another --out")


class RowProblems:
    """What is wrong with the rows of a source, gathered so that one error names them all and one file lists them.

    out: where the list is written. drop: the caller goes on without these rows.
    """

    def __init__(self, source: Path, out: Path | None = None, drop: bool = False):
        self.source, self.out, self.drop = source, out, drop
        self.found: list[dict] = []

    @contextlib.contextmanager
    def of_row(self, number: int, image: object = None, file: Path | None = None) -> Iterator[None]:
        """Keeps the `UserError` of the code inside. number: the row's, counted from 1, in the file (the source)."""
        try:
            yield
        except UserError as error:
            self.found.append({"file": str(file or self.source), "row": number, "image": image, "problem": str(error)})

    def list_text(self) -> str | None:
        """The refused rows as JSON lines; None where there are none."""
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.found) or None

    def refuse(self) -> None:
        """Raises: `UserError` where anything was wrong, unless such rows are dropped."""
        if self.found and not self.drop:
            shown = first_names(f"{row['file']} row {row['row']}: {row['problem']}" for row in self.found)
            self.refuse_as(f"{len(self.found):,} row(s) cannot be used: {shown}")

    def refuse_as(self, message: str) -> None:
        """Raises: `UserError` of this message, after the list is written."""
        if self.out is None:
            raise UserError(f"{message}. Nothing was written")
        self.out.mkdir(parents=True, exist_ok=True)
        write_text(self.out / REFUSED, self.list_text())
        raise UserError(
            f"{message}. Nothing was written but {self.out / REFUSED}, which lists every such row. Correct them, or go "
            "on without them: --drop-refused"
        )

    def refuse_all_dropped(self, kept: int) -> None:
        """Raises: `UserError` where dropping has left nothing."""
        if not kept:
            self.drop = False
            self.refuse()


def refuse_lone_surrogates(row: dict) -> None:
    """Raises: `UserError` without the row's name. JSON can spell one, no UTF-8 file can hold it."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError("a text holds a lone surrogate (invalid Unicode); correct it") from None
