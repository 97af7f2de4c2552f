"""Papers with decisions -> balanced accept/reject samples by split and a report. `prepare_data.py papers` calls
`prepare`."""

import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

from errors import UserError, first_names
from images import image_path, open_image
from prepare import pages, splits, tables
from prepare.giveaways import STAMP, uneven_forms, without_stamps
from prepare.rows import RowProblems, read_rows, refuse_lone_surrogates, refuse_overwriting
from prepare.splits import SPLITS
from templates import image_paths

LABELS = ("reject", "accept")  # the label is the place in here
TITLE = "# Papers, prepared"  # how report.md begins; it marks a folder of ours
ID_KEYS = ("id", "forum", "paper_id")
BODY_KEYS = ("full_text", "body", "text")
KEPT_KEYS = ("title", "keywords", "decision", "ratings", "url")  # beside what the model is shown, never in it


def prepare(source: str, out: str, train_agreeing: bool, as_pages: bool, seed: int, split: str) -> None:
    """Read, check, split, write, and print the table. See `prepare_data.py papers --help`. Raises: `UserError`."""
    percents = splits.parse_split(split)
    source, out = Path(source), Path(out)
    refuse_overwriting([source], out)
    papers, counts = read_papers(read_rows(source), source, as_pages)
    split_of_group = assign(papers, percents, seed, source)
    counts["distinct papers (by title and text)"] = len(split_of_group)

    by_split = {name: [] for name in SPLITS}
    for paper in splits.shuffled(papers, seed, "order", key=lambda paper: paper["id"]):
        by_split[split_of_group[paper["group"]]].append(paper)
    settings = [f"seed {seed}", f"split {split}", "page images" if as_pages else "texts"]
    rule = None
    if train_agreeing:
        by_split["train"], rule = agreeing(by_split["train"], counts, source)
        settings.append("--train-agreeing")
    for name, percent in zip(SPLITS, percents, strict=True):
        by_split[name] = balanced(by_split[name], name, percent, counts, source)
    counts["papers kept"] = sum(map(len, by_split.values()))

    shown = [paper for found in by_split.values() for paper in found]
    files_of_pages = pages.lay_out(shown, out, TITLE, counts) if as_pages else {}
    samples = {name: [to_sample(paper) for paper in found] for name, found in by_split.items()}
    labels = {label: f"{label} {name}" for label, name in enumerate(LABELS)}
    table = tables.split_table("label", samples, lambda sample: sample["label"], labels)
    files = {f"{name}.json": splits.json_list(samples[name]) for name in SPLITS}
    forms = {"page images of their own": "source_pages"} if as_pages else {}
    warnings = uneven_forms(shown, forms | {"their full text": "body_shown"})
    files["report.md"] = report(source, settings, table, counts, rule, warnings)
    splits.write_whole(out, files, before_renaming=lambda: pages.write(out, files_of_pages))
    written = [*files, *(["pages/"] if files_of_pages else [])]
    tables.print_summary(table, counts, [rule] if rule else [], out, written, out)
    print("".join(f"\n{warning}" for warning in warnings), end="")


# ------------------------------------------------------------------------------------------------------ the source


def read_papers(rows: list[dict], source: Path, as_pages: bool) -> tuple[list[dict], dict[str, int]]:
    """The papers with an accept or a reject, and what was found, in words. Raises: `UserError` naming the row."""
    problems, papers, undecided, seen = RowProblems(source), [], Counter(), set()
    counts = {"rows read": len(rows), "exact repeats, dropped": 0}
    for number, row in enumerate(rows, 1):
        with problems.of_row(number):
            line = json.dumps(row, sort_keys=True)
            if line in seen:
                counts["exact repeats, dropped"] += 1
                continue
            seen.add(line)
            label = label_of(row)
            if label is None:
                undecided[" ".join((row["decision"] or "no decision").split())] += 1
                continue
            papers.append(to_paper(row, number, label, source.parent, as_pages))
    problems.refuse()
    repeated = [identity for identity, count in Counter(paper["id"] for paper in papers).items() if count > 1]
    if repeated:
        raise UserError(
            f"{source}: {len(repeated)} id(s) stand for different rows: {first_names(repeated)}; make them distinct"
        )
    for decision, count in sorted(undecided.items()):
        counts[f"'{decision}': neither accept nor reject, dropped"] = count
    for label, name in enumerate(LABELS):
        counts[f"papers with the label {label} {name}"] = sum(paper["label"] == label for paper in papers)
    counts["texts with a phrase that tells the decision ('Published as a conference paper at ...'), cut"] = sum(
        paper["was_stamped"] for paper in papers
    )
    if not as_pages and (with_pages := sum(bool(paper["source_pages"]) for paper in papers)):
        counts["papers with page images, not shown (add --pages)"] = with_pages
    group_identical(papers)
    return papers, counts


def label_of(row: dict) -> int | None:
    """1 for any kind of accept, 0 for a reject, None for the rest (withdrawn, desk-rejected, open ...)."""
    if "decision" not in row:
        raise UserError(f"no key 'decision' (the row has {', '.join(row) or 'no key'}); add it")
    decision = row["decision"]
    if decision is not None and not isinstance(decision, str):
        raise UserError(f"key 'decision' is {decision!r} but must be a text such as 'Accept (Poster)' or 'Reject'")
    word = re.match(r"\W*(accept|reject)(ed)?\b", decision or "", re.IGNORECASE)
    return None if word is None else LABELS.index(word[1].lower())


def to_paper(row: dict, number: int, label: int, folder: Path, as_pages: bool) -> dict:
    """What is used of a row. The text is made of title, abstract, keywords and body alone: no other key can reach it.

    folder: what the paths of page images are relative to. Raises: `UserError` without the row's name."""
    refuse_lone_surrogates(row)
    source_pages = [image_path(folder, page) for page in image_paths(row)]
    title, abstract, body = _text(row, "title"), _text(row, "abstract"), _text(row, *BODY_KEYS)
    if not title:
        raise UserError("key 'title' is missing or empty; every paper needs one")
    if not abstract and not body and not (as_pages and source_pages):
        raise UserError("key 'abstract' is missing or empty, and there is no 'full_text' either; give one of them")
    keywords = row.get("keywords") or []
    keywords = [keywords] if isinstance(keywords, str) else keywords
    if not isinstance(keywords, list) or not all(isinstance(keyword, str) for keyword in keywords):
        raise UserError(f"key 'keywords' is {keywords!r} but must be a list of texts")
    parts = [
        f"Title: {title}",
        f"Abstract: {without_stamps(abstract)}" if abstract else "",
        f"Keywords: {', '.join(keywords)}" if keywords else "",
        without_stamps(body),
    ]
    text = "\n\n".join(part for part in parts if part)
    if as_pages:
        for page in source_pages:
            open_image(page)  # decoded here, so that a broken one is named with its row
    paper = {key: row[key] for key in KEPT_KEYS if row.get(key) is not None}
    if "ratings" in paper:
        paper["ratings"] = ratings_of(paper["ratings"])
    identity = next((str(row[key]) for key in ID_KEYS if row.get(key) not in (None, "")), f"paper-{number}")
    return paper | {
        "id": identity,
        "title": title,
        "label": label,
        "text": text.replace("<|", "< |"),  # papers about language models spell control tokens such as <|im_end|>
        "content": abstract + body,
        "source_pages": source_pages,
        "was_stamped": bool(STAMP.search(abstract) or STAMP.search(body)),
        "body_shown": bool(body) and not (as_pages and source_pages),
    }


def _text(row: dict, *keys: str) -> str:
    """The text of the first key that has one, else an empty one."""
    for key in keys:
        value = row.get(key)
        if value is not None and not isinstance(value, str):
            raise UserError(f"key '{key}' is {str(value)[:60]!r} but must be a text")
        if value and value.strip():
            return value.strip()
    return ""


def ratings_of(ratings: object) -> list[float]:
    """[6, "8: Accept, good paper"] -> [6.0, 8.0]. Raises: `UserError`."""
    numbers = []
    for rating in ratings if isinstance(ratings, list) else [ratings]:
        found = re.match(r"\s*(-?\d+(\.\d+)?)", str(rating))
        if isinstance(rating, bool) or not found:
            raise UserError(f"key 'ratings' holds {rating!r}; give numbers, or texts that begin with one")
        numbers.append(float(found[1]))
    return numbers


def group_identical(papers: list[dict]) -> None:
    """Set each paper's `group`: one for all that share a title or a text, whatever their case, spaces and accents."""
    group_of, members = {}, {}
    for paper in papers:
        keys = [(kind, plain) for kind in ("title", "content") if (plain := _plain(paper[kind]))]
        # A new paper may join what were several groups so far.
        joined = list(dict.fromkeys(id(group_of[key]) for key in keys if key in group_of))
        group = {"papers": [paper], "keys": keys}
        for old in (members.pop(identity) for identity in joined):
            group["papers"] += old["papers"]
            group["keys"] += old["keys"]
        members[id(group)] = group
        group_of |= dict.fromkeys(group["keys"], group)
    for group in members.values():
        name = min(paper["id"] for paper in group["papers"])
        for paper in group["papers"]:
            paper["group"] = name


def _plain(text: str) -> str:
    letters = unicodedata.normalize("NFKD", text).casefold()
    return "".join(letter for letter in letters if letter.isalnum())


# ---------------------------------------------------------------------------------------------------- the splits


def assign(papers: list[dict], percents: tuple[float, float, float], seed: int, source: Path) -> dict[str, str]:
    """Group -> split. Accepts and rejects are dealt apart, so that each split has its share of both."""
    labels_of = {}
    for paper in papers:
        labels_of.setdefault(paper["group"], []).append(paper["label"])
    split_of_group = {}
    wanted = sum(percent > 0 for percent in percents)
    for label, name in enumerate(LABELS):
        # A paper that stands in the source with both decisions is dealt with the accepts.
        sizes = {group: len(labels) for group, labels in labels_of.items() if max(labels) == label}
        if len(sizes) < wanted:
            raise UserError(
                f"{source}: {len(sizes)} distinct paper(s) with the decision {name} cannot fill {wanted} splits; give "
                "more papers, or fewer splits (--split 100/0/0)"
            )
        split_of_group |= splits.assign_groups(sizes, percents, seed)
    return split_of_group


def agreeing(papers: list[dict], counts: dict[str, int], source: Path) -> tuple[list[dict], str]:
    """Papers whose mean rating is on their decision's side of the boundary, and the rule in words.

    The boundary is midway between the average mean rating of these accepts and that of these rejects, so that it fits
    any scale. Raises: `UserError` where there are no ratings to go by."""
    mean_of = {paper["id"]: _mean(paper["ratings"]) for paper in papers if paper.get("ratings")}
    sides = [[mean_of[paper["id"]] for paper in papers if paper["label"] == label and paper["id"] in mean_of]
             for label in (0, 1)]  # fmt: skip
    if not all(sides):
        raise UserError(
            f"{source}: --train-agreeing needs the ratings of accepts and of rejects; add the key 'ratings', or leave "
            "the option out"
        )
    rejects, accepts = map(_mean, sides)
    boundary = (rejects + accepts) / 2
    if rejects >= accepts:
        raise UserError(
            f"{source}: the training split's rejects are rated {rejects:.2f} on average and its accepts {accepts:.2f}, "
            "so no boundary parts them; correct the ratings, or leave --train-agreeing out"
        )
    kept = [p for p in papers if p["id"] in mean_of and (mean_of[p["id"]] >= boundary) == (p["label"] == 1)]
    counts["training papers without ratings, dropped"] = len(papers) - len(mean_of)
    counts["training papers whose ratings contradict the decision, dropped"] = len(mean_of) - len(kept)
    rule = (
        f"The training split keeps accepts with a mean rating of at least {boundary:.2f} and rejects below it: midway "
        f"between the averages of its rejects ({rejects:.2f}) and its accepts ({accepts:.2f}). Papers without ratings "
        "are left out. Validation and test are untouched."
    )
    return kept, rule


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def balanced(papers: list[dict], split: str, percent: float, counts: dict[str, int], source: Path) -> list[dict]:
    """As many rejects as accepts: the first ones of the larger class, in the seeded order that the papers are in."""
    of_label = [[paper for paper in papers if paper["label"] == label] for label in (0, 1)]
    size = min(map(len, of_label))
    if percent and not size:
        missing = LABELS[bool(of_label[0])]
        raise UserError(f"{source}: no paper with the decision {missing} is left for {split}; give more papers")
    for name, found in zip(LABELS, of_label, strict=True):
        if len(found) > size:
            counts[f"{name}s of {split}, dropped to balance it"] = len(found) - size
    kept = {paper["id"] for found in of_label for paper in found[:size]}
    return [paper for paper in papers if paper["id"] in kept]


def to_sample(paper: dict) -> dict:
    """The sample: what the model is shown ("text", or the pages' "images"), the label, and facts that pass through."""
    shown = {"images": paper["images"]} if "images" in paper else {"text": paper["text"]}
    facts = {key: paper[key] for key in KEPT_KEYS if key in paper}
    return {"id": paper["id"], **shown, "label": paper["label"], **facts, "group": paper["group"]}


# ------------------------------------------------------------------------------------------------------- the report


def report(
    source: Path, settings: list[str], table: tables.Table, counts: dict, rule: str | None, warnings: list[str]
) -> str:
    """`report.md`: papers by label and split, everything that was counted, and the rules."""
    own_pages = (
        "\n\nPage images of the source are shown as they are: look whether a header of theirs tells the decision."
        if counts.get("papers shown by their own page images")
        else ""
    )
    return f"""{TITLE}

Source: {source}; {"; ".join(settings)}.

## Papers by label and split

{tables.markdown(table)}

## Counted

{tables.markdown(tables.count_table(counts))}

Label 1 is any kind of accept, 0 a reject. Every split has as many of the one as of the other, and papers with the same
title or text stay in one split. The model is shown title, abstract, keywords and full text, where there are any;
ratings and decision stand in keys of their own, which no template reads. Phrases by which conference styles tell the
decision are cut out; names and acknowledgments, which only final versions have, are not: look for them.{own_pages}
{"".join(f"{chr(10)}{warning}.{chr(10)}" for warning in warnings)}
## Rule for the training split

{rule or "None: all its papers are kept (--train-agreeing keeps those whose ratings agree with the decision)."}
"""
