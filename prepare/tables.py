"""What a preparer tells: a table of counts by split, as Markdown for report.md and in columns on the console."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path

from prepare.splits import SPLITS

Table = list[list[str]]  # its rows as texts, the header first


def split_table(
    heading: str,
    by_split: Mapping[str, list[dict]],
    kind_of: Callable[[dict], Hashable],
    kinds: Mapping[Hashable, str],
) -> Table:
    """How many samples of each kind every split has, with totals. kinds: what `kind_of` returns -> its name."""
    counts = {split: Counter(map(kind_of, by_split[split])) for split in SPLITS}
    rows = [(name, [counts[split][kind] for split in SPLITS]) for kind, name in kinds.items()]
    rows.append(("all", [len(by_split[split]) for split in SPLITS]))
    numbered = [[name, *(f"{number:,}" for number in (*numbers, sum(numbers)))] for name, numbers in rows]
    return [[heading, *SPLITS, "all"], *numbered]


def count_table(counts: Mapping[str, int]) -> Table:
    return [["what", "count"], *([what, f"{number:,}"] for what, number in counts.items())]


def markdown(table: Table) -> str:
    """The table as Markdown, with columns of numbers aligned to the right."""
    rule = ["---:" if cell.replace(",", "").isdecimal() else "---" for cell in table[1]]
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in table]
    return "\n".join(f"| {' | '.join(row)} |" for row in [escaped[0], rule, *escaped[1:]])


def print_summary(
    table: Table, counts: Mapping[str, int], notes: Iterable[str], out: Path, written: Iterable[str], image_root: Path
) -> None:
    """The table, what was counted, the notes, and what to write into a config."""
    width = max(len(row[0]) for row in table)
    for row in table:
        print(row[0].ljust(width) + "".join(cell.rjust(9) for cell in row[1:]))
    print()
    for what, number in counts.items():
        print(f"{number:9,} {what}")
    for note in notes:
        print(f"\n{note}")
    print(f"\nwritten to {out}: {', '.join(written)}")
    print("for the config:\n  data:")
    for split, number in zip(SPLITS, table[-1][1:], strict=False):
        if number != "0":  # an empty split cannot be used
            print(f"    {split}: {out / f'{split}.json'}")
    print(f"    image_root: {image_root}")
