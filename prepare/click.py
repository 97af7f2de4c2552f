"""Screenshots with instructions and points or boxes -> samples by split and a report. `prepare_data.py click` calls
`prepare`."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import errors
import leakage
from errors import UserError, first_names
from images import image_path, upright_size
from prepare import splits, starting_config, tables
from prepare.rows import REFUSED, RowProblems, read_rows, refuse_lone_surrogates, refuse_overwriting, source_files
from prepare.splits import SPLITS
from report.metrics import CLICK_GROUPS, target_size
from tasks import click
from templates import image_paths

# The names under which published sets keep each fact, the first one found wins.
INSTRUCTION_KEYS = ("instruction", "problem", "question")
POINT_KEYS = ("point", "click_position_px")
BOX_KEYS = {"xyxy": ("bbox", "box", "bbox_xyxy_px"), "xywh": ("bbox", "box", "bbox_xywh_px")}
SCREENSPOT_IMAGE = "img_filename"  # of ScreenSpot, -v2 and -Pro
BOX_FORMS = "[x0, y0, x1, y1] is --boxes xyxy (ScreenSpot-Pro), [x, y, width, height] is --boxes xywh (ScreenSpot-v2)"
# ScreenSpot's facts about a target under one name each: ours -> the names in its files, the first one found wins.
SCREENSPOT_FACTS = {
    "data_type": ("data_type", "ui_type"),
    "platform": ("platform", "data_source"),
    "category": ("category", "group"),  # our own `group` is the image's
}
SCREENSPOT_PLATFORMS = re.compile(r"(mobile|desktop|web)(?![a-z])")  # in a file's name; -v2's rows name only the system
UNITS = {"pixels": None, "relative1000": 1000, "relative1": 1}


def prepare(
    source: str,
    out: str,
    image_root: str | None,
    coordinates: str,
    boxes: str | None,
    seed: int,
    split: str,
    drop_refused: bool,
    config: str | None,
    model_name: str,
) -> None:
    """Read, check, split, write, and print the table. See `prepare_data.py click --help`. Raises: `UserError`."""
    percents = splits.parse_split(split, without_train=True)
    source, out = Path(source), Path(out)
    image_root = Path(image_root) if image_root else source if source.is_dir() else source.parent
    problems, targets, counts, rows_read = RowProblems(source, out, drop_refused), [], Counter(), 0
    sources = source_files(source, (".json", ".jsonl"))
    refuse_overwriting(sources, out)
    for file in sources:
        rows = read_rows(file)
        rows_read += len(rows)
        refuse_unstated_boxes(rows, boxes, file)
        for number, row in enumerate(rows, 1):
            with problems.of_row(number, row.get("image") or row.get(SCREENSPOT_IMAGE) or row.get("images"), file):
                refuse_lone_surrogates(row)
                row = from_screenspot(row, file)
                image_path(image_root, click.image_of(row))
                found = list(targets_of(row, boxes or "xyxy", counts))
                targets += [{**target, "file": file, "row": number} for target in found]
    problems.refuse_all_dropped(len(targets))
    refuse_wrong_units(targets, coordinates, source)
    hashes, sizes, broken = look_at_images(dict.fromkeys(target["image"] for target in targets), image_root)

    samples, usable, other_problems = {}, 0, len(problems.found)
    for target in targets:
        with problems.of_row(target["row"], target["image"], target["file"]):
            if target["image"] in broken:
                raise UserError(f"the image cannot be read: {broken[target['image']]}")
            sample = to_sample(target, sizes[target["image"]], hashes[target["image"]], coordinates)
            # Exact repeats of a click, on the same file or a copy of it, are kept once.
            samples.setdefault((sample["group"], sample["instruction"], *sample["point"]), sample)
            usable += 1
    only_images = len(problems.found) - other_problems == sum(target["image"] in broken for target in targets)
    if broken and only_images and not other_problems and not drop_refused:
        problems.refuse_as(unreadable(broken, len(sizes) + len(broken)))
    problems.refuse()
    problems.refuse_all_dropped(len(samples))
    samples = list(samples.values())
    name_samples(samples)
    groups = Counter(sample["group"] for sample in samples)
    split_of_group = splits.assign_groups(groups, percents, seed)
    by_split = {name: [] for name in SPLITS}
    for sample in splits.shuffled(samples, seed, "order", key=lambda sample: sample["id"]):
        by_split[split_of_group[sample["group"]]].append(sample)

    refused = {f"rows refused and dropped, listed in {REFUSED}": len(problems.found)} if problems.found else {}
    counted = {
        "rows read": rows_read,
        **refused,
        "clicks in them": len(targets),
        "exact repeats, dropped": usable - len(samples),
        **{f"{what}, left out of the samples": count for what, count in counts.items()},
        "clicks kept": len(samples),
        "... with a box": sum("bbox" in sample for sample in samples),
        "instructions with several points on one image, all kept": ambiguous(samples),
        "image files": len(sizes),
        "distinct images": len(groups),
    }
    found = {target_size(sample) for sample in samples}
    kinds = {kind: kind or "no box" for kind in ("small", "medium", "large", None) if kind in found}
    table = tables.split_table("target", by_split, target_size, kinds)
    settings = [f"coordinates {coordinates}", f"boxes {boxes or 'xyxy'}", f"seed {seed}", f"split {split}"]
    files = {f"{name}.json": splits.json_list(by_split[name]) for name in SPLITS}
    files[REFUSED] = problems.list_text()
    files["report.md"] = report(source, settings, table, counted, sizes, samples)
    splits.write_whole(out, files)
    tables.print_summary(table, counted, (), out, [name for name in files if files[name]], image_root)
    if config:
        starting_config.write(config, out, image_root, by_split, model_name, None, task="click")


# ------------------------------------------------------------------------------------------------------ the source


def refuse_unstated_boxes(rows: list[dict], boxes: str | None, file: Path) -> None:
    """ScreenSpot and its successors look the same and write boxes in two ways; many a box is valid in both.

    Raises: `UserError` where the form is not stated."""
    if boxes is None and any(SCREENSPOT_IMAGE in row for row in rows):
        raise UserError(f"{file}: a ScreenSpot file does not say what its boxes are; say it: {BOX_FORMS}")


def from_screenspot(row: dict, file: Path) -> dict:
    """A row of ScreenSpot under our names; any other row as it is."""
    if SCREENSPOT_IMAGE not in row:
        return row
    facts = {ours: next((row[key] for key in keys if row.get(key)), None) for ours, keys in SCREENSPOT_FACTS.items()}
    if named := SCREENSPOT_PLATFORMS.search(file.stem.casefold()):
        facts["platform"] = named[1]
    used = {SCREENSPOT_IMAGE, "ui_type", "img_size", "group"}
    return {
        "image": row[SCREENSPOT_IMAGE],
        **{key: value for key, value in row.items() if key not in used},
        **{key: value for key, value in facts.items() if value is not None},
    }


def targets_of(row: dict, boxes: str, counts: Counter) -> Iterator[dict]:
    """The clicks of a row, as it states them: image, instruction, numbers (x, y) or None, box (x0, y0, x1, y1) or None,
    and rest, its other keys. `counts` gathers what is left out. Raises: `UserError` without the row's name."""
    image = click.image_of(row)
    if "messages" in row or "conversations" in row:
        yield from _conversation_targets(row, image, counts)
        return
    used = {"image", "images"}
    instruction, instruction_key = _first(row, INSTRUCTION_KEYS)
    point, point_key = _first(row, POINT_KEYS)
    box, box_key = _first(row, BOX_KEYS[boxes])
    used |= {instruction_key, point_key, box_key, "instruction", "point", "bbox", "image_size", "group"}
    if not isinstance(instruction, str) or not _without_placeholder(instruction):
        raise UserError(f"no instruction; give it as {_either(INSTRUCTION_KEYS)}")
    if point is None and box is None:
        hint = "; for [x, y, width, height] add --boxes xywh" if boxes == "xyxy" else ""
        raise UserError(f"no point and no box; give {_either(POINT_KEYS)} or {_either(BOX_KEYS[boxes])}{hint}")
    if box is not None:
        box = click.numbers(box, box_key, 4)
        if boxes == "xywh":
            box = (box[0], box[1], box[0] + box[2], box[1] + box[3])
    yield {
        "image": image,
        "instruction": _without_placeholder(instruction),
        "numbers": None if point is None else click.numbers(point, point_key, 2),
        "box": box,
        "rest": {key: value for key, value in row.items() if key not in used},
    }


def _conversation_targets(row: dict, image: str, counts: Counter) -> Iterator[dict]:
    """Each user turn with the assistant turn after it is a click."""
    turns = row.get("messages") or row.get("conversations")
    asked, found = None, 0
    for turn in turns if isinstance(turns, list) else ():
        if not isinstance(turn, dict):
            raise UserError(f"a turn is {turn!r}; write an object with role and content, or from and value")
        role, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(text, str):
            raise UserError(f"the {role} turn has no text")
        if role in ("user", "human"):
            asked = _without_placeholder(text)
        elif role in ("assistant", "gpt"):
            target = click.parse_target(text)
            if not asked:
                raise UserError("an assistant turn has no instruction before it")
            if target is None:
                raise UserError(f"no point and no box in the answer {text[:60]!r}; write [x, y] or [x0, y0, x1, y1]")
            whole_box = target if len(target) == 4 else None
            yield {"image": image, "instruction": asked, "numbers": None if whole_box else target, "box": whole_box,
                   "rest": {"id": row["id"]} if "id" in row else {}}  # fmt: skip
            asked, found = None, found + 1
        else:
            counts[f"{role} turns"] += 1
    if not found:
        raise UserError("the conversation has no assistant turn, so no point")


def _first(row: dict, keys: tuple[str, ...]) -> tuple[object, str | None]:
    """(value, key) of the first key that has one."""
    return next(((row[key], key) for key in keys if row.get(key) is not None), (None, None))


def _either(keys: tuple[str, ...]) -> str:
    return " or ".join(f"'{key}'" for key in keys)


def _without_placeholder(text: str) -> str:
    return text.replace("<image>", "").strip()


# -------------------------------------------------------------------------------------------------- to samples


def refuse_wrong_units(targets: list[dict], coordinates: str, source: Path) -> None:
    """The unit is never guessed, but one that the numbers contradict is refused. Raises: `UserError`."""
    largest = max(max(*(target["numbers"] or ()), *(target["box"] or ()), 0, 0) for target in targets)
    if coordinates == "relative1" and largest > 1:
        raise UserError(f"{source}: --coordinates relative1 means 0 to 1, but a coordinate is {largest:g}")
    if coordinates == "relative1000" and largest > 1000:
        raise UserError(f"{source}: --coordinates relative1000 means 0 to 1000, but a coordinate is {largest:g}")
    if coordinates != "relative1" and 0 < largest <= 1:
        raise UserError(
            f"{source}: no coordinate is above 1, which cannot be {coordinates}; if they are shares of the image's "
            "sides, add --coordinates relative1"
        )


def look_at_images(
    names: Iterable[str], image_root: Path
) -> tuple[dict[str, str], dict[str, tuple[int, int]], dict[str, str]]:
    """name -> SHA-256 of the file, name -> (width, height) upright, and name -> what is wrong with the files that
    cannot be read; every distinct file is decoded once."""
    paths = {name: image_path(image_root, name) for name in names}
    found, broken = leakage.fingerprint(list(paths.values()))
    readable = {name: path for name, path in paths.items() if path in found}
    sizes = {name: upright_size(path) for name, path in readable.items()}
    hashes = {name: found[path].sha256 for name, path in readable.items()}
    return hashes, sizes, {name: broken[path] for name, path in paths.items() if path in broken}


def unreadable(broken: Mapping[str, str], images: int) -> str:
    return (
        f"{len(broken):,} of {images:,} images cannot be read: {first_names(broken)}; correct --image-root or replace "
        f"them (the first: {next(iter(broken.values()))})"
    )


def to_sample(target: dict, size: tuple[int, int], sha256: str, coordinates: str) -> dict:
    """A click in pixels of the original image. Raises: `UserError` where it leaves the image or its box."""
    unit = UNITS[coordinates]

    def pixels(numbers: Iterable[float]) -> list[float]:
        return [value if unit is None else round(value / unit * size[i % 2], 2) for i, value in enumerate(numbers)]

    box = None if target["box"] is None else pixels(target["box"])
    point = list(click.centre(box)) if target["numbers"] is None else pixels(target["numbers"])
    if wrong := click.outside(point, box, size):
        raise UserError(f"{wrong}. {BOX_FORMS}" if box else wrong)
    sample = {"image": target["image"], "instruction": target["instruction"], "point": point}
    sample |= {} if box is None else {"bbox": box}
    return {**target["rest"], **sample, "image_size": list(size), "group": sha256[:16]}


def name_samples(samples: list[dict]) -> None:
    """Give every sample an id: its own where there is one, else the image's name; numbered where they repeat."""
    names = [str(sample.get("id", Path(image_paths(sample)[0]).stem)) for sample in samples]
    repeated, seen = Counter(names), Counter()
    for sample, name in zip(samples, names, strict=True):
        seen[name] += 1
        identity = name if repeated[name] == 1 else f"{name}-{seen[name]}"
        facts = {key: value for key, value in sample.items() if key != "id"}
        sample.clear()
        sample.update({"id": identity, **facts})
    if len({sample["id"] for sample in samples}) < len(samples):
        raise UserError("the ids of the source repeat in a way that numbering cannot solve; make them distinct")


def ambiguous(samples: list[dict]) -> int:
    """How many (image, instruction) pairs have more than one point."""
    return sum(count > 1 for count in Counter((s["group"], s["instruction"]) for s in samples).values())


# ------------------------------------------------------------------------------------------------------- the report


def report(
    source: Path,
    settings: list[str],
    table: tables.Table,
    counted: dict[str, int],
    sizes: dict,
    samples: list[dict],
) -> str:
    """`report.md`: clicks by target size and split, everything that was counted, groups, and the images' sizes."""
    groups = [["group", "value", "clicks"]]
    for kind in CLICK_GROUPS:
        groups += [[kind, value, f"{n:,}"] for value, n in Counter(s[kind] for s in samples if kind in s).most_common()]
    grouped = f"\n## Groups, scored apart\n\n{tables.markdown(groups)}\n" if len(groups) > 1 else ""
    size_lines = [["width × height", "image files"]]
    common = Counter(sizes.values()).most_common(errors.NAMES_SHOWN)
    size_lines += [[f"{width} × {height}", f"{count:,}"] for (width, height), count in common]
    more = len(set(sizes.values())) - len(common)
    more = f"\n\n{more:,} more sizes." if more > 0 else ""
    return f"""# Clicks, prepared

Source: {source}; {"; ".join(settings)}.

Points and boxes are in pixels of the original image, upright, from its upper left corner.

## Clicks by size of the target and split

{tables.markdown(table)}

## Counted

{tables.markdown(tables.count_table(counted))}

Files of identical content stay in one split. Screenshots of one app look alike by nature, so that images that are
only similar are not reported here; `train.py --check` lists them.
{grouped}
## Images

{tables.markdown(size_lines)}{more}
"""
