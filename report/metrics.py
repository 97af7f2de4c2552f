"""Scores of answers, classifications and clicks: pure functions, rows in, a JSON-ready dict out.

Every score NAME comes with NAME_ci, its 95 % interval: of an accuracy Wilson's on the effective sample size
(variance.py), of anything else by bootstrap (resampling.py). A score that is undefined, as an F1 without multi-label
questions, is None, and so is an end of an interval that is open, so that the files hold null and never NaN, which is
not JSON.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import lru_cache
from math import hypot

import numpy as np

from report.resampling import bootstrap, cluster_numbers
from report.variance import accuracy_interval, influence_interval
from templates import image_paths

CALIBRATION_BINS = 15

# Half of the smallest recommended touch target (48 dp, Android's accessibility guide) on a phone screen of
# 360x640 dp: 24 / 734 of the diagonal. On such a screen a hit is a touch that the target would have felt.
CLICK_RADIUS = 0.03
# Shares of the image's area. On 1920x1080: below 64x64 pixels is small, from 204x204 on is large.
SMALL_BELOW, LARGE_FROM = 0.002, 0.02


# --- shared -----------------------------------------------------------------------------------------------------------


def image_key(row: dict) -> Hashable:
    """What ties samples together: the row's group, else its first image, else (text only) its own id."""
    return row.get("group") or next(iter(image_paths(row)), row["id"])


def _weighted_means(columns: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """columns (samples, scores), NaN where a sample has no part in a score -> statistic for bootstrap: their means."""
    present = ~np.isnan(columns)
    values, counts = np.where(present, columns, 0.0), present.astype(float)

    def statistic(weights: np.ndarray) -> np.ndarray:
        return _ratio(weights @ values, weights @ counts)

    return statistic


def _ratio(numerator: np.ndarray, denominator: np.ndarray, undefined: float = np.nan) -> np.ndarray:
    out = np.full(np.broadcast(numerator, denominator).shape, undefined)
    return np.divide(numerator, denominator, out=out, where=denominator > 0)


def _with_intervals(names: Sequence[str], values: np.ndarray, intervals: np.ndarray) -> dict:
    scores = {}
    for name, value, interval in zip(names, values, intervals, strict=True):
        known = np.isfinite(value)
        scores[name] = float(value) if known else None
        ends = [float(end) if np.isfinite(end) else None for end in interval]
        scores[f"{name}_ci"] = ends if known and not np.isnan(interval).any() else None
    return scores


def _accuracies(columns: dict[str, np.ndarray], clusters: np.ndarray) -> dict:
    """NAME and NAME_ci of accuracies. columns: name -> (samples,) of 0 and 1, NaN where a sample has no part in it."""
    scores = {}
    for name, correct in columns.items():
        known = not np.isnan(correct).all()
        scores[name] = float(np.nanmean(correct)) if known else None
        scores[f"{name}_ci"] = accuracy_interval(correct, clusters) if known else None
    return scores


# --- vqa --------------------------------------------------------------------------------------------------------------


def answer_items(text: str) -> frozenset[str]:
    """The set of items of an answer: "Polyp;  large  ulcer" -> {"polyp", "large ulcer"}.

    Items are separated by semicolons; case and white space are folded, order, repeats and empty items ignored.
    """
    folded = (" ".join(item.split()).casefold() for item in str(text).split(";"))
    return frozenset(item for item in folded if item)


def answer_correct(row: dict) -> bool:
    """Exact match as a set of items: every gold item is there and no other."""
    return answer_items(row["prediction"]) == answer_items(row["answer"])


def answer_outside_candidates(row: dict, key: str = "prediction") -> bool:
    """Whether the answer under `key` holds an item that is not in the row's candidate list; False without a list."""
    candidates = _items_of_all(tuple(map(str, row.get("candidates") or ())))
    return bool(candidates) and not answer_items(row[key]) <= candidates


@lru_cache(maxsize=256)  # a question's list comes again with each of its samples
def _items_of_all(candidates: tuple[str, ...]) -> frozenset[str]:
    return frozenset(item for candidate in candidates for item in answer_items(candidate))


def majority_answers(train_samples: Iterable[dict]) -> dict[str, str]:
    """Question -> its most frequent training answer (as a set of items; the earliest in the file among equals).

    Samples without question and answer, such as whole conversations, are passed over.
    """
    counts: dict[str, Counter] = defaultdict(Counter)
    spelling: dict[frozenset[str], str] = {}
    for sample in train_samples:
        if "question" in sample and "answer" in sample:
            items = answer_items(sample["answer"])
            counts[sample["question"]][items] += 1
            spelling.setdefault(items, sample["answer"])
    return {question: spelling[count.most_common(1)[0][0]] for question, count in counts.items()}


def score_vqa(rows: Sequence[dict], train_majority: dict[str, str]) -> dict:
    """Scores of generated answers. Intervals over images (image_key).

    rows: at least id, question, answer, prediction; stage, multi_label, candidates, group and images where known.
    predict_accuracy: mean over samples of exact match as a set of items.
    predict_accuracy_macro: mean over distinct questions of the accuracy on that question, rare questions counting as
        much as frequent ones.
    predict_accuracy_stageN: accuracy over the samples of stage N, for each stage that occurs.
    predict_f1, predict_jaccard: mean over the samples of multi-label questions of 2|P∩G|/(|P|+|G|) and |P∩G|/|P∪G|,
        P and G the predicted and the gold items; None where no question is multi-label.
    majority_accuracy: the accuracy of always giving train_majority's answer (majority_answers); a question that it
        lacks counts as wrong; None when train_majority is empty.
    majority_unseen: how many samples ask a question that train_majority lacks; None when it is empty.
    outside_candidates: how many answers hold an item outside their candidate list; None when no row has a list.
    predict_samples, predict_by_question {question: {accuracy, samples}}.
    """
    if not rows:
        raise ValueError("no rows to score")
    gold = [answer_items(row["answer"]) for row in rows]
    predicted = [answer_items(row["prediction"]) for row in rows]
    correct = np.array([p == g for p, g in zip(predicted, gold, strict=True)], dtype=float)
    multi_label = np.array([bool(row.get("multi_label")) for row in rows])
    shared = np.array([len(p & g) for p, g in zip(predicted, gold, strict=True)])
    sizes = np.array([len(p) + len(g) for p, g in zip(predicted, gold, strict=True)])

    columns = {"predict_accuracy": correct}
    overlaps = {
        "predict_f1": np.where(multi_label, _ratio(2 * shared, sizes, undefined=1.0), np.nan),
        "predict_jaccard": np.where(multi_label, _ratio(shared, sizes - shared, undefined=1.0), np.nan),
    }
    stages = np.array([str(row.get("stage")) for row in rows])
    for stage in sorted({str(row["stage"]) for row in rows if row.get("stage") is not None}):
        columns[f"predict_accuracy_stage{stage}"] = np.where(stages == stage, correct, np.nan)
    majority = {question: answer_items(answer) for question, answer in train_majority.items()}
    baseline = np.array([majority.get(row["question"]) == g for row, g in zip(rows, gold, strict=True)], dtype=float)
    columns["majority_accuracy"] = baseline if majority else np.full(len(rows), np.nan)

    clusters = cluster_numbers([image_key(row) for row in rows])
    values, intervals = bootstrap(_weighted_means(np.stack(list(overlaps.values()), axis=1)), clusters)
    scores = _accuracies(columns, clusters) | _with_intervals(list(overlaps), values, intervals)
    questions = cluster_numbers([row["question"] for row in rows])
    asked = np.bincount(questions)
    of_question = np.bincount(questions, correct) / asked
    macro = float(of_question.mean())
    influences = (correct - of_question[questions]) / (asked[questions] * len(asked))
    scores["predict_accuracy_macro"] = macro
    scores["predict_accuracy_macro_ci"] = influence_interval(macro, np.bincount(clusters, influences), len(rows))
    has_candidates = any(row.get("candidates") for row in rows)
    unseen = sum(row["question"] not in majority for row in rows)
    scores["majority_unseen"] = unseen if majority else None
    scores["outside_candidates"] = sum(map(answer_outside_candidates, rows)) if has_candidates else None
    scores["predict_samples"] = len(rows)
    by_question = defaultdict(list)
    for row, right in zip(rows, correct, strict=True):
        by_question[row["question"]].append(right)
    scores["predict_by_question"] = {
        question: {"accuracy": float(np.mean(rights)), "samples": len(rights)}
        for question, rights in by_question.items()
    }
    return scores


# --- cls --------------------------------------------------------------------------------------------------------------


def score_cls(rows: Sequence[dict]) -> dict:
    """Scores of a classifier. Intervals over samples.

    rows: probabilities (num_labels floats that sum to 1), predicted_label and true_label (ints).
    predict_accuracy: mean over samples.
    predict_f1, predict_precision, predict_recall: of label 1 with two labels; the plain mean over the labels that
        occur (as truth or prediction) with more. 0 where the denominator is 0. (scikit-learn, zero_division=0)
    predict_auroc: two labels only; P(score of a positive > score of a negative) + half of the ties, the score being
        probabilities[1]; None where only one label occurs and with more than two labels.
    predict_brier: mean of (probabilities[1] - true_label)^2 with two labels; with more, of the sum over labels.
    predict_ece: expected calibration error, sum over 15 bins of equal width, (low, high], of share of samples *
        |accuracy - mean confidence|, the confidence being the largest probability (Guo et al. 2017, arXiv 1706.04599).
    predict_samples: number of samples.
    """
    if not rows:
        raise ValueError("no rows to score")
    probabilities = np.array([row["probabilities"] for row in rows], dtype=float)  # (samples, num_labels)
    truth = np.array([row["true_label"] for row in rows], dtype=np.int64)
    predicted = np.array([row["predicted_label"] for row in rows], dtype=np.int64)
    label_count = probabilities.shape[1]
    for name, labels in (("true_label", truth), ("predicted_label", predicted)):
        if labels.min() < 0 or labels.max() >= label_count:
            raise ValueError(f"{name} outside 0 ... {label_count - 1}, the labels that probabilities has")
    if not np.isfinite(probabilities).all() or np.abs(probabilities.sum(axis=1) - 1).max() > 1e-3:
        raise ValueError("probabilities are not finite or do not sum to 1")

    correct = (truth == predicted).astype(float)
    one_hot = np.eye(label_count)[truth]
    squares = (probabilities - one_hot) ** 2
    brier = squares[:, 1] if label_count == 2 else squares.sum(axis=1)
    mean_brier = _weighted_means(brier[:, None])
    confidence = probabilities.max(axis=1)
    in_bin = np.eye(CALIBRATION_BINS)[calibration_bins(confidence)]  # (samples, bins)
    hits, guesses = one_hot * correct[:, None], np.eye(label_count)[predicted]

    def statistic(weights: np.ndarray) -> np.ndarray:
        hit, guessed, true = weights @ hits, weights @ guesses, weights @ one_hot  # (resamples, num_labels)
        per_label = np.stack(
            [_ratio(2 * hit, guessed + true, 0.0), _ratio(hit, guessed, 0.0), _ratio(hit, true, 0.0)]
        )  # (3, resamples, num_labels)
        f1, precision, recall = per_label[:, :, 1] if label_count == 2 else _mean_present(per_label, guessed + true > 0)
        auroc = _auroc(weights, probabilities[:, 1], truth) if label_count == 2 else np.full(len(weights), np.nan)
        gaps = np.abs((weights * (correct - confidence)) @ in_bin).sum(axis=1) / weights.sum(axis=1)
        return np.stack([f1, precision, recall, auroc, mean_brier(weights)[:, 0], gaps], axis=1)

    names = [f"predict_{name}" for name in ("f1", "precision", "recall", "auroc", "brier", "ece")]
    values, intervals = bootstrap(statistic, np.arange(len(rows)))
    accuracy = _accuracies({"predict_accuracy": correct}, np.arange(len(rows)))
    return {**accuracy, **_with_intervals(names, values, intervals), "predict_samples": len(rows)}


def calibration_bins(confidence: np.ndarray) -> np.ndarray:
    """Confidences in [0, 1] -> the number of the bin (low, high] that holds each; 0 falls into the first."""
    return np.searchsorted(np.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1], confidence, side="left")


def _mean_present(per_label: np.ndarray, present: np.ndarray) -> np.ndarray:
    return (per_label * present).sum(axis=2) / present.sum(axis=1)


def _auroc(weights: np.ndarray, scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """weights (resamples, samples) -> (resamples,): Mann-Whitney U over its maximum; NaN where a label is missing."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))  # one segment per distinct score
    weights, positive = weights[:, order], truth[order] == 1
    positives = np.add.reduceat(weights * positive, starts, axis=1)
    negatives = np.add.reduceat(weights * ~positive, starts, axis=1)
    negatives_below = np.cumsum(negatives, axis=1) - negatives
    wins = (positives * (negatives_below + negatives / 2)).sum(axis=1)
    return _ratio(wins, positives.sum(axis=1) * negatives.sum(axis=1))


# --- click ------------------------------------------------------------------------------------------------------------


def click_distance(row: dict) -> float | None:
    """Pixels between the gold and the predicted point; None where the answer could not be parsed."""
    if row["predicted_point"] is None:
        return None
    return hypot(row["predicted_point"][0] - row["point"][0], row["predicted_point"][1] - row["point"][1])


def click_correct(row: dict) -> bool:
    """Inside the box (its edges included) where a box is known, else within CLICK_RADIUS of the diagonal."""
    if row["predicted_point"] is None:
        return False
    if row.get("bbox") is not None:
        (x, y), (left, top, right, bottom) = row["predicted_point"], row["bbox"]
        return left <= x <= right and top <= y <= bottom
    return click_distance(row) <= CLICK_RADIUS * hypot(*row["image_size"])


def target_size(row: dict) -> str | None:
    """small, medium or large, by the box's share of the image's area; None without a box."""
    if row.get("bbox") is None:
        return None
    left, top, right, bottom = row["bbox"]
    share = (right - left) * (bottom - top) / (row["image_size"][0] * row["image_size"][1])
    return "small" if share < SMALL_BELOW else "large" if share >= LARGE_FROM else "medium"


# Facts about a target that benchmarks report apart (ScreenSpot: icon or text; mobile, desktop or web; Pro's fields).
CLICK_GROUPS = ("data_type", "platform", "category")


def click_groups(row: dict) -> dict[str, str]:
    """Group -> its value, of those that the row states; platform and data_type also together, as they are published."""
    stated = {kind: str(row[kind]) for kind in CLICK_GROUPS if row.get(kind) is not None}
    if "platform" in stated and "data_type" in stated:
        stated["platform and data_type"] = f"{stated['platform']} {stated['data_type']}"
    return stated


def _group_columns(rows: Sequence[dict], correct: np.ndarray) -> dict[str, np.ndarray]:
    """predict_accuracy_KIND_VALUE -> correct in the group, NaN outside; of kinds with several values."""
    stated, columns = [click_groups(row) for row in rows], {}
    for kind in dict.fromkeys(kind for groups in stated for kind in groups):
        values = np.array([str(groups.get(kind)) for groups in stated])
        if len(set(values)) > 1:
            for value in sorted({groups[kind] for groups in stated if kind in groups}):
                name = f"predict_accuracy_{kind}_{value}".replace("platform and data_type_", "").replace(" ", "_")
                columns[name] = np.where(values == value, correct, np.nan)
    return columns


def score_click(rows: Sequence[dict]) -> dict:
    """Scores of predicted points. Intervals over images (image_key).

    rows: point, predicted_point ([x, y] or None when unparsable), bbox ([x0, y0, x1, y1] or absent), all in pixels of
        the original image, and image_size [width, height] of that image.
    predict_accuracy: mean of click_correct: inside the box where one is known, else within click_radius_share of the
        diagonal. An unparsable answer is wrong.
    predict_accuracy_small, _medium, _large: the same over the targets whose box has less than small_below_area_share,
        at least large_from_area_share of the image's area, or lies between; None where there is none.
    predict_accuracy_data_type_icon, _platform_web, _web_icon ...: the same over the groups that the rows state.
    predict_median_distance_pixels, _share: median distance to the gold point, in pixels and as a share of the
        diagonal; an unparsable answer counts as farther away than any other, so that silence cannot improve the
        median; None when half of the answers or more are unparsable.
    unparsable, boxes_known, predict_samples: counts.
    """
    if not rows:
        raise ValueError("no rows to score")
    correct = np.array([click_correct(row) for row in rows], dtype=float)
    sizes = np.array([str(target_size(row)) for row in rows])
    columns = {"predict_accuracy": correct}
    for size in ("small", "medium", "large"):
        columns[f"predict_accuracy_{size}"] = np.where(sizes == size, correct, np.nan)
    columns |= _group_columns(rows, correct)
    distances = [click_distance(row) for row in rows]
    pixels = np.array([np.inf if distance is None else distance for distance in distances])
    shares = pixels / np.array([hypot(*row["image_size"]) for row in rows])

    def statistic(weights: np.ndarray) -> np.ndarray:
        return np.column_stack([_weighted_median(weights, pixels), _weighted_median(weights, shares)])

    clusters = cluster_numbers([image_key(row) for row in rows])
    values, intervals = bootstrap(statistic, clusters)
    names = ["predict_median_distance_pixels", "predict_median_distance_share"]
    return {
        **_accuracies(columns, clusters),
        **_with_intervals(names, values, intervals),
        "predict_samples": len(rows),
        "unparsable": distances.count(None),
        "boxes_known": sum(row.get("bbox") is not None for row in rows),
        "click_radius_share": CLICK_RADIUS,
        "small_below_area_share": SMALL_BELOW,
        "large_from_area_share": LARGE_FROM,
    }


def _weighted_median(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """weights (resamples, samples), whole numbers of copies -> (resamples,) medians."""
    order = np.argsort(values)
    reached = np.cumsum(weights[:, order], axis=1)
    count = reached[:, -1:]
    lower, upper = (values[order][(reached > np.floor(rank)).argmax(axis=1)] for rank in ((count - 1) / 2, count / 2))
    return (lower + upper) / 2
