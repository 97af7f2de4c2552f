"""Kvasir-VQA-x1 as published -> samples by split, a report and a config. `prepare_data.py kvasir-x1` calls `prepare`.

Kvasir-VQA-x1 (Gautam et al. 2025, arXiv 2506.09958): 159,549 questions in three levels of complexity, with answers in
sentences, about the images of Kvasir-VQA, named by their ids. Its own split is reported to share images.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import leakage
from errors import UserError
from images import upright_size
from prepare import splits, starting_config, tables
from prepare.kvasir import items
from prepare.kvasir_source import INSTALL
from prepare.rows import REFUSED, RowProblems, refuse_overwriting
from prepare.splits import SPLITS
from report.free_form import are_sentences

COLUMNS = ("img_id", "complexity", "question", "answer")
OFFICIAL = "official"
PUBLISHED = {"train": "train", "test": "test", "validation": "val", "val": "val"}  # a file's or split's name -> ours
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
STAGES = {level: f"complexity {level}" for level in (1, 2, 3)}


def prepare(
    source: str,
    out: str,
    images: str,
    seed: int,
    split: str,
    answers: str,
    drop_refused: bool,
    config: str | None,
    model_name: str,
) -> None:
    """Read, check, split, write, and print the table. See `prepare_data.py kvasir-x1 --help`. Raises: `UserError`."""
    percents = None if split == OFFICIAL else splits.parse_split(split, without_train=True)
    factor = starting_config.size_factor(model_name)
    out, folder = Path(out), Path(images)
    refuse_overwriting([Path(source)], out)
    named = find_images(folder)
    problems, samples, row_of, rows_read = RowProblems(Path(source), out, drop_refused), {}, {}, 0
    for file, number, published, row in read_source(source):
        rows_read += 1
        with problems.of_row(number, row.get("img_id"), file):
            sample = to_sample(row, published, named, folder)
            samples.setdefault(sample["id"], sample)  # an id is its image, question and answer: repeats are kept once
            row_of.setdefault(sample["id"], (number, file))
    prints, broken = leakage.fingerprint([folder / path for path in {sample["image"] for sample in samples.values()}])
    usable = []
    for sample in samples.values():
        number, file = row_of[sample["id"]]
        with problems.of_row(number, sample["image"], file):
            path = folder / sample["image"]
            if path in broken:
                raise UserError(broken[path])
            if split == OFFICIAL and "official_split" not in sample:
                raise UserError("no part of the published split: its files are called train-*.parquet, test-*.parquet")
            usable.append(sample | {"group": prints[path].sha256[:16]})
    problems.refuse()
    problems.refuse_all_dropped(len(usable))
    free_form = are_sentences(sample["answer"] for sample in usable) if answers == "auto" else answers == "sentences"
    samples = [{**sample, "free_form": free_form} for sample in usable]

    sizes = Counter({sample["image"]: sample["group"] for sample in samples}.values())
    split_of = splits.assign_groups(sizes, percents, seed) if percents else None
    by_split = {name: [] for name in SPLITS}
    place = {group: number for number, group in enumerate(splits.shuffled(sizes, seed, "order"))}
    for sample in sorted(samples, key=lambda sample: (place[sample["group"]], sample["stage"])):
        by_split[split_of[sample["group"]] if split_of else sample["official_split"]].append(sample)
    shared = shared_groups(by_split)
    on_shared = sum(sample["group"] in shared for sample in by_split["test"])
    counts = {
        "rows read (159,549 are published)": rows_read,
        f"rows refused and dropped, listed in {REFUSED}": len(problems.found),
        "exact repeats, dropped": rows_read - len(samples) - len(problems.found),
        "samples kept": len(samples),
        "images (img_id)": len({sample["image"] for sample in samples}),
        "distinct images": len(sizes),
        "distinct images in test and in train": len(shared),
        "test samples on images that train has": on_shared,
        "... of the official split": official_overlap(samples),
    }
    table = tables.split_table("complexity", by_split, lambda sample: sample["stage"], STAGES)
    files = {f"{name}.json": splits.json_list(by_split[name]) for name in SPLITS}
    files[REFUSED] = problems.list_text()
    settings = [f"seed {seed}", f"split {split}", f"images {images}", f"answers {answers}"]
    files["report.md"] = report(source, settings, table, counts, free_form, split_of is None)
    splits.write_whole(out, files)
    notes = []
    if shared:
        notes.append(
            f"WARNING: {on_shared:,} test samples are about images that train has: their scores measure memory as well "
            "as skill. Without --split official no image is in two splits"
        )
    tables.print_summary(table, counts, notes, out, [name for name in files if files[name]], folder)
    largest = max(side for path in prints for side in upright_size(path))
    starting_config.write(
        config,
        out,
        folder,
        by_split,
        model_name,
        starting_config.fitting_size(largest, factor),
        shared_images=bool(shared),
    )


# ------------------------------------------------------------------------------------------------------ the source


def read_source(source: str) -> Iterator[tuple[str, int, str | None, dict]]:
    """Of a parquet file, a folder of them, or a hub name: (file or split, row from 1, published split or None, the
    columns)."""
    path = Path(source)
    try:
        import datasets
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"--source {source}: parquet files need the datasets library: {INSTALL}") from None
    if path.exists():
        found = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
        if not found:
            raise UserError(f"--source {source}: no parquet file there; give the folder of the published set")
        for file in found:
            name = re.search(
                r"(?:^|[-_/])(train|test|validation|val)(?=[-_./])", file.relative_to(path.parent).as_posix()
            )
            number = 0
            try:
                table = pyarrow.parquet.ParquetFile(file)
                check_columns(table.schema_arrow.names, file)
                wanted = [column for column in (*COLUMNS, "question_class") if column in table.schema_arrow.names]
                for batch in table.iter_batches(columns=wanted):
                    for row in batch.to_pylist():
                        number += 1
                        yield str(file), number, name and PUBLISHED[name[1]], row
            except (OSError, pyarrow.ArrowException) as error:
                raise UserError(f"{file}: not readable as parquet ({' '.join(str(error).split())[:200]})") from None
        return
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UserError(
            f"--source {source}: no such file or folder; give it, or a hub name such as SimulaMet/Kvasir-VQA-x1"
        )
    try:
        parts = datasets.load_dataset(source)
    except (OSError, ValueError) as error:
        raise UserError(f"--source {source}: no folder of that name here, and not readable as a data set "
                        f"({' '.join(str(error).split())[:300]})") from None  # fmt: skip
    for name, part in parts.items():
        check_columns(part.column_names, source)
        part = part.select_columns([column for column in (*COLUMNS, "question_class") if column in part.column_names])
        for number, row in enumerate(part, 1):
            yield f"{source} {name}", number, PUBLISHED.get(name), row


def check_columns(found: list[str], where) -> None:
    if missing := [column for column in COLUMNS if column not in found]:
        raise UserError(f"{where}: column(s) {', '.join(missing)} missing; found {', '.join(found) or 'none'}")


def find_images(folder: Path) -> dict[str, str]:
    """img_id -> path relative to the folder, of Kvasir-VQA or of its images alone. Raises: `UserError`."""
    places = [place for place in (folder / "images", folder) if place.is_dir()]
    for place in places:
        found = {
            p.stem: p.relative_to(folder).as_posix() for p in place.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES
        }
        if found:
            return found
    raise UserError(f"--images {folder}: no images there; give the folder of Kvasir-VQA, with images/<img_id>.jpg")


def to_sample(row: dict, published: str | None, named: dict[str, str], folder: Path) -> dict:
    """Raises: `UserError` without the row's name."""
    img_id, question, answer = (str(row.get(key) or "").strip() for key in ("img_id", "question", "answer"))
    if not question or not answer:
        raise UserError("no question, or no answer")
    if img_id not in named:
        raise UserError(f"no image {img_id!r} in {folder}")
    if row["complexity"] not in STAGES:
        raise UserError(f"complexity is {row['complexity']!r}, and only 1, 2 and 3 are known")
    key = hashlib.sha256(f"{question}\0{answer}".encode()).hexdigest()[:8]
    classes = row.get("question_class")
    return {
        "id": f"{img_id}-{key}",
        "image": named[img_id],
        "question": question,
        "answer": answer,
        "multi_label": False,
        "stage": row["complexity"],
        **({"question_class": items(classes) if isinstance(classes, str) else classes} if classes else {}),
        **({"official_split": published} if published else {}),
    }


# --------------------------------------------------------------------------------------------------------- counting


def shared_groups(by_split: dict[str, list[dict]]) -> set[str]:
    """Contents of images that test has in common with train."""
    train, test = ({sample["group"] for sample in by_split[name]} for name in ("train", "test"))
    return train & test


def official_overlap(samples: list[dict]) -> int:
    """How many samples of the published test part are about images that the published train part has."""
    train = {sample["group"] for sample in samples if sample.get("official_split") == "train"}
    return sum(s.get("official_split") == "test" and s["group"] in train for s in samples)


def report(source, settings, table, counts, free_form: bool, official: bool) -> str:
    how = (
        "The published split. Where it shows an image in train and in test, the config says `shared_images: allowed`, "
        "without which training refuses, and every result counts the test samples on images of train."
        if official
        else "Split by image content: no image, and no copy of one, is in two splits. `--split official` gives the "
        "published split; each sample says in `official_split` where it was."
    )
    kind = "sentences: `evaluate.py` adds token F1, BLEU, ROUGE and METEOR" if free_form else "short: exact match"
    return f"""# Kvasir-VQA-x1, prepared

Source: {source}; {"; ".join(settings)}.

## Questions by complexity and split

{tables.markdown(table)}

## Counted

{tables.markdown(tables.count_table(counts))}

{how}

The answers are {kind}.
"""
