"""Scores against scikit-learn, the bare definitions, and explicit resampling."""

import functools
import json
import math
import warnings

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from report import metrics
from report.metrics import answer_items, answer_outside_candidates, majority_answers, score_click, score_cls, score_vqa
from report.resampling import SEED, bootstrap
from report.variance import Estimate

RESAMPLES = 150


@pytest.fixture
def few_resamples(monkeypatch):
    monkeypatch.setattr(metrics, "bootstrap", functools.partial(bootstrap, resamples=RESAMPLES))


def explicit_resamples(rows, keys):
    """The draws of resampling.bootstrap, carried out by repeating rows."""
    groups = list(dict.fromkeys(keys))
    members = {group: [row for row, key in zip(rows, keys, strict=True) if key == group] for group in groups}
    drawn = np.random.default_rng(SEED).integers(0, len(groups), (RESAMPLES, len(groups)))
    return [[row for number in numbers for row in members[groups[number]]] for numbers in drawn]


def interval_of(values):
    return np.quantile([value for value in values if value is not None], [0.025, 0.975])


# --- vqa --------------------------------------------------------------------------------------------------------------


def vqa_rows(images=30, seed=0):
    generator = np.random.default_rng(seed)
    rows = []
    for image in range(images):
        for question in range(generator.integers(1, 7)):
            items = generator.permutation(["polyp", "ulcer", "z-line"])[: generator.integers(1, 4)]
            guess = items if generator.random() < 0.5 else generator.permutation(["Polyp", "none", "ulcer"])[:2]
            rows.append(
                {
                    "id": f"{image}-{question}",
                    "images": [f"{image}.jpg"],
                    "group": f"g{image // 2}",
                    "question": f"question {question}?",
                    "answer": "; ".join(items),
                    "prediction": ";".join(guess),
                    "stage": question % 3 + 1,
                    "multi_label": question % 2 == 0,
                    "candidates": ["polyp", "ulcer", "z-line"],
                }
            )
    return rows


def test_answers_are_sets_of_items_with_case_and_spaces_folded():
    assert answer_items(" Polyp;  large\n ulcer ;;polyp") == {"polyp", "large ulcer"}
    assert answer_items("a; b") == answer_items("B;A") and answer_items("a b") != answer_items("ab")
    assert answer_items(" ; ") == answer_items("") == frozenset()
    assert answer_items(3) == {"3"}  # a JSON number as an answer


def test_every_vqa_score_equals_its_definition():
    rows = vqa_rows()
    majority = {"question 0?": "polyp", "question 1?": "ULCER"}
    scores = score_vqa(rows, majority)
    correct = [answer_items(r["prediction"]) == answer_items(r["answer"]) for r in rows]
    assert scores["predict_accuracy"] == pytest.approx(np.mean(correct))
    by_question = {}
    for row, right in zip(rows, correct, strict=True):
        by_question.setdefault(row["question"], []).append(right)
    assert scores["predict_accuracy_macro"] == pytest.approx(np.mean([np.mean(v) for v in by_question.values()]))
    assert scores["predict_by_question"] == {
        question: {"accuracy": pytest.approx(np.mean(rights)), "samples": len(rights)}
        for question, rights in by_question.items()
    }
    for stage in (1, 2, 3):
        of_stage = [right for row, right in zip(rows, correct, strict=True) if row["stage"] == stage]
        assert scores[f"predict_accuracy_stage{stage}"] == pytest.approx(np.mean(of_stage))
    items = sorted({item for r in rows for key in ("answer", "prediction") for item in answer_items(r[key])})
    multi = [row for row in rows if row["multi_label"]]
    gold, predicted = (
        np.array([[item in answer_items(row[key]) for item in items] for row in multi])
        for key in ("answer", "prediction")
    )
    assert scores["predict_f1"] == pytest.approx(sklearn_metrics.f1_score(gold, predicted, average="samples"))
    assert scores["predict_jaccard"] == pytest.approx(sklearn_metrics.jaccard_score(gold, predicted, average="samples"))
    right = [
        r["question"] in majority and answer_items(majority[r["question"]]) == answer_items(r["answer"]) for r in rows
    ]
    assert scores["majority_accuracy"] == pytest.approx(np.mean(right))
    assert scores["outside_candidates"] == sum("none" in r["prediction"] for r in rows)
    assert scores["predict_samples"] == len(rows)


def test_vqa_intervals_are_quantiles_of_the_scores_of_resampled_images(few_resamples):
    rows, majority = vqa_rows(images=9), {"question 0?": "polyp"}
    scores = score_vqa(rows, majority)
    resampled = [score_vqa(drawn, majority) for drawn in explicit_resamples(rows, [row["group"] for row in rows])]
    for name in ("predict_f1", "predict_jaccard"):
        assert scores[f"{name}_ci"] == pytest.approx(interval_of([one[name] for one in resampled])), name


def test_every_accuracy_has_wilsons_interval_over_images():
    rows = vqa_rows(images=40)
    scores = score_vqa(rows, {"question 0?": "polyp"})
    right = {}
    for row in rows:
        if row["stage"] == 2:
            right.setdefault(row["group"], []).append(metrics.answer_correct(row))
    asked = np.array([len(of_image) for of_image in right.values()])
    estimate = Estimate.of([np.array([[sum(of_image) for of_image in right.values()]])], asked)
    assert scores["predict_accuracy_stage2_ci"] == estimate.wilson()
    assert estimate.samples == sum(row["stage"] == 2 for row in rows) and estimate.clusters == len(right) <= 20
    macro, (low, high) = scores["predict_accuracy_macro"], scores["predict_accuracy_macro_ci"]
    once = [{**row, "question": "one"} for row in rows]  # of one question the mean over questions is the accuracy
    same = score_vqa(once, {})
    assert low < macro < high and same["predict_accuracy_macro_ci"] == pytest.approx(same["predict_accuracy_ci"])


@pytest.mark.parametrize("said", ["yes", "no"])
def test_all_right_or_all_wrong_has_an_interval_that_is_not_of_width_zero(said):
    rows = [
        {"id": f"{n}-{q}", "images": [f"{n}.jpg"], "question": f"q{q}", "answer": "yes", "prediction": said}
        for n in range(10)
        for q in range(9)
    ]
    scores = score_vqa(rows, {"q1": "yes"})
    for name in ("predict_accuracy", "predict_accuracy_macro"):
        low, high = scores[f"{name}_ci"]
        assert 0.2 < high - low < 0.4, "as of about ten independent samples"
        assert low <= scores[name] <= high


def test_samples_without_stage_candidates_or_multi_label_are_scored():
    rows = [
        {
            "id": str(n),
            "images": [f"{n}.jpg"],
            "question": f"q{n}",
            "answer": "yes",
            "prediction": "Yes" if n % 2 else "no",
        }
        for n in range(10)
    ]
    scores = score_vqa(rows, {})
    assert scores["predict_accuracy"] == scores["predict_accuracy_macro"] == 0.5
    assert scores["predict_f1"] is None and scores["predict_f1_ci"] is None
    assert scores["majority_accuracy"] is None and scores["outside_candidates"] is None
    assert not any("stage" in name for name in scores)
    json.dumps(scores, allow_nan=False)


def test_an_answer_is_outside_when_any_item_is_not_a_candidate():
    row = {"candidates": ["Polyp", "ulcer"], "prediction": "POLYP; ulcer"}
    assert not answer_outside_candidates(row)
    assert answer_outside_candidates({**row, "prediction": "polyp; scar"})
    assert not answer_outside_candidates({"prediction": "anything"})


def test_majority_answer_counts_spellings_of_one_answer_together():
    answers = ["no", "a; b", "B;a", "yes", "b; a"]
    train = [{"question": "q", "answer": answer} for answer in answers] + [{"messages": []}]
    assert majority_answers(train) == {"q": "a; b"}
    assert majority_answers([{"question": "q", "answer": "x"}, {"question": "q", "answer": "w"}]) == {"q": "x"}


def test_image_key_is_the_group_then_the_first_image_then_the_sample():
    assert metrics.image_key({"id": "1", "images": ["a", "b"], "group": "g"}) == "g"
    assert metrics.image_key({"id": "1", "images": ["a", "b"]}) == metrics.image_key({"id": "2", "image": "a"}) == "a"
    assert metrics.image_key({"id": "1", "images": []}) == "1"


def test_no_rows_are_an_error_not_a_score():
    for score in (lambda: score_vqa([], {}), lambda: score_cls([]), lambda: score_click([])):
        with pytest.raises(ValueError, match="no rows"):
            score()


# --- cls --------------------------------------------------------------------------------------------------------------


def cls_rows(probabilities, truth):
    return [
        {"probabilities": list(map(float, p)), "predicted_label": int(np.argmax(p)), "true_label": int(t), "logits": []}
        for p, t in zip(probabilities, truth, strict=True)
    ]


def calibration_error(probabilities, predicted, truth, bins=15):
    error = 0.0
    for number in range(bins):
        low, high = np.linspace(0, 1, bins + 1)[number : number + 2]
        inside = [n for n, p in enumerate(probabilities) if low < max(p) <= high]
        if inside:
            accuracy = np.mean([predicted[n] == truth[n] for n in inside])
            error += len(inside) / len(truth) * abs(accuracy - np.mean([max(probabilities[n]) for n in inside]))
    return error


def sklearn_scores(rows):
    probabilities = np.array([row["probabilities"] for row in rows])
    truth, predicted = ([row[key] for row in rows] for key in ("true_label", "predicted_label"))
    labels = probabilities.shape[1]
    how = {"zero_division": 0, "average": "binary" if labels == 2 else "macro"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        auroc = (
            sklearn_metrics.roc_auc_score(truth, probabilities[:, 1]) if labels == 2 and len(set(truth)) == 2 else None
        )
        return {
            "predict_accuracy": sklearn_metrics.accuracy_score(truth, predicted),
            "predict_f1": sklearn_metrics.f1_score(truth, predicted, **how),
            "predict_precision": sklearn_metrics.precision_score(truth, predicted, **how),
            "predict_recall": sklearn_metrics.recall_score(truth, predicted, **how),
            "predict_auroc": auroc,
            "predict_brier": sklearn_metrics.brier_score_loss(truth, probabilities[:, 1])
            if labels == 2
            else sklearn_metrics.brier_score_loss(truth, probabilities, labels=range(labels)),
            "predict_ece": calibration_error(probabilities, predicted, truth),
        }


def random_case(samples, labels, seed, decimals=16):
    generator = np.random.default_rng(seed)
    probabilities = generator.dirichlet([0.7] * labels, samples).round(decimals)
    if decimals < 16:
        probabilities[:, -1] = 1 - probabilities[:, :-1].sum(axis=1)
    truth = [generator.choice(labels, p=0.5 * p / p.sum() + 0.5 / labels) for p in probabilities]
    return cls_rows(probabilities, truth)


CASES = {
    "binary": random_case(200, 2, 0),
    "binary with many ties": random_case(200, 2, 1, decimals=1),
    "four labels": random_case(200, 4, 2),
    "some of nine labels absent": random_case(12, 9, 3),
    "one sample": random_case(1, 2, 4),
    "only label 0 true": cls_rows([[0.6, 0.4], [0.2, 0.8], [0.9, 0.1]], [0, 0, 0]),
    "only label 1 true": cls_rows([[0.6, 0.4], [0.2, 0.8], [0.9, 0.1]], [1, 1, 1]),
    "only label 1 predicted": cls_rows([[0.1, 0.9], [0.2, 0.8], [0.4, 0.6]], [0, 1, 0]),
    "label 1 neither true nor predicted": cls_rows([[0.9, 0.1], [0.8, 0.2]], [0, 0]),
    "all tied": cls_rows([[0.5, 0.5]] * 6, [0, 1, 0, 1, 1, 1]),
    "perfect and certain": cls_rows([[1, 0], [0, 1]] * 3, [0, 1] * 3),
    "always wrong and certain": cls_rows([[1, 0], [0, 1]] * 3, [1, 0] * 3),
}


@pytest.mark.parametrize("case", CASES)
def test_cls_scores_equal_scikit_learns(case):
    scores = score_cls(CASES[case])
    for name, expected in sklearn_scores(CASES[case]).items():
        assert scores[name] == (None if expected is None else pytest.approx(expected, abs=1e-12)), name
    json.dumps(scores, allow_nan=False)


@pytest.mark.parametrize("case", ["binary with many ties", "some of nine labels absent"])
def test_cls_intervals_are_quantiles_of_scikit_learns_scores_of_resampled_samples(case, few_resamples):
    rows = CASES[case]
    scores = score_cls(rows)
    resampled = [sklearn_scores(drawn) for drawn in explicit_resamples(rows, range(len(rows)))]
    for name in resampled[0]:
        if scores[name] is not None and name != "predict_accuracy":
            assert scores[f"{name}_ci"] == pytest.approx(interval_of([one[name] for one in resampled])), name


def test_a_confidence_on_an_edge_belongs_to_the_bin_below_it():
    edges = np.linspace(0, 1, 16)
    assert metrics.calibration_bins(edges).tolist() == [0, *range(15)]
    assert metrics.calibration_bins(edges[:-1] + 1e-9).tolist() == list(range(15))


def test_labels_and_probabilities_that_do_not_fit_are_refused():
    good = cls_rows([[0.6, 0.4], [0.2, 0.8]], [0, 1])
    for change, message in (
        ({"true_label": 2}, "true_label"),
        ({"predicted_label": -1}, "predicted_label"),
        ({"probabilities": [0.5, float("nan")]}, "probabilities"),
        ({"probabilities": [2.0, 3.0]}, "probabilities"),
    ):
        with pytest.raises(ValueError, match=message):
            score_cls([good[0], {**good[1], **change}])


# --- click ------------------------------------------------------------------------------------------------------------


def click_row(predicted, bbox=(100, 100, 200, 150), point=(150, 125), size=(1000, 500), **other):
    return {"id": "1", "point": point, "predicted_point": predicted, "bbox": bbox, "image_size": size, **other}


def test_a_click_is_right_inside_the_box_edges_included():
    for predicted, right in (((100, 150), True), ((200, 100), True), ((99.9, 120), False), ((150, 150.1), False)):
        assert metrics.click_correct(click_row(predicted)) is right
    assert metrics.click_correct(click_row(None)) is False


def test_without_a_box_a_click_is_right_within_the_stated_share_of_the_diagonal():
    radius = metrics.CLICK_RADIUS * math.hypot(1000, 500)
    assert metrics.click_correct(click_row((150 + radius - 0.01, 125), bbox=None))
    assert not metrics.click_correct(click_row((150, 125 + radius + 0.01), bbox=None))
    scores = score_click([click_row((150, 125), bbox=None), click_row((0, 0), bbox=None)])
    assert scores["click_radius_share"] == metrics.CLICK_RADIUS and scores["boxes_known"] == 0
    assert scores["predict_accuracy"] == 0.5 and scores["predict_accuracy_small"] is None


def test_target_size_is_the_boxs_share_of_the_area():
    for bbox, name in (((0, 0, 999, 1), "small"), ((0, 0, 100, 10), "medium"), ((0, 0, 100, 100), "large")):
        assert metrics.target_size(click_row((0, 0), bbox=bbox)) == name


def random_clicks():
    generator = np.random.default_rng(8)
    rows = []
    for number in range(60):
        width, height = generator.integers(200, 2000, 2)
        point = generator.random(2) * (width, height)
        half = generator.choice([0.01, 0.03, 0.1]) * width
        predicted = None if generator.random() < 0.2 else (point + generator.normal(0, half, 2)).tolist()
        box = None if number % 5 == 0 else (*(point - half), *(point + half))
        rows.append(click_row(predicted, bbox=box, point=point, size=(width, height), image=f"{number // 2}.png"))
    return rows


def test_click_scores_and_intervals_equal_their_definitions(few_resamples):
    rows = random_clicks()

    def definition(rows):
        off = [
            math.dist(r["predicted_point"], r["point"]) / math.hypot(*r["image_size"])
            if r["predicted_point"]
            else math.inf
            for r in rows
        ]
        hit = [metrics.click_correct(r) for r in rows]
        sizes = [metrics.target_size(r) for r in rows]
        out = {"predict_accuracy": np.mean(hit), "predict_median_distance_share": np.median(off)}
        for size in ("small", "medium", "large"):
            of_size = [h for h, s in zip(hit, sizes, strict=True) if s == size]
            out[f"predict_accuracy_{size}"] = np.mean(of_size) if of_size else None
        return out

    scores, expected = score_click(rows), definition(rows)
    resampled = [definition(drawn) for drawn in explicit_resamples(rows, [row["image"] for row in rows])]
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value), name
    median = "predict_median_distance_share"
    assert scores[f"{median}_ci"] == pytest.approx(interval_of([one[median] for one in resampled]))
    assert scores["unparsable"] == sum(row["predicted_point"] is None for row in rows) > 0
    assert scores["boxes_known"] == 48


def test_silence_cannot_improve_the_median_distance():
    near, far = click_row((150, 125), image="a"), click_row((150, 225), image="b")
    assert score_click([near, near, far])["predict_median_distance_pixels"] == 0
    silent = score_click([near, far, click_row(None, image="c")])
    assert silent["predict_median_distance_pixels"] == 100
    assert silent["predict_median_distance_pixels_ci"] == [0.0, None], "the upper end is open, not missing"
    mute = score_click([near, click_row(None), click_row(None)])
    assert mute["predict_median_distance_pixels"] is None and mute["unparsable"] == 2
    json.dumps([silent, mute], allow_nan=False)


def test_clicks_are_scored_by_the_groups_that_their_rows_state():
    def row(number, hit, **groups):
        point = [5, 5] if hit else [90, 90]
        return {"id": str(number), "group": str(number), "point": [5, 5], "bbox": [0, 0, 10, 10],
                "predicted_point": point, "image_size": [100, 100], **groups}  # fmt: skip

    rows = [
        row(0, True, data_type="icon", platform="web"),
        row(1, False, data_type="icon", platform="mobile"),
        row(2, True, data_type="text", platform="web"),
        row(3, True, data_type="text", platform="web"),
        row(4, False, data_type="text", platform="web", category="one value of all"),
    ]
    scores = score_click(rows)
    expected = {"data_type_icon": 1 / 2, "data_type_text": 2 / 3, "platform_mobile": 0, "platform_web": 3 / 4,
                "web_icon": 1, "mobile_icon": 0, "web_text": 2 / 3}  # fmt: skip
    assert {name: scores[f"predict_accuracy_{name}"] for name in expected} == pytest.approx(expected)
    assert all(f"predict_accuracy_{name}_ci" in scores for name in expected)
    assert not any(name.startswith("predict_accuracy_data_type") for name in score_click([row(0, True)] * 2))
