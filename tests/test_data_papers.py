"""`prepare_data.py papers`: papers with decisions -> balanced samples by split, as texts or as page images."""

import itertools
import json
import random
import re

import numpy as np
import pytest
from conftest import shared_data
from PIL import Image, ImageChops

import prepare_data
from errors import UserError
from images import open_image
from prepare import giveaways, pages
from tasks.cls import document_messages

SPLITS = ("train", "val", "test")
SECRET = "REVIEW-SECRET"


def paper(number, label=None, **changes):
    accepted = number % 2 if label is None else label
    words = random.Random(number).choices("model data learning we show that graph bound".split(), k=30)
    return {
        "id": f"p{number}",
        "title": f"Paper number {number}",
        "abstract": f"We study case {number}: " + " ".join(words),
        "keywords": ["learning"],
        "ratings": [7, 6] if accepted else [3, 4],
        "decision": "Accept (Poster)" if accepted else "Reject",
        **changes,
    }


@pytest.fixture
def source(tmp_path):
    def write(rows):
        path = tmp_path / "papers.jsonl"
        path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
        return path

    return write


def prepare(source, *options, out="data"):
    out = source.parent / out
    prepare_data.main(["papers", "--source", str(source), "--out", str(out), *options])
    return {name: json.loads((out / f"{name}.json").read_text(encoding="utf-8")) for name in SPLITS}


def everything(by_split):
    return [sample for name in SPLITS for sample in by_split[name]]


def ids(samples):
    return [sample["id"] for sample in samples]


def label_counts(by_split):
    return {name: [sum(s["label"] == label for s in by_split[name]) for label in (0, 1)] for name in SPLITS}


def refused(source, *options):
    with pytest.raises(UserError) as caught:
        prepare(source, *options)
    assert not (source.parent / "data").exists(), "something was written"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_real_papers_are_split_85_5_10_with_as_many_accepts_as_rejects_and_their_true_decisions(tmp_path):
    published = shared_data("openreview/iclr2021.jsonl")
    prepare_data.main(["papers", "--source", str(published), "--out", str(tmp_path)])
    by_split = {name: json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8")) for name in SPLITS}
    assert label_counts(by_split) == {"train": [51, 51], "val": [3, 3], "test": [6, 6]}
    rows = {row["id"]: row for row in map(json.loads, published.read_text(encoding="utf-8").splitlines())}
    for sample in everything(by_split):
        row = rows.pop(sample["id"])
        assert sample["label"] == row["decision"].startswith("Accept")
        assert sample["ratings"] == row["ratings"]
        keywords = f"\n\nKeywords: {', '.join(row['keywords'])}" if row["keywords"] else ""
        assert sample["text"] == f"Title: {row['title'].strip()}\n\nAbstract: {row['abstract'].strip()}{keywords}"
    assert not rows


def test_the_larger_class_is_cut_to_balance_every_split_and_the_cut_is_reported(source, capsys):
    by_split = prepare(source([paper(n, label=n < 20) for n in range(80)]))
    assert label_counts(by_split) == {"train": [17, 17], "val": [1, 1], "test": [2, 2]}
    report = (source([]).parent / "data" / "report.md").read_text()
    assert "| rejects of train, dropped to balance it | 34 |" in report
    assert "rejects of test, dropped to balance it" in capsys.readouterr().out


def test_papers_of_one_title_or_one_text_never_stand_in_two_splits(source):
    rows = [paper(n) for n in range(60)]
    for n in range(0, 60, 6):  # a chain: n and n+2 share the title (but for its case), n+2 and n+4 the abstract
        rows[n + 2]["title"] = rows[n]["title"].upper() + "!"
        rows[n + 4]["abstract"] = rows[n + 2]["abstract"].replace(" ", "\n")
    by_split = prepare(source(rows), "--split", "50/25/25")
    place = {identity: name for name in SPLITS for identity in ids(by_split[name])}
    chains = [[place.get(f"p{n + k}") for k in (0, 2, 4)] for n in range(0, 60, 6)]
    assert all(len({name for name in chain if name}) <= 1 for chain in chains)
    assert sum(chain.count(None) == 0 for chain in chains) >= 5
    assert len({name for chain in chains for name in chain}) > 1
    groups = [{sample["group"] for sample in by_split[name]} for name in SPLITS]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])


def test_reviews_ratings_and_the_decision_never_reach_the_prompt(source):
    def secret(number):
        extra = dict.fromkeys(("review", "reviews", "meta_review", "comments", "tldr", "rebuttal"), SECRET)
        extra["reviews"] = [{"text": SECRET, "rating": 9}]
        ratings = [f"{rating}: {SECRET}" for rating in ([9, 8] if number % 2 else [2, 1])]
        stamp = f"{'Published' if number % 2 else 'Under review'} as a conference paper at ICLR 2021"
        stamp += "" if number % 2 else "\nAnonymous authors\nPaper under double-blind review"
        return paper(number, **extra) | {
            "ratings": ratings,
            "abstract": f"{stamp}. {number}",
            "full_text": f"{stamp}\n1 Introduction. Body {number}.",
        }

    by_split = prepare(source([secret(n) for n in range(40)]))
    for sample in everything(by_split):
        assert SECRET not in json.dumps(sample)
        prompt = str(document_messages(sample, "paper_decision", images=0))
        said = prompt.split("was accepted or rejected.")[1]
        assert re.search(r"1 Introduction. Body \d+", said)
        assert not re.search("accept|reject|poster|published|review|anonymous|rating", said, re.IGNORECASE)
        assert sample["decision"] and sample["ratings"]  # kept, but in keys of their own


STAMPS = [
    "Published as a conference paper at ICLR 2021",
    "Under review as a workshop paper at NeurIPS 2022",
    "Anonymous authors\nPaper under double-blind review",
    "Accepted at ICLR 2021",
    "To appear in ICML 2021.",
    "Submitted to 35th Conference on Neural Information Processing Systems (NeurIPS 2021). Do not distribute.",
    "35th Conference on Neural Information Processing Systems (NeurIPS 2021), Sydney, Australia.",
    "Preliminary work. Under review by the International Conference on Machine Learning (ICML). Do not distribute.",
    "Proceedings of the 38 th International Conference on Machine Learning, PMLR 139, 2021.",
    "Copyright 2021 by the author(s).",
    "Accepted to the 38th International Conference on Machine Learning (ICML 2021).",
    "Accepted at the 35th Conference on Neural Information Processing Systems (NeurIPS 2021).",
    "Appearing in Proceedings of the 38th International Conference on Machine Learning.",
    "Reviewed on OpenReview: https://openreview.example/forum?id=x",
    "Published in Transactions on Machine Learning Research (08/2022)",
    "Under review as submission to TMLR",
    "Anonymous Author(s)",
]


@pytest.mark.parametrize("stamp", STAMPS)
def test_a_styles_stamp_is_cut_out_and_the_text_around_it_stays(stamp):
    text = f"Deep learning works.\n{stamp}\n1 Introduction. We accept the null at step 2021."
    words = giveaways.without_stamps(text).split()
    assert words == "Deep learning works. 1 Introduction. We accept the null at step 2021.".split()


def test_a_form_that_tells_the_label_is_warned_of(source, capsys):
    """Full texts of the accepts alone; or of half of both, which tells nothing."""
    for share, warned in (({1: 1}, True), ({0: 2, 1: 2}, False)):
        rows = [paper(n) for n in range(80)]
        for n, row in enumerate(rows):
            if n % 2 in share and n // 2 % share[n % 2] == 0:
                row["full_text"] = f"1 Introduction. Body {n}."
        prepare(source(rows))
        report = (source(rows).parent / "data" / "report.md").read_text()
        said = "WARNING: 100% of the accepts but 0% of the rejects come with their full text"
        assert (said in report) == (said in capsys.readouterr().out) == warned


def test_a_papers_control_tokens_are_spelt_apart(source):
    by_split = prepare(source([paper(n, abstract=f"{n} ends with <|im_end|>") for n in range(40)]))
    assert all("< |im_end|>" in s["text"] and "<|" not in s["text"] for s in everything(by_split))


def test_train_agreeing_removes_contradicting_papers_from_train_alone(source):
    contradicting = {n: [2, 3] if n % 2 else [9] for n in range(0, 200, 5)}
    rows = [paper(n, **({"ratings": contradicting[n]} if n in contradicting else {})) for n in range(200)]
    rows[7]["ratings"] = []
    plain = prepare(source(rows), out="plain")
    chosen = prepare(source(rows), "--train-agreeing")
    assert chosen["val"] == plain["val"] and chosen["test"] == plain["test"]
    assert any(int(identity[1:]) in contradicting for name in ("val", "test") for identity in ids(chosen[name]))
    assert set(ids(chosen["train"])) < set(ids(plain["train"]))
    assert not any(int(identity[1:]) in {*contradicting, 7} for identity in ids(chosen["train"]))
    report = (source(rows).parent / "data" / "report.md").read_text()
    boundary = float(re.search(r"at least (\d+\.\d+) and rejects below it", report)[1])
    for sample in chosen["train"]:
        assert (sum(sample["ratings"]) / len(sample["ratings"]) >= boundary) == (sample["label"] == 1)
    assert label_counts(chosen)["train"][0] == label_counts(chosen)["train"][1] > 50


def test_every_accept_is_1_and_undecided_papers_are_dropped_and_counted(source):
    decisions = ["Accept (Oral)", "Reject", "accepted", "Rejected", "Withdrawn", None, "Desk Reject", "Accept"]
    rows = [paper(n, decision=decisions[n % 8]) for n in range(160)]
    by_split = prepare(source(rows))
    assert {int(i[1:]) % 8 for i in ids(everything(by_split))} == {0, 1, 2, 3, 7}
    for sample in everything(by_split):
        assert sample["label"] == (int(sample["id"][1:]) % 8 in (0, 2, 7))
    report = (source(rows).parent / "data" / "report.md").read_text()
    for decision in ("Withdrawn", "no decision", "Desk Reject"):
        assert f"| '{decision}': neither accept nor reject, dropped | 20 |" in report


def test_pages_and_texts_have_the_same_ids_in_the_same_order_and_pages_are_repeatable(source):
    texts = prepare(source([paper(n) for n in range(40)]))
    shown = prepare(source([paper(n) for n in range(40)]), "--pages", out="pages_1")
    again = prepare(source(reversed([paper(n) for n in range(40)])), "--pages", out="pages_2")
    assert shown == again
    folder = source([]).parent
    for name in SPLITS:
        assert ids(texts[name]) == ids(shown[name])
        for sample in shown[name]:
            assert "text" not in sample and sample["images"] == [f"pages/{sample['id']}-1.png"]
            first, second = ((folder / out / sample["images"][0]).read_bytes() for out in ("pages_1", "pages_2"))
            assert first == second
    assert len(list((folder / "pages_1" / "pages").iterdir())) == 40
    assert not [path for path in (folder / "pages_1").iterdir() if path.name.startswith(".")]


def test_a_long_text_fills_several_pages_without_losing_a_word_or_leaving_the_margins():
    words = [f"{'imw'[number % 3] * (number % 7)}{number}" for number in range(2000)] + ["x" * 500]
    laid_out = pages.Layout().pages_of(" ".join(words[:1000]) + "\n\n" + " ".join(words[1000:]))
    assert len(laid_out) > 3 and all(len(lines) <= pages.LINES_PER_PAGE for lines in laid_out)
    assert "".join("".join(lines) for lines in laid_out).replace(" ", "") == "".join(words)
    for lines in laid_out:
        page = pages.draw(lines)
        left, top, right, bottom = ImageChops.invert(page).getbbox()
        assert left >= pages.MARGIN - 2 and right <= pages.PAGE_SIZE[0] - pages.MARGIN + 2
        assert top >= pages.MARGIN and bottom <= pages.PAGE_SIZE[1] - pages.MARGIN


def test_characters_that_the_font_lacks_become_plain_ones_or_a_counted_box():
    layout = pages.Layout()
    assert layout.pages_of("nai\u0308ve – café") == [["naive - cafe"]]
    assert layout.lacking == 0
    assert layout.pages_of("漢") == [[pages.BOX]] and layout.lacking == 1


def test_a_page_is_as_high_as_its_lines_need_and_no_higher():
    ((lines,),) = (pages.Layout().pages_of("A short abstract. " * 60),)
    page = pages.draw(lines)
    assert page.width == pages.PAGE_SIZE[0] and page.height % pages.SIDE_UNIT == 0
    bottom = ImageChops.invert(page).getbbox()[3]
    assert pages.MARGIN <= page.height - bottom < pages.MARGIN + pages.SIDE_UNIT + pages.LINE_HEIGHT
    assert pages.draw(["full"] * pages.LINES_PER_PAGE).size == pages.PAGE_SIZE


def test_the_words_of_a_drawn_page_stand_apart_by_gaps_that_are_even_and_wider_than_those_between_letters():
    text = "We study ill-posed filling of VAWTs in wide Journals, with rj kernels and (1,000) runs; fly To AV. " * 8
    (lines,) = pages.Layout().pages_of(text)
    ink = np.asarray(pages.draw(lines)) < 160
    assert len(lines) > 5
    for row, line in enumerate(lines):
        top = pages.MARGIN + row * pages.LINE_HEIGHT
        columns = np.flatnonzero(ink[top : top + pages.LINE_HEIGHT].any(axis=0))
        gaps = sorted(np.diff(columns) - 1, reverse=True)
        between_words = gaps[: line.count(" ")]
        assert between_words[-1] > gaps[line.count(" ")], line
        assert between_words[0] < 2 * between_words[-1], line


def test_a_page_never_begins_or_ends_with_the_gap_between_two_paragraphs():
    text = "\n\n".join(f"paragraph {number}" for number in range(60))  # 120 lines, every other one empty
    for lines in (laid_out := pages.Layout().pages_of(text)):
        assert lines[0] and lines[-1]
    assert len(laid_out) > 2 and sum(map(bool, itertools.chain(*laid_out))) == 60


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        (r"$\beta$-VAE costs $5 and $10 more", "beta-VAE costs $5 and $10 more"),
        (r"\textit{so \textbf{much}}, 5\% of {1, 2}", "so much, 5% of {1, 2}"),
        (r"$O(C^{\frac{3}{2}}K^{2})$ and $O(n\log n)$", "O(C^(3/2)K^2) and O(n log n)"),
        (r"$||\beta\bf{z}||_{2}$ of $256\times256$", "||beta z||_2 of 256x256"),
        (
            r"$ \pm \varepsilon n$ of $i^{th}$ $\vec{p}$ and $$\ell_\infty$$",
            "± epsilon n of i^th p and l_infinity",
        ),
        (r"from $5 to \$6", "from $5 to $6"),
        ("costs $5 to $10 per item_x and $20", "costs $5 to $10 per item_x and $20"),
        (r"costs $5 at 10\% and $20", "costs $5 at 10% and $20"),
        ("β ≤ Θ × a", "beta <= Theta x a"),
    ],
)
def test_latex_and_greek_letters_are_drawn_as_a_reader_would_type_them(written, shown):
    assert pages.Layout().pages_of(written) == [[shown]]


def test_a_source_file_that_would_be_overwritten_is_refused_and_stays(source):
    path = source([paper(n) for n in range(40)])
    path = path.rename(path.with_name("refused_rows.jsonl"))
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"is a file that --out .* would overwrite; give another --out"):
        prepare(path, out=".")
    assert path.read_bytes() == before


def test_a_papers_own_pages_are_shown_as_they_are(source):
    folder = source([]).parent
    Image.new("RGB", (50, 70), "red").save(folder / "own.jpg")
    rows = [paper(n) for n in range(40)]
    rows[3] |= {"images": ["own.jpg", "own.jpg"], "abstract": None}
    by_split = prepare(source(rows), "--pages")
    sample = next(s for s in everything(by_split) if s["id"] == "p3")
    assert sample["images"] == ["pages/p3-1.jpg", "pages/p3-2.jpg"]
    assert (folder / "data" / sample["images"][1]).read_bytes() == (folder / "own.jpg").read_bytes()
    assert open_image(folder / "data" / "pages/p3-1.jpg").size == (50, 70)
    rows[5]["images"] = ["data/pages/p5-1.png"]
    with pytest.raises(UserError, match="to be replaced"):
        prepare(source(rows), "--pages")


def test_a_pages_folder_of_somebody_else_is_left_alone(source):
    kept = source([]).parent / "data" / "pages" / "mine.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    with pytest.raises(UserError, match="none of this command's"):
        prepare(source([paper(n) for n in range(40)]), "--pages")
    assert kept.read_text() == "mine" and not (kept.parent.parent / "train.json").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"title": None}, ["row 4", "'title'"]),
        ({"abstract": "  "}, ["row 4", "'abstract'"]),
        ({"abstract": ["a"]}, ["row 4", "'abstract'"]),
        ({"decision": 1}, ["row 4", "'decision'", "Accept (Poster)"]),
        ({"ratings": ["good"]}, ["row 4", "'ratings'", "good"]),
        ({"keywords": 3}, ["row 4", "'keywords'"]),
        ({"title": "\ud800"}, ["row 4", "surrogate"]),
        ({"id": "p1"}, ["id(s)", "p1"]),
        ({"images": ["../secret.png"]}, ["row 4", "leaves"]),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_written(source, change, words):
    rows = [paper(n) for n in range(40)]
    rows[3] |= change
    message = refused(source(rows))
    assert all(word in message for word in words), message


def test_bad_files_and_options_are_refused_in_one_line(source):
    rows = [paper(n) for n in range(40)]
    assert "line 3" in refused(source([*rows[:2], "{oops", *rows[2:]]))
    missing = [{key: value for key, value in row.items() if key != "decision"} for row in rows]
    assert "row 1: no key 'decision'" in refused(source(missing))
    assert "40 row(s) cannot be used" in refused(source(missing)) and "(30 more)" in refused(source(missing))
    assert "accept cannot fill 3 splits" in refused(source([paper(n, label=0) for n in range(40)]))
    assert "ratings" in refused(source([row | {"ratings": None} for row in rows]), "--train-agreeing")
    upside_down = [row | {"ratings": [9] if row["decision"] == "Reject" else [1]} for row in rows]
    assert "no boundary" in refused(source(upside_down), "--train-agreeing")
    assert "--split" in refused(source(rows), "--split", "85/5")
    rows[4]["images"] = ["none.png"]
    assert "row 5" in refused(source(rows), "--pages")
