"""Kvasir-VQA as published -> samples by split, stages and a report. `prepare_data.py kvasir` calls `prepare`."""

import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping
from difflib import SequenceMatcher
from pathlib import Path

import leakage
from errors import UserError, first_names
from prepare import kvasir_source, splits, tables
from prepare import stager as stagers
from prepare.splits import SPLITS

NO_QUESTION = {"", "none", "nan", "null"}  # the published set has rows without a question
NEAR_IDENTICAL = "near_identical.html"
ALIKE = 0.87  # share of letters that two spellings have in common; one letter in eight may differ


def prepare(source: str, out: str, order: str, stager: str, seed: int, split: str) -> None:
    """Read, check, split, write, and print the table. See `prepare_data.py kvasir --help`. Raises: `UserError`."""
    percents = splits.parse_split(split)
    out = Path(out)
    with kvasir_source.opened(source, out) as raw:
        rows, counts = clean(raw.rows)
        entries, by_hand = stagers.assign_stages((row["question"] for row in rows), stager, out / "stages.json")
        stage_of = stagers.stage_numbers(entries)

        images = {row["img_id"]: raw.images[row["img_id"]] for row in rows}
        prints = _fingerprints(images, raw.folder)
        group_of = {img_id: prints[img_id].sha256[:16] for img_id in images}
        sizes = Counter(group_of.values())
        split_of_group = splits.assign_groups(sizes, percents, seed)
        split_of = {img_id: split_of_group[group] for img_id, group in group_of.items()}

        questions = describe_questions(rows, split_of)
        samples = to_samples(rows, images, group_of, stage_of, questions)
        by_split = arrange(samples, split_of_group, order, seed)
        hashes = {images[img_id]: prints[img_id].phash for img_id in images}
        pairs = leakage.find_near_identical(by_split, raw.folder, hashes=hashes)

        stages = {number: f"{number} {name}" for number, name in stagers.STAGES.items()}
        table = tables.split_table("stage", by_split, lambda sample: sample["stage"], stages)
        counts["images (img_id)"] = len(images)
        counts["images no row asks about, left alone"] = raw.unused_images
        counts["distinct files"] = len(sizes)
        counts["groups of identical files under several ids"] = sum(size > 1 for size in sizes.values())
        counts["near-identical pairs of images across splits"] = len(pairs)
        settings = [f"order {order}", f"stager {stager}", f"seed {seed}", f"split {split}"]
        files = {f"{name}.json": splits.json_list(by_split[name]) for name in SPLITS}
        for name in SPLITS:  # for experiments on one stage; a stage without questions has no file
            for stage in stagers.STAGES:
                of_stage = [sample for sample in by_split[name] if sample["stage"] == stage]
                files[f"{name}_stage{stage}.json"] = splits.json_list(of_stage) if of_stage else None
        files["stages.json"] = stagers.stages_text(entries)
        files[NEAR_IDENTICAL] = leakage.side_by_side(pairs, raw.folder) if pairs else None
        files["report.md"] = report(source, settings, table, counts, questions, stage_of, by_hand, entries)
        splits.write_whole(out, files, before_renaming=raw.move_images)
    notes = []
    if by_hand:
        notes.append(f"{len(by_hand)} question(s) kept as stages.json had them: {first_names(by_hand)}")
    if review := _to_review(entries, by_hand):
        notes.append(
            f"{len(review)} question(s) to review in stages.json, their scores were close: {first_names(review)}"
        )
    written = [name for name, text in files.items() if text is not None]
    tables.print_summary(table, counts, notes, out, written, raw.image_root)


def _fingerprints(images: Mapping[str, str], folder: Path) -> dict[str, leakage.Fingerprint]:
    """img_id -> fingerprint; every distinct file is decoded once. Raises: `UserError` naming the unreadable ones."""
    found, broken = leakage.fingerprint([folder / path for path in images.values()])
    if broken:
        names = first_names(path.name for path in broken)
        example = next(iter(broken.values()))
        raise UserError(
            f"{len(broken):,} of {len(images):,} images cannot be read: {names}; replace them, or remove their rows "
            f"(the first: {example})"
        )
    return {img_id: found[folder / path] for img_id, path in images.items()}


def clean(rows: list[dict]) -> tuple[list[dict], dict[str, int]]:
    """Check and count: rows worth keeping in their order, and what was found, in words."""
    asked = [row for row in rows if row["question"].casefold() not in NO_QUESTION]
    if not asked:
        raise UserError("the source has no row with a question")
    empty = [f"row {row['row']} ({row['img_id']}: {row['question']})" for row in asked if not items(row["answer"])]
    if empty:
        raise UserError(f"{len(empty)} row(s) with an empty answer: {first_names(empty)}; fill or remove them")
    first = {}
    for row in asked:
        first.setdefault((row["img_id"], row["question"], row["answer"]), row)
    kept = list(first.values())
    answers = defaultdict(set)
    for row in kept:
        answers[row["img_id"], row["question"]].add(row["answer"])
    several = [found for found in answers.values() if len(found) > 1]
    same_items = sum(len({frozenset(items(answer)) for answer in found}) == 1 for found in several)
    return kept, {
        "rows read": len(rows),
        "rows without a question, dropped": len(rows) - len(asked),
        "exact repeats, dropped": len(asked) - len(kept),
        "rows kept": len(kept),
        "image-question pairs with different answers, all kept": len(several),
        "... of which only the order of the items differs": same_items,
    }


def items(answer: str) -> list[str]:
    """The items of an answer such as `polyp; ulcerative colitis`."""
    return [item.strip() for item in answer.split(";") if item.strip()]


def describe_questions(rows: list[dict], split_of: Mapping[str, str]) -> dict[str, dict]:
    """Question -> {"multi_label", "candidates", "rows" (split -> count), "outside" (split -> count)}.

    A question is multi-label when any of its answers holds several items. Its candidates are the answers, or items,
    of the training split; an answer is outside when it, or one of its items, is not among them.
    """
    by_question = defaultdict(list)
    for row in rows:
        by_question[row["question"]].append(row)
    described = {}
    for question in sorted(by_question):
        asked = by_question[question]
        multi_label = any(len(items(row["answer"])) > 1 for row in asked)
        pieces = [(split_of[row["img_id"]], items(row["answer"]) if multi_label else [row["answer"]]) for row in asked]
        candidates = {piece for split, found in pieces if split == "train" for piece in found}
        described[question] = {
            "multi_label": multi_label,
            "candidates": sorted(candidates, key=_natural),
            "rows": Counter(split for split, _ in pieces),
            "outside": Counter(split for split, found in pieces if not candidates.issuperset(found)),
        }
    return described


def _natural(text: str) -> tuple:
    """Sort key under which 2 comes before 11 and 5-10mm before 11-20mm."""
    digits = "".join(char if char.isdecimal() else " " for char in text).split()
    return (not text[:1].isdecimal(), int(digits[0]) if digits and text[:1].isdecimal() else 0, text)


def look_alikes(candidates: list[str]) -> list[tuple[str, str]]:
    """Pairs of candidates that may be two spellings of one: equal but for case, spaces and punctuation, or but for a
    letter or two. Where digits differ, so does the meaning."""

    def letters(text: str) -> str:
        return "".join(char for char in text.casefold() if char.isalnum())

    def alike(first: str, second: str) -> bool:
        if [char for char in first if char.isdigit()] != [char for char in second if char.isdigit()]:
            return False
        matcher = SequenceMatcher(None, first, second, autojunk=False)
        return min(len(first), len(second)) >= 4 and matcher.quick_ratio() >= ALIKE and matcher.ratio() >= ALIKE

    spelt = [(text, letters(text)) for text in candidates]
    pairs = itertools.combinations(spelt, 2)
    return [(first, second) for (first, a), (second, b) in pairs if a == b or alike(a, b)]


def to_samples(
    rows: list[dict],
    images: Mapping[str, str],
    group_of: Mapping[str, str],
    stage_of: Mapping[str, int],
    questions: Mapping[str, dict],
) -> list[dict]:
    """One sample a row, in the order of the rows. An id depends on its image and question, not on seed or split."""
    seen = Counter()
    samples = []
    for row in rows:
        name = f"{row['img_id']}-{hashlib.sha256(row['question'].encode()).hexdigest()[:8]}"
        seen[name] += 1
        samples.append(
            {
                "id": name if seen[name] == 1 else f"{name}-{seen[name]}",
                "image": images[row["img_id"]],
                "question": row["question"],
                "answer": row["answer"],
                "candidates": questions[row["question"]]["candidates"],
                "multi_label": questions[row["question"]]["multi_label"],
                "stage": stage_of[row["question"]],
                "group": group_of[row["img_id"]],
                "source": row["source"],
            }
        )
    return samples


def arrange(samples: list[dict], split_of_group: Mapping[str, str], order: str, seed: int) -> dict[str, list[dict]]:
    """Split -> samples in the order of the file.

    train: `stages` (stage 1, 2, 3; inside a stage images in random order, each with its questions side by side) or
    `random`. val and test: images in random order, each with its questions by stage, so that any first part of the
    file is a fair sample of the split.
    """
    by_split = {split: [] for split in SPLITS}
    for sample in samples:
        by_split[split_of_group[sample["group"]]].append(sample)
    if order == "random":
        by_split["train"] = splits.shuffled(by_split["train"], seed, "train", key=lambda sample: sample["id"])
    else:
        stages = [[sample for sample in by_split["train"] if sample["stage"] == stage] for stage in stagers.STAGES]
        by_split["train"] = [
            s for number, stage in enumerate(stages) for s in _by_image(stage, seed, f"train {number}")
        ]
    for split in ("val", "test"):
        by_split[split] = _by_image(by_split[split], seed, split)
    return by_split


def _by_image(samples: list[dict], seed: int, salt: str) -> list[dict]:
    images = splits.shuffled({sample["image"] for sample in samples}, seed, salt)
    place = {image: number for number, image in enumerate(images)}
    return sorted(samples, key=lambda sample: (place[sample["image"]], sample["stage"]))


def report(
    source: str,
    settings: list[str],
    table: tables.Table,
    counts: dict[str, int],
    questions: Mapping[str, dict],
    stage_of: Mapping[str, int],
    by_hand: list[str],
    entries: Mapping[str, object],
) -> str:
    """`report.md`: the stage table, everything that was counted, and each question with its stage and candidates."""
    question_lines = [
        ["question", "stage", "by", "kind", "candidates", "train", "val", "test", "outside val", "outside test"]
    ]
    for question, about in sorted(questions.items(), key=lambda item: (stage_of[item[0]], item[0])):
        entry = entries[question]
        by = "hand" if question in by_hand else entry["model"] if isinstance(entry, dict) else "rules"
        if question in _to_review(entries, by_hand):
            by += " (please review)"
        rows, outside = about["rows"], about["outside"]
        question_lines.append(
            [
                question,
                str(stage_of[question]),
                by,
                "multi-label" if about["multi_label"] else "single choice",
                "; ".join(about["candidates"]) or "none: the question is not in train",
                *(f"{rows[split]:,}" for split in SPLITS),
                *(f"{outside[split]:,}" for split in ("val", "test")),
            ]
        )
    outside = {split: sum(about["outside"][split] for about in questions.values()) for split in ("val", "test")}
    counts = counts | {f"{split} answers outside the training candidates": outside[split] for split in outside}
    alike = [
        [question, first, second]
        for question, about in questions.items()
        for first, second in look_alikes(about["candidates"])
    ]
    misspelt = (
        f"""
## Candidates that look alike

Are these two spellings of one answer? The model would have to choose between them, and one is scored as wrong. Correct
the source and run the command again; pairs that do differ may stay.

{tables.markdown([["question", "candidate", "looks like"], *alike])}
"""
        if alike
        else ""
    )
    near = counts["near-identical pairs of images across splits"]
    judge = f"Near-identical images are not moved: look at {NEAR_IDENTICAL} and judge." if near else ""
    return f"""# Kvasir-VQA, prepared

Source: {source}; {"; ".join(settings)}.

## Questions by stage and split

{tables.markdown(table)}

## Counted

{tables.markdown(tables.count_table(counts))}

Files of identical content stay in one split. Candidates come from the training split only. {judge}

## Questions

{tables.markdown(question_lines)}

To move a question to another stage, change its number in stages.json and run the command again. An entry marked
`"review": true` had scores too close to call: set it to `false` to settle it.
{misspelt}"""


def _to_review(entries: Mapping[str, object], by_hand: list[str]) -> list[str]:
    marked = (question for question, entry in entries.items() if isinstance(entry, dict) and entry.get("review"))
    return [question for question in marked if question not in by_hand]
