"""Results of one test set -> differences, intervals and p-values: pure functions, the content of compare.json."""

from itertools import combinations

import numpy as np

from errors import UserError
from report.metrics import image_key
from report.resampling import bootstrap, cluster_numbers, holm, sign_flip_p_value, smallest_p_value
from report.results import Results
from report.words import notes, sentence
from tasks import TASKS

MOST_QUESTIONS = 60  # distinct questions that still make a table; free-form sets have a new question in every sample


def compare(results: list[Results]) -> dict:
    """Results of one test set (check_same_test) -> the report, the content of compare.json.

    Intervals: percentile bootstrap over images (samples for cls). p-values: exact sign flip of whole images, adjusted
    by Holm's method over all pairs for the whole test set, and over all pairs and all parts of one kind for the parts
    (stages, questions, target sizes).
    """
    ids = list(results[0].rows)
    task = TASKS[results[0].task]
    keys = ids if task.CLUSTER == task.UNIT else [_shared_image_key(sample_id, results) for sample_id in ids]
    experiments = [_experiment(result, ids, keys) for result in results]  # first: it refuses rows of the wrong shape
    clusters = cluster_numbers(keys)
    cluster_count = int(clusters.max()) + 1
    right = np.array([[task.correct(result.rows[i]) for i in ids] for result in results])  # (experiments, samples)
    parts = _parts(task, [results[0].rows[i] for i in ids])
    asked = np.array([np.bincount(clusters[part], minlength=cluster_count) for _, _, part in parts])
    # how many of each image's questions each experiment answered right: (experiments, parts, clusters)
    hits = np.array([[np.bincount(clusters[part & r], minlength=cluster_count) for *_, part in parts] for r in right])
    pairs = list(combinations(range(len(results)), 2))
    for result, accuracy in zip(results, right.mean(axis=1), strict=True):
        if result.stated_accuracy is not None and abs(result.stated_accuracy - accuracy) > 0.5 / len(ids):
            raise UserError(
                f"{result.folder}: the score file says {result.stated_accuracy:.4f}, its predictions give "
                f"{accuracy:.4f}; they are of different runs: run evaluate.py again"
            )

    def statistic(weights: np.ndarray) -> np.ndarray:  # weights (resamples, clusters)
        count = (weights @ asked.T)[:, None]  # (resamples, 1, parts)
        total = (weights @ hits.reshape(-1, cluster_count).T).reshape(len(weights), len(results), len(parts))
        accuracy = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
        differences = np.stack([accuracy[:, a] - accuracy[:, b] for a, b in pairs], axis=1)
        return np.concatenate([accuracy, differences], axis=1).reshape(len(weights), -1)

    values, intervals = bootstrap(statistic, np.arange(cluster_count))
    values = values.reshape(-1, len(parts))  # experiments, then pairs
    intervals = intervals.reshape(-1, len(parts), 2)
    measured = []
    for number, (kind, name, part) in enumerate(parts):
        ends = [None if np.isnan(ci).any() else [float(end) for end in ci] for ci in intervals[:, number]]
        part_pairs = []
        for index, (a, b) in enumerate(pairs, start=len(results)):
            differences = hits[a, number] - hits[b, number]
            part_pairs.append(
                {
                    "first": results[a].name,
                    "second": results[b].name,
                    "difference": float(values[index, number]),
                    "difference_ci": ends[index],
                    "only_first_right": int((right[a] & ~right[b] & part).sum()),
                    "only_second_right": int((right[b] & ~right[a] & part).sum()),
                    "clusters_that_differ": int(np.count_nonzero(differences)),
                    "smallest_possible_p": smallest_p_value(differences),
                    "p": sign_flip_p_value(differences),
                }
            )
        accuracies = [
            {"experiment": result.name, "accuracy": float(value), "accuracy_ci": end}
            for result, value, end in zip(results, values[:, number], ends, strict=False)
        ]
        measured.append(
            {"kind": kind, "name": name, "samples": int(part.sum()), "accuracies": accuracies, "pairs": part_pairs}
        )
    for kind in {part["kind"] for part in measured}:
        family = [pair for part in measured if part["kind"] == kind for pair in part["pairs"]]
        for pair, adjusted in zip(family, holm([pair["p"] for pair in family]), strict=True):
            pair["p_holm"], pair["family_size"] = adjusted, len(family)
    accuracy = {result.name: float(value) for result, value in zip(results, values[:, 0], strict=False)}
    for pair in measured[0]["pairs"]:
        pair["sentence"] = sentence(pair, accuracy, task.UNIT, task.CLUSTER)
    return {
        "task": results[0].task,
        "samples": len(ids),
        "clusters": cluster_count,
        "experiments": experiments,
        "majority_baselines": _majority_baselines(results),
        "pairs": measured[0]["pairs"],
        "parts": measured[1:],
        "notes": notes(results[0].task),
    }


def _shared_image_key(sample_id: str, results: list[Results]):
    """The sample's image, from whichever experiment knows it: the question-only baseline may have seen none."""
    keys = [image_key(result.rows[sample_id]) for result in results]
    return next((key for key in keys if key != results[0].rows[sample_id]["id"]), sample_id)


def _parts(task, rows: list[dict]) -> list[tuple[str, str, np.ndarray]]:
    """(kind, name, members (samples,) bool) of the whole test set, then of its parts, such as stages and questions."""
    found = [("all", "all", np.ones(len(rows), dtype=bool))]
    parts_of = [task.parts(row) for row in rows]
    for kind in parts_of[0]:
        of_row = np.array([parts[kind] for parts in parts_of], dtype=object)
        names = sorted({name for name in of_row if name is not None}, key=str)
        if 1 < len(names) <= MOST_QUESTIONS:
            found += [(kind, str(name), of_row == name) for name in names]
    return found


def _experiment(result: Results, ids: list[str], keys: list) -> dict:
    rows = [{**result.rows[i], "group": key} for i, key in zip(ids, keys, strict=True)]
    try:
        scores = TASKS[result.task].compared_scores(rows)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{result.folder}: rows that cannot be scored ({type(error).__name__}: {error}); run evaluate.py again"
        ) from None
    return {
        "name": result.name,
        "folder": result.folder,
        "baseline": "question only" if result.without_images else None,
        **{name: value for name, value in scores.items() if not name.startswith("majority_")},
    }


def _majority_baselines(results: list[Results]) -> list[dict]:
    """One row, or one per distinct value where the experiments were trained on different data."""
    distinct = {}
    for result in results:
        if result.majority_accuracy is not None:
            distinct.setdefault(round(result.majority_accuracy, 6), []).append(result)
    return [
        {
            "name": "majority answer" + (f" ({', '.join(r.name for r in group)})" if len(distinct) > 1 else ""),
            "baseline": "no model",
            "predict_accuracy": group[0].majority_accuracy,
            "predict_accuracy_ci": group[0].majority_accuracy_ci,
        }
        for group in distinct.values()
    ]
