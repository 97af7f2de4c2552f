"""Own questions and answers about images, in any form of the README -> samples by split, a report and a config.
`prepare_data.py vqa` calls `prepare`."""

import contextlib
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import leakage
from errors import UserError
from files import read_json
from images import image_path, upright_size
from prepare import splits, starting_config, tables
from prepare.kvasir import describe_questions, items
from prepare.rows import (
    REFUSED,
    RowProblems,
    read_rows,
    read_table,
    refuse_lone_surrogates,
    refuse_overwriting,
    source_files,
)
from prepare.splits import SPLITS
from report.free_form import are_sentences, is_sentence
from templates import image_paths, to_messages

TITLE = "# Questions and answers, prepared"  # how report.md begins; it marks a folder of ours
PAGE, PAIRS = "near_identical.html", "near_identical.json"
FEWEST_IMAGES = 5  # of the training split, that a question is asked of before its answers are taken for a closed list
MOST_CANDIDATES = 50
KINDS = {
    "single": "single choice",
    "multi": "multi-label",
    "open": "open (no candidates)",
    "conversation": "conversation, as it is",
}


def prepare(
    source: str,
    out: str,
    image_root: str | None,
    seed: int,
    split: str,
    keep_together: list[str],
    answers: str,
    drop_refused: bool,
    config: str | None,
    model_name: str,
) -> None:
    """Read, check, split, write, and print the table. See `prepare_data.py vqa --help`. Raises: `UserError`."""
    percents = splits.parse_split(split, without_train=True)
    factor = starting_config.size_factor(model_name)
    source, out = Path(source), Path(out)
    if source.is_dir() and out.resolve() == source.resolve():
        raise UserError(f"--out {out} is the source's own folder, whose files would be read again; give another place")
    refuse_overwriting(source_files(source), out, (PAGE, PAIRS))
    image_root = Path(image_root) if image_root else source if source.is_dir() else source.parent
    kept_pairs = [pair for path in keep_together for pair in read_pairs(Path(path))]

    problems, samples, rows_read = RowProblems(source, out, drop_refused), [], Counter()
    for file in source_files(source):
        for number, row in enumerate(read_table(file) if file.suffix == ".csv" else read_rows(file), 1):
            rows_read[file.name] += 1
            with problems.of_row(number, row.get("image") or row.get("images"), file):
                samples.append({**to_sample(row, image_root), "row": (file, number)})
    named = dict.fromkeys(path for sample in samples for path in image_paths(sample))
    if samples and not named:
        keys = ", ".join(key for key in samples[0] if key != "row")
        raise UserError(f"{source}: no row shows an image; name it 'image' (or a list, 'images'); found {keys}")
    found, broken = leakage.fingerprint([image_path(image_root, path) for path in named])
    readable = []
    for sample in samples:
        file, number = sample.pop("row")
        with problems.of_row(number, image_paths(sample), file):
            for path in image_paths(sample):
                where = image_path(image_root, path)
                if where in broken:
                    reason = broken[where] if where.is_file() else f"there is no file {where}"
                    raise UserError(f"{reason}; replace the image, or give its folder with --image-root")
            readable.append(sample)
    problems.refuse()
    problems.refuse_all_dropped(len(readable))
    samples = as_questions(readable)
    prints = {path: found[image_path(image_root, path)] for path in named if image_path(image_root, path) in found}

    content_of = {path: prints[path].sha256[:16] for path in prints}
    samples, repeats = without_repeats(samples, content_of)
    group_images(samples, content_of, kept_pairs)
    shown = {(sample["group"], path) for sample in samples for path in image_paths(sample) or [sample["group"]]}
    sizes = Counter(group for group, _ in shown)
    split_of = splits.assign_groups(sizes, percents, seed)
    free_form = (
        are_sentences(sample["answer"] for sample in gold(samples)) if answers == "auto" else answers == "sentences"
    )
    questions = decide_candidates(samples, split_of, free_form)
    name_samples(samples)

    by_split = {name: [] for name in SPLITS}
    by_group = defaultdict(list)
    for sample in samples:
        by_group[sample["group"]].append(sample)
    for group in splits.shuffled(by_group, seed, "order"):
        by_split[split_of[group]] += sorted(by_group[group], key=image_paths)
    hashes = {path: prints[path].phash for path in prints}
    near = leakage.find_near_identical(by_split, image_root, hashes=hashes, within=True)
    pairs = leakage.across(near)

    kinds = Counter(map(kind_of, samples))
    own_lists = sum(outside_own_list(sample) for sample in samples)
    counts = {
        **{f"rows read from {name}": number for name, number in rows_read.items()},
        f"rows refused and dropped, listed in {REFUSED}": len(problems.found),
        "exact repeats, dropped": repeats,
        "samples kept": len(samples),
        "... without an image": sum(not image_paths(sample) for sample in samples),
        "image-question pairs with different answers, all kept": contradictions(samples),
        "answers that are not in their own candidate list": own_lists,
        "image files": len(prints),
        "distinct images": len({print.sha256 for print in prints.values()}),
        "groups kept together (copies, images shown together, --keep-together)": sum(n > 1 for n in sizes.values()),
        "near-identical pairs of images across splits": len(pairs),
    }
    table = tables.split_table("answers", by_split, kind_of, {kind: KINDS[kind] for kind in KINDS if kinds[kind]})
    settings = [f"seed {seed}", f"split {split}", f"answers {answers}", *(f"keep-together {p}" for p in keep_together)]
    files = {f"{name}.json": splits.json_list(by_split[name]) for name in SPLITS}
    is_sorted = any(Path(path).resolve() == (out / PAIRS).resolve() for path in keep_together)
    files[PAGE] = leakage.side_by_side(pairs, image_root, how_to_keep(out, is_sorted)) if pairs else None
    if not is_sorted:  # the file that --keep-together gives stays as it was sorted, for the next run
        files[PAIRS] = leakage.pairs_text(near if pairs else (), kept_pairs) if pairs or kept_pairs else None
    files[REFUSED] = problems.list_text()
    files["report.md"] = report(source, settings, table, counts, questions, free_form, answers, bool(percents[0]))
    splits.write_whole(out, files)
    written = [name for name in files if files[name]]
    tables.print_summary(table, counts, notes(free_form, pairs, out, is_sorted), out, written, image_root)
    largest = max((side for path in prints for side in upright_size(image_path(image_root, path))), default=0)
    starting_config.write(
        config,
        out,
        image_root,
        by_split,
        model_name,
        starting_config.fitting_size(largest, factor) if prints else None,
        template="candidates" if kinds["single"] or kinds["multi"] else "plain",
    )


# ------------------------------------------------------------------------------------------------------ the source


def to_sample(row: dict, image_root: Path) -> dict:
    """A row as a sample in one of the forms of the README. Raises: `UserError` without the row's name."""
    refuse_lone_surrogates(row)
    if "messages" not in row and "conversations" not in row:
        missing = [key for key in ("question", "answer") if row.get(key) in (None, "")]
        if missing:
            named = ", ".join(map(str, row)) or "nothing"
            raise UserError(f"no {' and no '.join(missing)}; a row needs image, question and answer, and has {named}")
        row = {**row, "question": str(row["question"]).replace("<image>", "").strip()}
        if type(row["answer"]) in (int, float):
            row["answer"] = str(row["answer"])
        for key in ("candidates", "images"):  # of a table: a list in one cell
            if isinstance(row.get(key), str):
                row[key] = items(row[key])
        if str(row.get("stage", "")).isdecimal():
            row["stage"] = int(row["stage"])
        if row.get("multi_label") in ("true", "True", "false", "False", "0", "1"):
            row["multi_label"] = row["multi_label"] in ("true", "True", "1")
    to_messages(row, "plain")
    for path in image_paths(row):
        image_path(image_root, path)
    return {key: value for key, value in row.items() if key != "group"}


def as_questions(samples: list[dict]) -> list[dict]:
    """Where every conversation of the source is one question with its answer, as question and answer: then templates,
    candidates and scores know them. Longer conversations, and all beside them, stay as they are."""
    asked = {}
    for index, sample in enumerate(samples):
        if "messages" in sample or "conversations" in sample:
            messages = to_messages(sample, "plain")
            if len(messages) != 2:
                return samples
            content = messages[0]["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            texts = [part["text"] for part in parts if part["type"] == "text"]
            if "".join(texts).strip() == "" or any(
                part["type"] == "image" for part in parts[len(parts) - len(texts) :]
            ):
                return samples  # an image after the text: the conversation's order means something
            rest = {key: value for key, value in sample.items() if key not in ("messages", "conversations")}
            asked[index] = {**rest, "question": "".join(texts).strip(), "answer": messages[1]["content"].strip()}
    return [asked.get(index, sample) for index, sample in enumerate(samples)]


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """The pairs of images of a near_identical.json, to be kept on one side. Raises: `UserError`."""
    cure = "give --keep-together a near_identical.json, as `train.py --check` and this command write it"
    pairs = read_json(path, cure)
    try:
        found = [tuple(pair["images"]) for pair in pairs]
    except (TypeError, KeyError):
        found = None
    if found is None or not all(len(pair) == 2 and all(isinstance(name, str) for name in pair) for pair in found):
        raise UserError(f'{path}: expected a list of {{"images": [a, b]}}; {cure}')
    return found


# --------------------------------------------------------------------------------------------------- to splits


def without_repeats(samples: list[dict], content_of: Mapping[str, str]) -> tuple[list[dict], int]:
    """The first of samples that say the same about images of the same content, and how many were left out."""
    first = {}
    for sample in samples:
        said = [sample.get(key) for key in ("question", "answer", "messages", "conversations")]
        key = json.dumps([[content_of[path] for path in image_paths(sample)], said], sort_keys=True)
        first.setdefault(key, sample)
    return list(first.values()), len(samples) - len(first)


def group_images(samples: list[dict], content_of: Mapping[str, str], pairs: Iterable[tuple[str, str]]) -> None:
    """Set each sample's `group`: identical files, images of one sample, and pairs of images to be kept together share
    one. A sample without an image is a group of its own text."""
    parent: dict[str, str] = {}

    def root(content: str) -> str:
        while parent.setdefault(content, content) != content:
            content = parent[content]
        return content

    def join(contents: Iterable[str]) -> None:
        roots = sorted(map(root, contents))
        parent.update(dict.fromkeys(roots, roots[0]) if roots else {})  # the smallest, whatever the order of the rows

    for sample in samples:
        join(content_of[path] for path in image_paths(sample))
    for pair in pairs:  # an image that the source no longer shows needs no company
        join(content_of[path] for path in pair if path in content_of)
    for sample in samples:
        paths = image_paths(sample)
        text = json.dumps(to_messages(sample, "plain"), sort_keys=True).encode()
        sample["group"] = root(content_of[paths[0]]) if paths else f"text-{hashlib.sha256(text).hexdigest()[:16]}"


def gold(samples: list[dict]) -> list[dict]:
    """Of each sample its answer, of a conversation the last one; those with a candidate list of their own aside."""
    asked = [sample for sample in samples if not sample.get("candidates")]
    return [s if "answer" in s else {"answer": to_messages(s, "plain")[-1]["content"]} for s in asked]


def decide_candidates(samples: list[dict], split_of: Mapping[str, str], free_form: bool) -> dict[str, dict]:
    """Give samples `candidates` and `multi_label` as for Kvasir-VQA: the answers of the training split, where a
    question is asked often enough for them to be a closed list; a list of the sample's own stays. Returns what
    `describe_questions` says of each question, with `why` it has no candidates."""
    asked = [sample for sample in samples if "question" in sample]
    described = describe_questions([{**sample, "img_id": sample["group"]} for sample in asked], split_of)
    images = defaultdict(set)
    for sample in asked:
        if split_of[sample["group"]] == "train":
            images[sample["question"]].add(sample["group"])
    for question, about in described.items():
        found, seen = len(about["candidates"]), len(images[question])
        sentences = any(map(is_sentence, about["candidates"]))
        about["why"] = (
            "its answers are sentences" if free_form or sentences
            else f"asked of {seen} training images, fewer than {FEWEST_IMAGES}" if seen < FEWEST_IMAGES
            else "one answer in training" if found < 2
            else f"{found} different answers on {seen} training images" if found > min(MOST_CANDIDATES, seen / 2)
            else ""
        )  # fmt: skip
    for sample in asked:
        about = described[sample["question"]]
        if not sample.get("candidates") and not about["why"]:
            sample["candidates"] = about["candidates"]
        closed = bool(sample.get("candidates"))
        sample.setdefault("multi_label", closed and about["multi_label"])
    for sample in samples:
        sample["free_form"] = free_form and not sample.get("candidates")
    return described


def kind_of(sample: dict) -> str:
    if "question" not in sample:
        return "conversation"
    return "multi" if sample["multi_label"] else "single" if sample.get("candidates") else "open"


def outside_own_list(sample: dict) -> bool:
    from report.metrics import answer_outside_candidates

    return "answer" in sample and answer_outside_candidates(sample, "answer")


def contradictions(samples: list[dict]) -> int:
    answers = defaultdict(set)
    for sample in samples:
        if "question" in sample:
            answers[sample["group"], tuple(image_paths(sample)), sample["question"]].add(sample["answer"])
    return sum(len(found) > 1 for found in answers.values())


def name_samples(samples: list[dict]) -> None:
    """Give every sample an id: its own where there is one, else its image's name; numbered where they repeat."""
    names = [str(sample.get("id") or Path((image_paths(sample) or ["text"])[0]).stem) for sample in samples]
    repeated, seen, used = Counter(names), Counter(), set(names)
    for sample, name in zip(samples, names, strict=True):
        identity = name
        while repeated[name] > 1 and (identity == name or identity in used):
            seen[name] += 1
            identity = f"{name}-{seen[name]}"
        used.add(identity)
        facts = {key: value for key, value in sample.items() if key != "id"}
        sample.clear()
        sample.update({"id": identity, **facts})


# ------------------------------------------------------------------------------------------------------- the report


def has_prepared(folder: Path) -> bool:
    """Whether the files of the splits there are this source's, which writes them anew from its pairs."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return (folder / "report.md").read_text(encoding="utf-8").startswith(TITLE)
    return False


def how_to_keep(out: Path, is_sorted: bool, sorted_before: Path | None = None) -> str:
    """What to do about nearly identical images across splits. is_sorted: their file is the one of --keep-together.
    sorted_before: a file of pairs that --keep-together gave, which would be written anew without it."""
    if is_sorted:
        return (
            f'Add those that show the same scene to {out / PAIRS} (a line {{"images": ["a.jpg", "b.jpg"]}} each), and '
            "run the same command again; the other pairs may stay"
        )
    files = " ".join(str(path) for path in (sorted_before, out / PAIRS) if path)
    return f"Take out of {out / PAIRS} those that differ, and run prepare_data.py again with --keep-together {files}"


def notes(free_form: bool, pairs: list, out: Path, is_sorted: bool) -> list[str]:
    found = []
    if free_form:
        found.append("The answers are sentences: evaluate.py adds token F1, BLEU, ROUGE and METEOR to exact match "
                     "(pip install -r requirements-extra.txt)")  # fmt: skip
    if pairs:
        found.append(
            f"{len(pairs):,} pair(s) of images across splits look nearly alike: {out / PAGE} shows them. "
            f"{how_to_keep(out, is_sorted)}"
        )
    return found


def report(source, settings, table, counts, questions, free_form: bool, answers: str, has_train: bool) -> str:
    """`report.md`: samples by kind and split, everything that was counted, and each question that comes again."""
    lines = [["question", "kind", "candidates", *SPLITS, "outside val", "outside test"]]
    again = {question: about for question, about in questions.items() if sum(about["rows"].values()) > 1}
    for question, about in sorted(again.items(), key=lambda item: -sum(item[1]["rows"].values()))[:200]:
        closed = not about["why"]
        kind = KINDS["multi" if about["multi_label"] else "single"] if closed else "open"
        shown = "; ".join(about["candidates"]) if closed else f"none: {about['why']}"
        outside = [about["outside"][split] if closed else 0 for split in ("val", "test")]
        lines.append([question, kind, shown, *(f"{about['rows'][split]:,}" for split in SPLITS), *map(str, outside)])
    once = len(questions) - len(again)
    shown = tables.markdown(lines) + "\n\n" if len(lines) > 1 else ""
    decided = "as --answers says" if answers != "auto" else "decided from their length"
    kind = "sentences" if free_form else "words and short phrases"
    scores = "exact match, token F1, BLEU, ROUGE-1/2/L and METEOR" if free_form else "exact match"
    if any(row[0] == KINDS["conversation"] for row in table):
        scores += "; a conversation is scored on its last answer, with the gold earlier ones in view"
    where = "the training split only" if has_train else "nowhere: there is no training split"
    return f"""{TITLE}

Source: {source}; {"; ".join(settings)}.

## Samples by kind and split

{tables.markdown(table)}

## Counted

{tables.markdown(tables.count_table(counts))}

Files of identical content stay in one split, and so do images that one sample shows together. Images that only look
nearly alike are not moved: {PAGE} shows the pairs across splits, and --keep-together {PAIRS} keeps them together.

## Answers

The answers are {kind} ({decided}). `evaluate.py` scores {scores}.
`--answers short` or `--answers sentences`, here or there, decides otherwise.

Candidates come from {where}, for questions asked of {FEWEST_IMAGES} images or more whose answers come again; a list of
the sample's own stays. They are in the prompt with `template: candidates`, and not with `template: plain`.

## Questions

{shown}{len(questions):,} different questions, {once:,} of them asked once; shown are the most frequent, 200 at most.
"""
