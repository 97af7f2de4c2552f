"""A comparison in words and tables: what compare.py prints and writes as Markdown."""

from report.resampling import LEVEL, RESAMPLES, SEED
from tasks import TASKS

ALPHA = 0.05
HEADINGS = {  # score -> heading; those with % are shown in percent
    "predict_accuracy": "accuracy %",
    "predict_accuracy_macro": "mean over questions %",
    "predict_f1": "F1 %",
    "predict_jaccard": "Jaccard %",
    "predict_precision": "precision %",
    "predict_recall": "recall %",
    "predict_auroc": "AUROC",
    "predict_brier": "Brier score",
    "predict_ece": "calibration error %",
    "predict_median_distance_share": "median distance, % of diagonal",
    "outside_candidates": "answers outside candidates",
    "unparsable": "unparsable answers",
}


def sentence(pair: dict, accuracy: dict[str, float], unit: str, cluster: str) -> str:
    """What the numbers of one pair (an entry of pairs in compare.json) allow one to say, and no more."""
    first, second, difference = pair["first"], pair["second"], pair["difference"]
    if pair["only_first_right"] == pair["only_second_right"] == 0:
        return f"{first} and {second} are right and wrong on exactly the same {unit}s."
    if difference < 0:
        first, second = second, first
    interval = ""
    reaches_zero = False
    if pair["difference_ci"]:
        low, high = sorted(end if difference >= 0 else -end for end in pair["difference_ci"])
        reaches_zero = low <= 0 <= high
        interval = f"95 % interval {_points(low)} to {_points(high)} points, "
    adjusted = f", adjusted for {pair['family_size']} pairs" if pair["family_size"] > 1 else ""
    shares = f"{accuracy[first]:.1%} against {accuracy[second]:.1%}".replace("%", " %")
    numbers = f"{shares}, {_points(abs(difference))} points ({interval}p {_p_value(pair['p_holm'])}{adjusted})"
    if pair["p_holm"] < ALPHA:
        doubt = "; the interval reaches zero, so it is a close call" if reaches_zero else ""
        claim = f"{first} is right more often than {second}, by more than the choice of {cluster}s explains"
        return f"{claim}: {numbers}{doubt}."
    if pair["smallest_possible_p"] * pair["family_size"] >= ALPHA:
        count = pair["clusters_that_differ"]
        if count == 0:
            return f"{first} and {second} are right equally often on every {cluster}, but on other {unit}s: {shares}."
        differing = f"{count} {cluster}{'s' * (count != 1)}"
        return f"{first} and {second} differ on only {differing}, too few for any test to tell them apart: {numbers}."
    doubt = ""
    if interval and not reaches_zero:
        enough = f"among {pair['family_size']} pairs that is not enough" if pair["p"] < ALPHA else "the test disagrees"
        doubt = f" The interval alone leaves out zero, but {enough}."
    return f"These numbers do not tell {first} and {second} apart, nor show them equal: {numbers}.{doubt}"


def notes(task: str) -> list[str]:
    """How the numbers of a report came about, and what they do not speak of."""
    unit, cluster = TASKS[task].UNIT, TASKS[task].CLUSTER
    together = f", because the {unit}s of one {cluster} are not independent" if unit != cluster else ""
    resampled = f"percentile bootstrap over {cluster}s, {RESAMPLES} resamples, seed {SEED}"
    lines = [
        f"Intervals: {100 * LEVEL:.0f} % {resampled}{together}.",
        f"p: exact two-sided sign-flip permutation test over {cluster}s; p (Holm): adjusted for every pair compared"
        + (", in a table of parts for every pair in every part." if unit != cluster else "."),
        "All of it speaks of these trained models on this test set: another training seed may move a score as well.",
    ]
    if TASKS[task].HAS_HEAD:
        lines.append("Resampling adds noise to every bin, so the calibration error's interval lies high.")
    return lines


def _points(share: float) -> str:
    return f"{round(100 * share, 1) + 0:.1f}".replace("-", "−")  # + 0: no -0.0


def _p_value(p: float) -> str:
    return "< 0.0001" if p < 0.0001 else f"= {p:.4f}" if p < 0.01 else f"= {p:.3f}"


def _cell(scores: dict, name: str) -> str:
    value, interval = scores.get(name), scores.get(f"{name}_ci")
    if value is None:
        return "–"
    if isinstance(value, int):
        return str(value)
    shown = "{:.3f}".format if name in HEADINGS and "%" not in HEADINGS[name] else _points
    return shown(value) + (f" [{shown(interval[0])}, {shown(interval[1])}]" if interval else "")


def tables(report: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """The report as (title, header, rows) of text cells: scores, pairs, then a table per kind of part."""
    everyone = report["experiments"] + report["majority_baselines"]
    shown = [name for name in HEADINGS if any(scores.get(name) is not None for scores in everyone)]
    named = [s["name"] + (f" (baseline: {s['baseline']})" if s["baseline"] else "") for s in everyone]
    out = [
        (
            "Scores",
            ["experiment", *(HEADINGS[name] for name in shown)],
            [[name, *(_cell(scores, key) for key in shown)] for name, scores in zip(named, everyone, strict=True)],
        ),
        (
            "Pairs",
            ["pair", "difference in points", "only first right", "only second right", "p", "p (Holm)"],
            [
                [
                    f"{pair['first']} − {pair['second']}",
                    _cell(pair, "difference"),
                    str(pair["only_first_right"]),
                    str(pair["only_second_right"]),
                    _p_value(pair["p"]).removeprefix("= "),
                    _p_value(pair["p_holm"]).removeprefix("= "),
                ]
                for pair in report["pairs"]
            ],
        ),
    ]
    for kind in dict.fromkeys(part["kind"] for part in report["parts"]):
        parts = [part for part in report["parts"] if part["kind"] == kind]
        pairs = [f"{pair['first']} − {pair['second']}" for pair in parts[0]["pairs"]]
        header = [kind, "samples", *(a["experiment"] for a in parts[0]["accuracies"])]
        rows = [[p["name"], str(p["samples"]), *(_cell(a, "accuracy") for a in p["accuracies"])] for p in parts]
        out.append((f"Accuracy % by {kind}", header, rows))
        rows = [
            [p["name"], *(f"{_cell(q, 'difference')}; p {_p_value(q['p_holm'])}" for q in p["pairs"])] for p in parts
        ]
        out.append((f"Differences in points by {kind}, p adjusted over this table", [kind, *pairs], rows))
    return out


def console_table(header: list[str], rows: list[list[str]]) -> str:
    """Columns aligned with spaces, a rule under the header."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    return "\n".join(line.rstrip() for line in [lines[0], "-" * len(lines[0]), *lines[1:]])


def size_of_test(report: dict) -> str:
    """ "9000 questions on 975 images." """
    unit, cluster = TASKS[report["task"]].UNIT, TASKS[report["task"]].CLUSTER
    return f"{report['samples']} {unit}s" + (f" on {report['clusters']} {cluster}s." if unit != cluster else ".")


def markdown(report: dict) -> str:
    """The whole report as Markdown."""
    names = ", ".join(scores["name"] for scores in report["experiments"])
    lines = [f"# {names}", "", size_of_test(report), ""]
    lines += [f"- {pair['sentence']}" for pair in report["pairs"]]
    for title, header, rows in tables(report):
        escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in [header, *rows]]
        table = [f"| {' | '.join(row)} |" for row in escaped]
        lines += ["", f"## {title}", "", table[0], "|" + " --- |" * len(header), *table[1:]]
    return "\n".join([*lines, "", *(f"- {note}" for note in report["notes"]), ""])
