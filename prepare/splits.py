"""Cut groups of samples into train, val and test, put them in a repeatable order, and write all files or none.

Orders come from hashes of (seed, key), not from a random generator: they are the same on every machine and Python
version, whatever order the rows were read in.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from errors import UserError
from files import flush, written_beside

SPLITS = ("train", "val", "test")


def parse_split(text: str, without_train: bool = False) -> tuple[float, float, float]:
    """`70/15/15` -> per cent of train, val and test. A split of 0 gives an empty file. without_train: train may be 0,
    as in a set that is only for testing."""
    try:
        percents = tuple(float(part) for part in text.split("/"))
    except ValueError:
        percents = ()
    # not(...) so that nan fails as well
    enough = len(percents) == 3 and min(percents) >= 0 and (without_train or percents[0] > 0)
    if not (enough and abs(sum(percents) - 100) < 1e-6):
        example = "such as 70/15/15, or 0/0/100" if without_train else "the first above 0, such as 70/15/15"
        raise UserError(f"--split {text}: give three per cents for train/val/test that add up to 100, {example}")
    return percents


def shuffled(items: Iterable, seed: int, salt: str, key: Callable = str) -> list:
    """The items in an order that depends on the seed, the salt and each item's own (unique) key alone."""
    return sorted(items, key=lambda item: hashlib.sha256(f"{seed}/{salt}/{key(item)}".encode()).digest())


def assign_groups(sizes: Mapping[str, int], percents: tuple[float, float, float], seed: int) -> dict[str, str]:
    """Put whole groups into splits: group -> `train`, `val` or `test`.

    `sizes` is group -> number of things the per cents count (images, papers). Groups are dealt in seeded order, each
    to the split that is furthest below its share, so that no split that was asked for stays empty.
    """
    wanted = {split: share for split, share in zip(SPLITS, percents, strict=True) if share > 0}
    if len(sizes) < len(wanted):
        raise UserError(
            f"{len(sizes)} group(s) of identical images cannot fill {len(wanted)} splits: "
            "give more images, or fewer splits (--split 100/0/0)"
        )
    dealt = dict.fromkeys(wanted, 0)
    assigned = {}
    for group in shuffled(sizes, seed, "split"):
        split = min(wanted, key=lambda split: dealt[split] / wanted[split])  # ties: in the order of SPLITS
        assigned[group] = split
        dealt[split] += sizes[group]
    return assigned


def json_list(samples: Iterable[dict]) -> str:
    """A JSON list with one sample per line, so that `diff` and `head` are of use."""
    lines = [json.dumps(sample, ensure_ascii=False) for sample in samples]
    return "[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n"


def write_whole(
    folder: Path, files: Mapping[str, str | None], before_renaming: Callable[[], None] = lambda: None
) -> None:
    """Write every text beside its place first and rename them last: all of them change, or none.

    A text of None removes an older file of that name. `before_renaming` is called when every text is on the disk.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    texts = {folder / name: text for name, text in files.items() if text is not None}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with written_beside(*texts) as temporary:
            for path, text in zip(temporary, texts.values(), strict=True):
                path.write_text(text, encoding="utf-8", newline="\n")
                flush(path)
            before_renaming()
        for name in files.keys() - {path.name for path in texts}:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot write the data set there ({error}); free the place and run again") from None
    finally:
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()  # works only while it is empty, that is, when nothing came of it
