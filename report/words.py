"""A comparison in words and tables: what compare.py prints and writes as Markdown."""

import re

from report.resampling import RESAMPLES, SEED
from report.variance import LEVEL
from tasks import TASKS

ALPHA = 0.05
MANY_PAIRS = 6  # from so many on, those that end alike share a statement
HEADINGS = {  # score -> heading; those with % are shown in percent
    "predict_accuracy": "accuracy %",
    "predict_accuracy_macro": "mean over questions %",
    "predict_f1": "F1 %",
    "predict_jaccard": "Jaccard %",
    "predict_token_f1": "token F1 %",
    "predict_bleu": "BLEU %",
    "predict_rouge1": "ROUGE-1 %",
    "predict_rouge2": "ROUGE-2 %",
    "predict_rougeL": "ROUGE-L %",
    "predict_meteor": "METEOR %",
    "predict_precision": "precision %",
    "predict_recall": "recall %",
    "predict_auroc": "AUROC",
    "predict_brier": "Brier score",
    "predict_ece": "calibration error %",
    "predict_median_distance_share": "median distance, % of diagonal",
    "outside_candidates": "answers outside candidates",
    "unparsable": "unparsable answers",
}
HEADLINES = {  # what is compared -> how its findings are said
    "predict_accuracy": {
        "better": "is right more often than",
        "alike": "are right and wrong on exactly the same {unit}s",
        "tied": "are right equally often on every {cluster}, but on other {unit}s",
        "value": "",
        "only": "only {} right",
    },
    "predict_token_f1": {
        "better": "scores higher than",
        "alike": "have the same token F1 on every {unit}",
        "tied": "have the same token F1 on every {cluster}, but not on every {unit}",
        "value": "token F1 ",
        "only": "{} higher on",
    },
}


def sentence(pair: dict, accuracy: dict[str, float], unit: str, cluster: str, headline: str) -> str:
    """What the numbers of one pair (an entry of pairs in compare.json) allow one to say, and no more."""
    say = {key: text.replace("{unit}", unit).replace("{cluster}", cluster) for key, text in HEADLINES[headline].items()}
    first, second, difference = pair["first"], pair["second"], pair["difference"]
    if pair["only_first_right"] == pair["only_second_right"] == 0:
        return f"{first} and {second} {say['alike']}."
    if difference < 0:
        first, second = second, first
    interval = ""
    reaches_zero = False
    if pair["difference_ci"]:
        low, high = sorted(end if difference >= 0 else -end for end in pair["difference_ci"])
        reaches_zero = low <= 0 <= high
        interval = f"95 % interval {_points(low)} to {_points(high)} points, "
    adjusted = f", adjusted for {pair['family_size']} pairs" if pair["family_size"] > 1 else ""
    shares = f"{say['value']}{accuracy[first]:.1%} against {accuracy[second]:.1%}".replace("%", " %")
    numbers = f"{shares}, {_points(abs(difference))} points ({interval}p {_p_value(pair['p_holm'])}{adjusted})"
    seeds = " and of seeds" if min(pair["runs"]) > 1 else ""
    scope = _scope(pair)
    equal = is_equal(pair)
    within = f" within {_margin(pair['margin'])}" if equal else ""
    if pair["p_holm"] < ALPHA:
        doubt = "; the interval reaches zero, so it is a close call" if reaches_zero else ""
        claim = f"{first} {say['better']} {second}, by more than the choice of {cluster}s{seeds} explains"
        also = f" The two are equal{within} all the same." if equal else ""
        return f"{claim}: {numbers}{doubt}.{also}{scope}"
    if equal:
        low, high = pair["margin_ci"]
        shown = f"{100 * pair['margin_level']:.3g} % interval {_points(low)} to {_points(high)} points"
        return f"{pair['first']} and {pair['second']} are shown equal{within}: {shares}, {shown}.{scope}"
    if pair["smallest_possible_p"] * pair["family_size"] >= ALPHA:
        count = pair["clusters_that_differ"]
        if count == 0:
            return f"{first} and {second} {say['tied']}: {shares}.{scope}"
        differing = f"{count} {cluster}{'s' * (count != 1)}"
        return (
            f"{first} and {second} differ on only {differing}, too few for any test to tell them apart: "
            f"{numbers}.{scope}"
        )
    doubt = ""
    if interval and not reaches_zero:
        enough = f"among {pair['family_size']} pairs that is not enough" if pair["p"] < ALPHA else "the test disagrees"
        doubt = f" The interval alone leaves out zero, but {enough}."
    alike = "nor show them equal" + (f" within {_margin(pair['margin'])}" if pair.get("margin") is not None else "")
    return f"These numbers do not tell {first} and {second} apart, {alike}: {numbers}.{doubt}{_power(pair)}{scope}"


def is_equal(pair: dict) -> bool:
    """Whether the two one-sided tests show the pair equal within its margin."""
    return bool(pair.get("margin_ci")) and all(abs(end) < pair["margin"] for end in pair["margin_ci"])


def _margin(share: float) -> str:
    return f"{100 * share:g} point{'s' * (share != 0.01)}"


def _scope(pair: dict) -> str:
    """Whether the sentence speaks of recipes or of trained models alone."""
    if min(pair["runs"]) > 1:
        return ""
    spoken_of = "answers alone" if pair["made_elsewhere"] else "trained models, not of their recipes"
    if max(pair["runs"]) == 1:
        return f" With one run each, this speaks of these {'' if pair['made_elsewhere'] else 'two '}{spoken_of}."
    single = pair["first"] if pair["runs"][0] == 1 else pair["second"]
    return f" With a single run of {single}, this speaks of these {spoken_of}."


def _power(pair: dict) -> str:
    if pair["detectable_difference"] is None:
        return ""
    return f" A true difference of {100 * pair['detectable_difference']:.2f} points would be found in 80 % of cases."


def recipe_sentence(pair: dict) -> str:
    """In what the recipes of a pair differ, and whether a difference can be ascribed to it."""
    keys = pair["differing_keys"]
    if pair["made_elsewhere"]:
        return _made_elsewhere(pair["made_elsewhere"])
    if keys is None:
        return "In which keys their configs differ is not recorded: run evaluate.py again."

    told = [
        f"{entry['key']} ({_values(entry)}" + (", the nearest that fits the model)" if entry["follows_model"] else ")")
        for entry in keys
        if entry["recorded"] and (entry["key"] != "seed" or pair["runs"] == [1, 1])
    ]
    unknown = any(not entry["recorded"] for entry in keys)
    mattering = [entry["key"] for entry in keys if entry["matters"]]
    listed = f" Keys that differ: {', '.join(told)}." if told else ""
    if unknown:
        known = f"differ in {', '.join(mattering)}" if mattering else "are the same in all that is recorded of them"
        return (
            f"The recipes of {pair['first']} and {pair['second']} {known}; training data not recorded, which may "
            f"differ as well.{listed}"
        )
    if not mattering:
        return f"The recipes of {pair['first']} and {pair['second']} are the same.{listed}"
    if len(mattering) == 1:
        return f"{pair['first']} and {pair['second']} differ in {mattering[0]} alone.{listed}"
    return (
        f"{pair['first']} and {pair['second']} differ in {len(mattering)} things that matter, so no difference "
        f"between them can be ascribed to any one of these.{listed}"
    )


def _made_elsewhere(names: list[str]) -> str:
    if len(names) == 1:
        return f"{names[0]}'s answers were made elsewhere; what made them is not known."
    return f"The answers of {', '.join(names[:-1])} and {names[-1]} were made elsewhere; what made them is not known."


def _values(entry: dict) -> str:
    """The two values of one of a pair's differing keys."""
    if not entry["recorded"]:
        return " / ".join("not recorded" if entry[of] is None else _value(entry[of]) for of in ("first", "second"))
    return f"{_value(entry['first'])} / {_value(entry['second'])}"


def _value(value) -> str:
    text = "none" if value is None else str(value)
    return text[:8] if re.fullmatch("[0-9a-f]{64}", text) else text  # a hash


def statements(report: dict) -> list[str]:
    """What to say of all pairs: a sentence each, or, of many pairs, one statement for all those that end alike."""
    pairs = report["pairs"]
    if len(pairs) < MANY_PAIRS:
        return [f"{pair['sentence']} {pair['recipe']}" for pair in pairs]
    cluster = TASKS[report["task"]].CLUSTER
    unit = TASKS[report["task"]].UNIT
    ends: dict[str, list[dict]] = {"same": [], "better": [], "equal": [], "undecided": []}
    for pair in pairs:
        if pair["only_first_right"] == pair["only_second_right"] == 0:
            ends["same"].append(pair)
        else:
            ends["better" if pair["p_holm"] < ALPHA else "equal" if is_equal(pair) else "undecided"].append(pair)
    said = []
    if ends["better"]:
        several = " and of seeds" if min(min(pair["runs"]) for pair in ends["better"]) > 1 else ""
        found = "; ".join(_finding(pair) for pair in ends["better"])
        said.append(
            f"{len(ends['better'])} of {len(pairs)} pairs differ by more than the choice of {cluster}s{several} "
            f"explains (adjusted for {len(pairs)} pairs; points with their 95 % intervals): {found}."
        )
    if ends["equal"]:
        margin = _margin(pairs[0]["margin"])
        said.append(
            f"{len(ends['equal'])} of {len(pairs)} pairs are shown equal within {margin}: {_names(ends['equal'])}."
        )
    if ends["same"]:
        said.append(
            f"{len(ends['same'])} of {len(pairs)} pairs {HEADLINES[report['headline']]['alike'].format(unit=unit)}: "
            f"{_names(ends['same'])}."
        )
    if ends["undecided"]:
        least = [100 * p["detectable_difference"] for p in ends["undecided"] if p["detectable_difference"] is not None]
        sizes = list(dict.fromkeys(f"{size:.2f}" for size in (min(least), max(least)))) if least else []
        differences = "A true difference" if len(least) == 1 else "True differences"
        power = f" {differences} of {' to '.join(sizes)} points would be found in 80 % of cases."
        said.append(
            f"{len(ends['undecided'])} of {len(pairs)} pairs are not told apart by these numbers, nor shown equal: "
            f"{_names(ends['undecided'])}.{power if least else ''}"
        )
    if elsewhere := list(dict.fromkeys(name for pair in pairs for name in pair["made_elsewhere"])):
        said.append(_made_elsewhere(elsewhere))
    if any(min(pair["runs"]) == 1 and len(pair["made_elsewhere"]) < 2 for pair in pairs):
        said.append("Where a pair has a single run, this speaks of the trained models, not of their recipes.")
    known = [pair for pair in pairs if pair["differing_keys"] is not None and not pair["made_elsewhere"]]
    one_key = [
        pair
        for pair in known
        if sum(entry["matters"] for entry in pair["differing_keys"]) == 1
        and all(entry["recorded"] for entry in pair["differing_keys"])
    ]
    if unrecorded := [p for p in known if not all(entry["recorded"] for entry in p["differing_keys"])]:
        said.append(
            f"{len(unrecorded)} of {len(pairs)} pairs: training data not recorded, which may differ: "
            f"{_names(unrecorded)}."
        )
    if known:
        said.append(
            f"{len(one_key)} of {len(pairs)} pairs differ in one key alone"
            + (f": {_names(one_key)}" if one_key else "")
            + ". Where more differ (table Keys that differ), no difference can be ascribed to any one of them."
        )
    return said


def _finding(pair: dict) -> str:
    first, second, ends = pair["first"], pair["second"], pair["difference_ci"] or []
    if pair["difference"] < 0:
        first, second, ends = second, first, sorted(-end for end in ends)
    interval = f" [{', '.join(map(_points, ends))}]" if ends else ""
    return f"{first} over {second} by {_points(abs(pair['difference']))}{interval}"


def _names(pairs: list[dict]) -> str:
    return "; ".join(f"{pair['first']} and {pair['second']}" for pair in pairs)


def notes(task: str, scores: list[dict], baselines: list[dict], headline: str) -> list[str]:
    """How the numbers of a report came about, and what they do not speak of. scores: those of each experiment."""
    of_sentences = headline == "predict_token_f1"
    unit, cluster = TASKS[task].UNIT, TASKS[task].CLUSTER
    together = f", because the {unit}s of one {cluster} are not independent" if unit != cluster else ""
    single = any(len(one["runs"]) == 1 for one in scores)
    several = any(len(one["runs"]) > 1 for one in scores)
    lines = [
        "The answers are sentences, so token F1 is compared, question by question: differences, p, power and the "
        "tables of parts are of token F1. Accuracy is exact match, which says little of sentences."
    ] * of_sentences
    lines += [
        f"Intervals are of {100 * LEVEL:.0f} %. Accuracies: Wilson's on the effective sample size over {cluster}s"
        f"{together}. Differences{' and means over parts' * of_sentences}: t over {cluster}s"
        + (", and seeds where both have several." if several else "."),
        f"All other intervals: percentile bootstrap over {cluster}s, {RESAMPLES} resamples, seed {SEED}"
        + ("; several runs: means, without interval" if several else "")
        + (f", but of token F1: t over {cluster}s and seeds." if several and of_sentences else "."),
    ]
    if single:
        lines.append(
            f"p of single runs: two-sided sign-flip permutation test over {cluster}s, exact where differences are "
            "symmetric. Below 100 it can be wrong: with skewed differences simulations gave 7 to 27 % false "
            "positives."
        )
    if several:
        lines.append("p of several runs each: t test on the two-way variance of seeds and images (Satterthwaite).")
    lines.append(
        "p (Holm): adjusted for every pair compared"
        + (", in a table of parts for every pair in every part." if unit != cluster else ".")
    )
    lines += [_seeds_note(one) for one in scores if len(one["runs"]) > 1]
    if any(len(one["runs"]) == 1 and not one["made_elsewhere"] for one in scores):
        lines.append(
            "Another training seed may move a score as well. To speak of recipes, train 3 seeds of each, and 5 where "
            "they spread by about a point: sbatch --array=1-3 FILE.slurm."
        )
    if TASKS[task].HAS_HEAD:
        lines.append("Resampling adds noise to every bin, so the calibration error's interval lies high.")
    if any(one.get("predict_f1") is not None and "predict_precision" not in one for one in scores):
        lines.append("F1 and Jaccard cover the multi-label questions only.")
    for one in baselines:
        if one["unseen"]:
            lines.append(f"{one['name']}: {one['unseen']} {unit}s are never asked in training, and count as wrong.")
    return lines


def _seeds_note(one: dict) -> str:
    spread, runs = one["seed_spread"], len(one["runs"])
    if spread is None:
        return f"{one['name']}: {runs} runs; a single image tells nothing of their spread from seed to seed."
    wanted = 5 if spread >= 0.0075 else 3
    advice = f"{wanted} seeds are recommended at such a spread" + (", as there are" if runs >= wanted else "")
    return f"{one['name']}: {runs} runs, spread from seed to seed {100 * spread:.2f} points; {advice}."


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
    low, high = ("open" if end is None else shown(end) for end in interval or (None, None))
    return shown(value) + (f" [{low}, {high}]" if interval else "")


def tags(scores: dict) -> list[str]:
    """What an experiment or a baseline is marked with, beside its name."""
    marks = [f"baseline: {scores['baseline']}"] if scores["baseline"] else []
    return marks + ["answers made elsewhere"] * bool(scores.get("made_elsewhere"))


def tables(report: dict) -> list[tuple[str, list[str], list[list[str]]]]:
    """The report as (title, header, rows) of text cells: scores, pairs, then a table per kind of part."""
    everyone = report["experiments"] + report["majority_baselines"]
    headline = report["headline"]
    shown = [name for name in HEADINGS if any(scores.get(name) is not None for scores in everyone)]
    shown.sort(key=lambda name: name != headline)  # what is compared comes first
    named = [s["name"] + "".join(f" ({tag})" for tag in tags(s)) for s in everyone]
    out = [
        (
            "Scores",
            ["experiment", *(HEADINGS[name] for name in shown)],
            [[name, *(_cell(scores, key) for key in shown)] for name, scores in zip(named, everyone, strict=True)],
        ),
        (
            "Pairs",
            [
                "pair",
                "difference in points",
                "80 % power from",
                *(HEADLINES[headline]["only"].format(which) for which in ("first", "second")),
                "p",
                "p (Holm)",
            ],
            [
                [
                    f"{pair['first']} − {pair['second']}",
                    _cell(pair, "difference"),
                    "–" if pair["detectable_difference"] is None else f"{100 * pair['detectable_difference']:.2f}",
                    str(pair["only_first_right"]),
                    str(pair["only_second_right"]),
                    _p_value(pair["p"]).removeprefix("= "),
                    _p_value(pair["p_holm"]).removeprefix("= "),
                ]
                for pair in report["pairs"]
            ],
        ),
    ]
    if any(pair["differing_keys"] for pair in report["pairs"]):
        keys = list(dict.fromkeys(entry["key"] for pair in report["pairs"] for entry in pair["differing_keys"] or []))
        rows = []
        for pair in report["pairs"]:
            found = {entry["key"]: _values(entry) for entry in pair["differing_keys"] or []}
            rows.append([f"{pair['first']} − {pair['second']}", *(found.get(key, "") for key in keys)])
        out.append(("Keys that differ", ["pair", *keys], rows))
    planned = [(pair, row) for pair in report["pairs"] for row in (pair.get("plan") or {}).get("rows", [])]
    if planned:
        wanted = _margin(planned[0][0]["plan"]["difference"])
        header = [
            "pair",
            "spread from seed to seed",
            "runs each",
            f"images for {wanted}",
            "points found with these images",
        ]
        rows = [
            [
                f"{pair['first']} − {pair['second']}",
                f"{100 * row['spread']:.2f}" + " (assumed)" * pair["plan"]["spread_is_assumed"],
                str(row["runs"]),
                "no number is enough" if row["images"] is None else f"{row['images']:,}",
                f"{100 * row['detectable_here']:.2f}",
            ]
            for pair, row in planned
        ]
        out.append((f"Plan: to find {wanted} in 80 % of cases", header, rows))
    for kind in dict.fromkeys(part["kind"] for part in report["parts"]):
        parts = [part for part in report["parts"] if part["kind"] == kind]
        pairs = [f"{pair['first']} − {pair['second']}" for pair in parts[0]["pairs"]]
        header = [kind, "samples", *(a["experiment"] for a in parts[0]["accuracies"])]
        rows = [[p["name"], str(p["samples"]), *(_cell(a, "accuracy") for a in p["accuracies"])] for p in parts]
        of = HEADINGS[headline][0].upper() + HEADINGS[headline][1:]
        out.append((f"{of} by {kind}", header, rows))
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
    size = f"{report['samples']} {unit}s" + (f" on {report['clusters']} {cluster}s." if unit != cluster else ".")
    return size + " Compared by token F1." * (report["headline"] == "predict_token_f1")


def markdown(report: dict) -> str:
    """The whole report as Markdown."""
    names = ", ".join(scores["name"] for scores in report["experiments"])
    lines = [f"# {names}", "", size_of_test(report), ""]
    lines += [f"- {statement}" for statement in statements(report)]
    for title, header, rows in tables(report):
        escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in [header, *rows]]
        table = [f"| {' | '.join(row)} |" for row in escaped]
        lines += ["", f"## {title}", "", table[0], "|" + " --- |" * len(header), *table[1:]]
    return "\n".join([*lines, "", *(f"- {note}" for note in report["notes"]), ""])
