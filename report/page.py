"""The page of compare.py: one self-contained HTML file with the images on which the experiments disagree."""

import base64
import hashlib
import io
import random
import re
from collections import defaultdict
from html import escape
from itertools import chain
from pathlib import Path
from statistics import mean

from errors import UserError
from images import image_path, open_image
from report.free_form import token_f1
from report.words import statements, tags
from tasks import TASKS
from templates import image_paths

TEMPLATE = Path(__file__).with_name("page.html")
THUMBNAIL_SIDE = 320  # pixels
MOST_OPTIONS = 60  # distinct questions that still make a list to choose from
TEXT_SHOWN = 400  # characters of a text sample


def page(
    report: dict, unit: str, size: str, tables: list, experiments: list, image_root: Path | None, most_images: int
) -> tuple[str, str]:
    """The finished page, and one line that says which images it holds and which are missing.

    report, size, tables: from compare.compare, size_of_test and tables. unit: what is scored, "question".
    experiments: `results.Experiment`s on one test set.
    image_root: folder of the images, over what the results say. most_images: more are left out, and counted.
    """
    task, runs = TASKS[report["task"]], [run for experiment in experiments for run in experiment.runs]
    as_sentences = report["headline"] == "predict_token_f1"
    cards = _disagreements(task, experiments, as_sentences)
    shown = _choose(cards, most_images)
    root = image_root or next((Path(run.image_root) for run in runs if run.image_root), Path("."))
    unreadable: list[str] = []
    html_cards = [_card(card, experiments, root, unreadable) for card in shown]

    items = sum(len(card["items"]) for card in shown)
    noun = "images" if _card_per_image(task) else f"{unit}s"
    if not cards:
        alike = "hit and missed the same targets" if task.POINTS else "gave the same answers everywhere"
        alike = "have the same token F1 on every question" if as_sentences else alike
        alike = alike if as_sentences or len(runs) == len(experiments) else f"are right equally often on every {unit}"
        summary = f"The experiments {alike}: there is nothing to show."
    else:
        summary = f"The experiments disagree on {len(cards)} {noun}; the page shows {len(shown)}"
        summary += f", with {items} {unit}s." if noun == "images" else "."
    if as_sentences and cards:
        summary += " The number before an answer is its token F1."
    if len(shown) < len(cards):
        turns = "the questions take turns, each in random order" if noun == "images" else "chosen at random"
        summary += f" {len(cards) - len(shown)} are left out (--pictures {most_images}); {turns}."
    if unreadable:
        summary += f" {len(unreadable)} images could not be opened under {root} (--image-root), first {unreadable[0]}."

    template = TEMPLATE.read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL).group(1)
    title = " · ".join(scores["name"] for scores in report["experiments"])
    fields = {
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "title": escape(title),
        "heading": _breakable(title),
        "size": escape(size),
        "sentences": "".join(f"<li>{_prose(statement)}</li>" for statement in statements(report)),
        "chart": _chart(report),
        "tables": "".join(_table(*table, is_open=number == 0) for number, table in enumerate(tables)),
        "notes": "".join(f"<li>{_prose(note)}</li>" for note in report["notes"]),
        "summary": escape(summary),
        "filters": _filters(shown, experiments, unit, as_sentences) if shown else "",
        "cards": "".join(html_cards),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match.group(1)], template), summary


# --- which images ---------------------------------------------------------------------------------------------------


def _disagreements(task, experiments: list, as_sentences: bool) -> list[dict]:
    """One card per image (per sample for cls and click) on which experiments that see the image disagree: in what they
    say, or, with several runs, in how often they are right; where answers are sentences, in token F1."""
    voters = [experiment for experiment in experiments if not experiment.without_images]
    voters = voters if len(voters) > 1 else experiments
    several = any(len(experiment.runs) > 1 for experiment in experiments)
    cards: dict = {}
    for sample_id in experiments[0].runs[0].rows:
        if as_sentences:
            said = {mean(_token_f1(run.rows[sample_id]) for run in experiment.runs) for experiment in voters}
        elif several:
            said = {mean(task.correct(run.rows[sample_id]) for run in experiment.runs) for experiment in voters}
        else:
            said = {task.verdict(experiment.runs[0].rows[sample_id]) for experiment in voters}
        if len(said) > 1:
            rows = [[run.rows[sample_id] for run in experiment.runs] for experiment in experiments]
            images = next(filter(None, map(image_paths, chain.from_iterable(rows))), [])
            key = tuple(images) if _card_per_image(task) and images else sample_id
            card = cards.setdefault(key, {"images": images, "items": []})
            card["items"].append(_item(task, rows, as_sentences))
    return list(cards.values())


def _card_per_image(task) -> bool:
    """Whether an image's questions stand on one card; each click has an image of its own to be marked on."""
    return task.UNIT != task.CLUSTER and not task.POINTS


def _token_f1(row: dict) -> float:
    return token_f1(str(row["prediction"]), str(row["answer"]))


def _item(task, of_experiments: list[list[dict]], as_sentences: bool) -> dict:
    """of_experiments: for each experiment the rows of its runs."""
    rows = list(chain.from_iterable(of_experiments))
    row = rows[0]
    (asked, gold), stage = task.asked_and_gold(row), row.get("stage")
    item = {
        "id": str(row["id"]),
        "stage": "" if stage is None else str(stage),
        "asked": str(asked)[:TEXT_SHOWN] + "…" * (len(str(asked)) > TEXT_SHOWN),
        "gold": str(gold),
        "texts": [str(task.said(row)) for row in rows],
        "rights": [task.correct(row) for row in rows],
        "right_mostly": [mean(map(task.correct, of_one)) > 0.5 for of_one in of_experiments],
    }
    if as_sentences:  # the best of an experiment's place is what "right" means elsewhere
        of_each = [mean(map(_token_f1, of_one)) for of_one in of_experiments]
        item["token_f1"] = [_token_f1(row) for row in rows]
        item["right_mostly"] = [value == max(of_each) for value in of_each]
    if task.POINTS:
        item["points"] = [row["point"], *(r["predicted_point"] for r in rows)]
        item["size"] = row["image_size"]
    return item


def _choose(cards: list[dict], most: int) -> list[dict]:
    """At most so many cards; the questions take turns, so that a rare one is not crowded out. Seeded, then in order."""
    if len(cards) <= most:
        return cards
    queues = defaultdict(list)
    for number in random.Random(0).sample(range(len(cards)), len(cards)):
        for asked in {item["asked"] for item in cards[number]["items"]}:
            queues[asked].append(number)
    chosen: set[int] = set()
    waiting = [iter(queues[asked]) for asked in sorted(queues)]
    while len(chosen) < most:
        for queue in waiting:
            number = next((n for n in queue if n not in chosen), None)
            if number is not None and len(chosen) < most:
                chosen.add(number)
    return [cards[number] for number in sorted(chosen)]


# --- HTML -------------------------------------------------------------------------------------------------------------


def thumbnail(path: Path, side: int = THUMBNAIL_SIDE) -> tuple[str, int, int]:
    """A small JPEG as data URI, with its width and height. side: of its longer edge, in pixels.

    Raises: `UserError` on what is no image.
    """
    image = open_image(path)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(), *image.size


def _card(card: dict, experiments: list, root: Path, unreadable: list[str]) -> str:
    figure = ""
    if card["images"]:
        name = str(card["images"][0])
        try:
            source, width, height = thumbnail(image_path(root, name))
            image = f'<img src="{source}" width="{width}" height="{height}" alt="image {escape(name)}">'
            image = f'<div class="image">{image}{_marks(card["items"][0])}</div>'
        except UserError:
            unreadable.append(name)
            image = '<div class="missing">image not found</div>'
        more = f" and {len(card['images']) - 1} more" if len(card["images"]) > 1 else ""
        figure = f"<figure>{image}<figcaption>{escape(name)}{more}</figcaption></figure>"
    items = "".join(_answers(item, experiments) for item in card["items"])
    return f'<article class="card">{figure}<ul class="items">{items}</ul></article>\n'


def _marks(item: dict) -> str:
    """Clicks: a ring at the gold point, a cross with the experiment's number at each predicted one."""
    if "points" not in item:
        return ""
    width, height = item["size"]
    unit = max(width, height) / 320
    (x, y), marks = item["points"][0], []
    for css in ("halo", "gold"):
        marks.append(f'<circle class="{css}" cx="{x:.1f}" cy="{y:.1f}" r="{9 * unit:.1f}"/>')
    for number, point in enumerate(item["points"][1:], start=1):
        if point is not None:
            x, y, arm = point[0], point[1], 6 * unit
            side = 2 * arm
            lines = f"M{x - arm:.1f} {y - arm:.1f}l{side:.1f} {side:.1f}m0 {-side:.1f}l{-side:.1f} {side:.1f}"
            marks += [f'<path class="halo" d="{lines}"/><path class="cross" d="{lines}"/>']
            place = f'x="{x + arm + 2 * unit:.1f}" y="{y + 4 * unit:.1f}" font-size="{13 * unit:.1f}"'
            marks.append(f'<text {place} stroke-width="{3 * unit:.1f}">{number}</text>')
    return f'<svg viewBox="0 0 {width} {height}" aria-hidden="true">{"".join(marks)}</svg>'


def _answers(item: dict, experiments: list) -> str:
    right = " ".join(str(n) for n, is_right in enumerate(item["right_mostly"]) if is_right)
    stage = f'<span class="stage">stage {escape(item["stage"])}</span>' if item["stage"] else ""
    rows = f'<tr class="gold"><th scope="row">gold</th><td>{_clamped(item["gold"])}</td></tr>'
    labels = [_run_labels(experiment) for experiment in experiments]
    said = zip(chain.from_iterable(labels), item["texts"], item["rights"], strict=True)
    for number, ((heading, name), text, is_right) in enumerate(said, start=1):
        mark, word = ("✓", "right") if is_right else ("✗", "wrong")
        if "token_f1" in item:
            mark, word = f"{item['token_f1'][number - 1]:.2f}", "token F1"
        label = f'<span class="number">{number}</span> ' * ("points" in item) + _breakable(name)
        answer = _clamped(text) if text.strip() else "<em>(empty answer)</em>"
        rows += f'<tr><th scope="rowgroup" colspan="2">{_breakable(heading)}</th></tr>' if heading else ""
        rows += f'<tr class="{word.replace(" ", "-")}"><th scope="row">{label}</th>'
        rows += f'<td><span class="mark" aria-hidden="true">{mark}</span>'
        rows += f'<span class="word">{word}: </span>{answer}</td></tr>'
    attributes = f'data-stage="{escape(item["stage"])}" data-question="{escape(item["asked"])}" data-right="{right}"'
    return f'<li {attributes}><p class="asked">{stage}{escape(item["asked"])}</p><table>{rows}</table></li>'


def _run_labels(experiment) -> list[tuple[str, str]]:
    """(heading, label) of each run's answer: a single run is called as its experiment, several stand below its name."""
    runs = experiment.runs
    if len(runs) == 1:
        return [("", experiment.name)]
    return [(experiment.name * (n == 0), run.name.removeprefix(experiment.name).strip()) for n, run in enumerate(runs)]


def _clamped(text: str) -> str:
    """Escaped text; of a long one the beginning, and the whole at a click."""
    if len(text) <= TEXT_SHOWN:
        return escape(text)
    return f'<details class="long"><summary>{escape(text[:TEXT_SHOWN])}…</summary>{escape(text[TEXT_SHOWN:])}</details>'


def _filters(cards: list[dict], experiments: list, unit: str, as_sentences: bool) -> str:
    items = [item for card in cards for item in card["items"]]
    stages = sorted({item["stage"] for item in items} - {""})
    questions = sorted({item["asked"] for item in items})
    out = ""
    if len(stages) > 1:
        chips = [("", "all"), *((stage, stage) for stage in stages)]
        out += '<fieldset><legend>Stage</legend><div class="chips">'
        for value, text in chips:
            box = f'<input type="radio" name="stage" value="{escape(value)}"{" checked" * (not value)}>'
            out += f"<label>{box}<span>{escape(text)}</span></label>"
        out += "</div></fieldset>"
    if 1 < len(questions) <= MOST_OPTIONS and len(questions) < len(items):
        options = "".join(f'<option value="{escape(asked)}">{escape(asked)}</option>' for asked in questions)
        options = f'<option value="">all</option>{options}'
        out += f'<label class="field">Question<select name="question">{options}</select></label>'
    options = '<option value="">anyone</option>'
    is_right, is_wrong = ("scores highest", "scores lower") if as_sentences else ("is right", "is wrong")
    for number, experiment in enumerate(experiments):
        name, mostly = escape(experiment.name), " in most runs" * (len(experiment.runs) > 1 and not as_sentences)
        options += f'<option value="right-{number}">{name} {is_right}{mostly}</option>'
        options += f'<option value="wrong-{number}">{name} {is_wrong}{mostly}</option>'
        if len(experiments) > 2:
            options += f'<option value="only-{number}">only {name} {is_right}</option>'
    if not as_sentences:
        options += '<option value="none">nobody is right</option>'
    legend = "Who scores highest" if as_sentences else "Who is right"
    out += f'<label class="field">{legend}<select name="right">{options}</select></label>'
    out += '<button type="reset">Clear</button><output id="count" role="status"></output>'
    return f'<form id="filters" data-unit="{unit}">{out}</form>'


def _prose(text: str) -> str:
    """Escaped text whose numbers keep to their units at a line's end."""
    return escape(re.sub(r" (?=%|points)|(?<=\bp) (?=[<=])|(?<=\bp [<=]) ", "\u00a0", text))


def _breakable(name: str) -> str:
    """A name that may break its line after an underscore."""
    return escape(name).replace("_", "_<wbr>")


def _chart(report: dict) -> str:
    """What is compared, with its interval, one line per experiment and baseline, on a common axis that fits them; of
    several runs a small dot each. The chance line of two classes is on the axis."""
    headline = report["headline"]
    of_run = headline.removeprefix("predict_")
    lines = [s for s in report["experiments"] + report["majority_baselines"] if s.get(headline) is not None]
    ends = [end for s in lines for end in (s[f"{headline}_ci"] or [s[headline]] * 2)]
    ends += [run[of_run] for s in lines for run in s.get("runs", [])] + [report["chance"]] * bool(report["chance"])
    step = next(s for s in (1, 2, 5, 10, 20) if 100 * (max(ends) - min(ends)) <= 6 * s or s == 20)
    low = max(0, int(100 * min(ends) // step * step - step))
    high = min(100, int(-(-100 * max(ends) // step) * step + step))

    def place(share: float) -> str:
        return f"{(100 * share - low) / (high - low) * 100:.2f}%"

    out, chance = "", ""
    if report["chance"]:
        chance = f'<span class="chance" style="left:{place(report["chance"])}" title="chance"></span>'
    for scores in lines:
        value, interval = scores[headline], scores[f"{headline}_ci"]
        text = f"{100 * value:.1f} %" + (f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else "")
        bar = ""
        if interval:
            width = (interval[1] - interval[0]) * 10000 / (high - low)
            bar = f'<span class="bar" style="left:{place(interval[0])};width:{width:.2f}%"></span>'
        runs = scores.get("runs", [])
        seeds = [f'<span class="seed" style="left:{place(run[of_run])}"></span>' for run in runs] * (len(runs) > 1)
        dot = f'<span class="dot" style="left:{place(value)}"></span>'
        track = f'<div class="track">{chance}{bar}{dot}{"".join(seeds)}</div>'
        label = "".join(f'<span class="tag">{escape(tag)}</span>' for tag in tags(scores))
        label += f'<span class="tag">{len(runs)} seeds</span>' if len(runs) > 1 else ""
        name = _breakable(scores["name"])
        css = ' class="baseline"' if scores["baseline"] else ""
        out += f'<li{css}><span class="name">{name} {label}</span>{track}<span class="value">{text}</span></li>'
    ticks = "".join(f'<span style="left:{place(t / 100)}">{t}</span>' for t in range(low, high + 1, step))
    if report["chance"]:
        label = f'<span style="left:{place(report["chance"])}">chance, {100 * report["chance"]:.0f} %</span>'
        out = f'<li class="axis top" aria-hidden="true"><div class="track">{label}</div></li>{out}'
    return f'<ol class="chart">{out}<li class="axis" aria-hidden="true"><div class="track">{ticks}</div></li></ol>'


def _table(title: str, header: list[str], rows: list[list[str]], is_open: bool) -> str:
    head = "".join(f'<th scope="col">{_prose(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    region = f'<div class="wide" tabindex="0" role="region" aria-label="{escape(title)}">'
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<details{' open' * is_open}><summary>{escape(title)}</summary>{region}{table}</div></details>"
