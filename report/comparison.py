"""Results of one test set -> differences, intervals and p-values: pure functions, the content of compare.json."""

from itertools import combinations

import numpy as np

from errors import UserError
from report.free_form import token_f1
from report.metrics import image_key
from report.resampling import cluster_numbers, holm, in_whole_numbers, sign_flip_p_value, smallest_p_value
from report.results import Experiment, Results, differing_keys
from report.variance import ROUNDING, Estimate, Plan
from report.words import ALPHA, notes, recipe_sentence, sentence
from tasks import TASKS

PLANNED_RUNS, ASSUMED_SPREADS = (3, 5, 10), (0.0025, 0.005, 0.01)
MOST_QUESTIONS = 60  # distinct questions that still make a table; free-form sets have a new question in every sample


def compare(experiments: list[Experiment], margin: float | None = None, wanted: float | None = None) -> dict:
    """Experiments on one test set (check_same_test) -> the report, the content of compare.json.

    What is compared, `headline`, is accuracy; where all answers are sentences, token F1.
    Accuracies: Wilson's interval. Differences: t intervals, over images and, where both experiments have several runs,
    over seeds (`variance.Estimate`). p-values: of the same t where both have several runs, else exact sign flip of
    whole images; adjusted by Holm's method over all pairs for the whole test set, and over all pairs and all parts of
    one kind for the parts (stages, questions, target sizes). margin: a difference below it counts as none; tested by
    two one-sided tests, at a level divided by the number of pairs. wanted: a difference to plan images and seeds for.
    """
    runs = [run for experiment in experiments for run in experiment.runs]
    ids = list(runs[0].rows)
    task = TASKS[runs[0].task]
    keys = ids if task.CLUSTER == task.UNIT else [_shared_image_key(sample_id, runs) for sample_id in ids]
    scores = [_scores(experiment, ids, keys) for experiment in experiments]  # first: it refuses rows of the wrong shape
    _refuse_two_kinds_of_answers(scores, [score["folder"] for score in scores])
    clusters = cluster_numbers(keys)
    cluster_count = int(clusters.max()) + 1
    rights = []  # for each experiment (runs, samples)
    for experiment in experiments:
        rights.append(np.array([[task.correct(run.rows[i]) for i in ids] for run in experiment.runs]))
        for run, accuracy in zip(experiment.runs, rights[-1].mean(axis=1), strict=True):
            if run.stated_accuracy is not None and abs(run.stated_accuracy - accuracy) > 0.5 / len(ids):
                raise UserError(
                    f"{run.folder}: the score file says {run.stated_accuracy:.4f}, its predictions give "
                    f"{accuracy:.4f}; they are of different runs: run evaluate.py again"
                )

    headline = "predict_token_f1" if all("free_form" in score for score in scores) else "predict_accuracy"
    values = rights  # for each experiment (runs, samples)
    if headline == "predict_token_f1":
        values = [
            np.array(
                [[token_f1(str(run.rows[i]["prediction"]), str(run.rows[i]["answer"])) for i in ids] for run in runs]
            )
            for runs in (experiment.runs for experiment in experiments)
        ]

    def count(part: np.ndarray, values: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
        """(clusters,) how many questions of each image there are; for each experiment (runs, clusters) how many of them
        each run answered right, or the sum of their scores."""
        sums = [np.array([np.bincount(clusters[part], run[part], cluster_count) for run in runs]) for runs in values]
        return np.bincount(clusters[part], minlength=cluster_count), sums

    pairs = list(combinations(range(len(experiments)), 2))
    measured = []
    for kind, name, part in _parts(task, [runs[0].rows[i] for i in ids]):
        asked, hits = count(part, values)
        accuracies = [Estimate.of([of_one], asked) for of_one in hits]
        measured.append(
            {
                "kind": kind,
                "name": name,
                "samples": int(part.sum()),
                "accuracies": [
                    {"experiment": experiment.name, "accuracy": one.value, "accuracy_ci": _interval(one, headline)}
                    for experiment, one in zip(experiments, accuracies, strict=True)
                ],
                "pairs": [
                    {"first": experiments[a].name, "second": experiments[b].name}
                    | _difference(hits[a], hits[b], asked)
                    | _disagreement(values[a][:, part], values[b][:, part])
                    for a, b in pairs
                ],
            }
        )
    for kind in {part["kind"] for part in measured}:
        family = [pair for part in measured if part["kind"] == kind for pair in part["pairs"]]
        for pair, adjusted in zip(family, holm([pair["p"] for pair in family]), strict=True):
            pair["p_holm"], pair["family_size"] = adjusted, len(family)
    whole = measured[0]
    everything = np.ones(len(ids), dtype=bool)
    asked, hits = count(everything, values)
    for score, of_one, exact in zip(scores, hits, count(everything, rights)[1], strict=True):
        one, accuracy = Estimate.of([of_one], asked), Estimate.of([exact], asked)
        score["predict_accuracy"], score["predict_accuracy_ci"] = accuracy.value, accuracy.wilson()
        if headline != "predict_accuracy":  # a single run's interval stays that of evaluate.py
            score.setdefault(f"{headline}_ci", _interval(one, headline))
        score["seed_spread"] = one.seed_spread(len(of_one))
    accuracy = {one["experiment"]: one["accuracy"] for one in whole["accuracies"]}
    for (a, b), pair in zip(pairs, whole["pairs"], strict=True):
        estimate, runs_each = Estimate.of([hits[a], hits[b]], asked), [len(hits[a]), len(hits[b])]
        pair["runs"] = runs_each
        pair["detectable_difference"] = estimate.detectable(ALPHA / len(pairs))
        if margin is not None:
            pair["margin"], pair["margin_level"] = margin, 1 - 2 * ALPHA / len(pairs)
            pair["margin_ci"] = estimate.interval(pair["margin_level"])
        if wanted is not None:
            pair["plan"] = _plan(estimate, min(runs_each), wanted, ALPHA / len(pairs))
        pair["differing_keys"] = differing_keys(experiments[a].runs[0], experiments[b].runs[0])
        pair["made_elsewhere"] = [experiments[n].name for n in (a, b) if experiments[n].made_elsewhere]
        pair["sentence"] = sentence(pair, accuracy, task.UNIT, task.CLUSTER, headline)
        pair["recipe"] = recipe_sentence(pair)
    baselines = _majority_baselines(experiments)
    return {
        "task": runs[0].task,
        "headline": headline,
        "samples": len(ids),
        "clusters": cluster_count,
        "experiments": scores,
        "chance": 0.5 if len(runs[0].rows[ids[0]].get("probabilities", [])) == 2 else None,
        "majority_baselines": baselines,
        "pairs": whole["pairs"],
        "parts": measured[1:],
        "notes": notes(runs[0].task, scores, baselines, headline),
    }


def _interval(one: Estimate, headline: str) -> list[float] | None:
    """Of one experiment: Wilson's for a share of right answers, t for a mean of scores from 0 to 1."""
    if headline == "predict_accuracy":
        return one.wilson()
    ends = one.interval()
    return ends and [max(0.0, ends[0]), min(1.0, ends[1])]


def _difference(first: np.ndarray, second: np.ndarray, asked: np.ndarray) -> dict:
    """first, second: (runs, clusters), questions answered right, or sums of scores. asked: (clusters,)."""
    estimate = Estimate.of([first, second], asked)
    whole_numbers = in_whole_numbers(len(second) * first.sum(axis=0) - len(first) * second.sum(axis=0))
    tested_by_flips = estimate.seed is None
    return {
        "difference": estimate.value,
        "difference_ci": estimate.interval(),
        "clusters_that_differ": int(np.count_nonzero(whole_numbers)),
        "smallest_possible_p": smallest_p_value(whole_numbers) if tested_by_flips else 0.0,
        "p": sign_flip_p_value(whole_numbers) if tested_by_flips else estimate.p_value(),
    }


def _plan(estimate: Estimate, runs: int, wanted: float, alpha: float) -> dict | None:
    """How many images each number of seeds needs to find a difference `wanted`. With one run each the spread from seed
    to seed is not known, and three are assumed."""
    if estimate.clusters < 2:
        return None
    spreads = (None,) if estimate.seed is not None else ASSUMED_SPREADS
    rows = []
    for spread in spreads:
        plan = Plan.of(estimate, runs, spread, alpha)
        for count in PLANNED_RUNS:
            rows.append(
                {
                    "spread": float(np.sqrt(plan.seeds / 2)),
                    "runs": count,
                    "images": plan.images(wanted, count),
                    "detectable_here": plan.detectable(estimate.clusters, count),
                }
            )
    return {"difference": wanted, "spread_is_assumed": estimate.seed is None, "rows": rows}


def _disagreement(first: np.ndarray, second: np.ndarray) -> dict:
    """first, second: (runs, samples) right or wrong, or scores. Of several runs, the one right more often, or of the
    greater mean, counts as right."""
    difference = first.mean(axis=0) - second.mean(axis=0)
    difference[np.abs(difference) < ROUNDING] = 0
    return {"only_first_right": int((difference > 0).sum()), "only_second_right": int((difference < 0).sum())}


def _shared_image_key(sample_id: str, runs: list[Results]):
    """The sample's image, from whichever run knows it: the question-only baseline may have seen none."""
    keys = [image_key(run.rows[sample_id]) for run in runs]
    return next((key for key in keys if key != runs[0].rows[sample_id]["id"]), sample_id)


def _parts(task, rows: list[dict]) -> list[tuple[str, str, np.ndarray]]:
    """(kind, name, members (samples,) bool) of the whole test set, then of its parts, such as stages and questions."""
    found = [("all", "all", np.ones(len(rows), dtype=bool))]
    parts_of = [task.parts(row) for row in rows]
    for kind in dict.fromkeys(kind for parts in parts_of for kind in parts):  # a row may state what another does not
        of_row = np.array([parts.get(kind) for parts in parts_of], dtype=object)
        names = sorted({name for name in of_row if name is not None}, key=str)
        if 1 < len(names) <= MOST_QUESTIONS:
            found += [(kind, str(name), of_row == name) for name in names]
    return found


def _scores(experiment: Experiment, ids: list[str], keys: list) -> dict:
    """The scores of an experiment; of several runs their means, without the intervals of a single one."""
    of_runs = []
    for run in experiment.runs:
        rows = [{**run.rows[i], "group": key} for i, key in zip(ids, keys, strict=True)]
        try:
            of_runs.append(TASKS[run.task].compared_scores(rows))
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"{run.folder}: rows that cannot be scored ({type(error).__name__}: {error}); run evaluate.py again"
            ) from None
    scores = of_runs[0]
    _refuse_two_kinds_of_answers(of_runs, [run.folder for run in experiment.runs])
    if len(of_runs) > 1:
        numbers = [key for key in scores if all(isinstance(one.get(key), int | float) for one in of_runs)]
        means = {key: np.mean([one[key] for one in of_runs]) for key in numbers}
        scores = {key: round(mean) if isinstance(scores[key], int) else float(mean) for key, mean in means.items()}
    return {
        "name": experiment.name,
        "folder": ",".join(run.folder for run in experiment.runs),
        "baseline": "question only" if experiment.without_images else None,
        "made_elsewhere": experiment.made_elsewhere,
        "runs": [
            {"folder": run.folder, "seed": run.seed, "accuracy": one["predict_accuracy"]}
            | ({"token_f1": one["predict_token_f1"]} if "predict_token_f1" in one else {})
            for run, one in zip(experiment.runs, of_runs, strict=True)
        ],
        **{name: value for name, value in scores.items() if not name.startswith("majority_")},
    }


def _refuse_two_kinds_of_answers(scores: list[dict], folders: list[str]) -> None:
    sentences = ["free_form" in one for one in scores]
    if len(set(sentences)) > 1:
        as_sentences, as_words = (folders[sentences.index(kind)] for kind in (True, False))
        raise UserError(
            f"the answers of {as_sentences} are scored as sentences, those of {as_words} as words; "
            "run evaluate.py again with the same test file and the same --answers for both"
        )


def _majority_baselines(experiments: list[Experiment]) -> list[dict]:
    """One row, or one per distinct value where the experiments were trained on different data."""
    distinct = {}
    for experiment in experiments:
        run = experiment.runs[0]
        if run.majority_accuracy is not None:
            distinct.setdefault(round(run.majority_accuracy, 6), []).append((experiment, run))
    return [
        {
            "name": "majority answer" + (f" ({', '.join(e.name for e, _ in group)})" if len(distinct) > 1 else ""),
            "baseline": "no model",
            "predict_accuracy": group[0][1].majority_accuracy,
            "predict_accuracy_ci": group[0][1].majority_accuracy_ci,
            "unseen": group[0][1].majority_unseen,
        }
        for group in distinct.values()
    ]
