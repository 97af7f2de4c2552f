"""A .json or .jsonl source, one object for each sample: its rows, and one error for all that cannot be used."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from errors import UserError, first_names
from files import read_json, read_json_lines


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


class RowProblems:
    """What is wrong with the rows of a source, gathered so that one error names them all."""

    def __init__(self, source: Path):
        self.source = source
        self.found: list[str] = []

    @contextlib.contextmanager
    def of_row(self, number: int) -> Iterator[None]:
        """Keeps the `UserError` of the code inside. number: the row's, counted from 1."""
        try:
            yield
        except UserError as error:
            self.found.append(f"{self.source} row {number}: {error}")

    def refuse(self) -> None:
        """Raises: `UserError` where anything was wrong."""
        if self.found:
            count = f"{len(self.found):,} row(s) cannot be used, nothing was written"
            raise UserError(f"{count}: {first_names(self.found)}")


def refuse_lone_surrogates(row: dict) -> None:
    """Raises: `UserError` without the row's name. JSON can spell one, no UTF-8 file can hold it."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError("a text holds a lone surrogate (invalid Unicode); correct it") from None
