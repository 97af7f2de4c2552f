"""compare.py on constructed predictions: the numbers, what it refuses, what it says, and its page in a browser."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPO_ROOT
from PIL import Image
from scipy import stats
from support.headless_browser import headless_browser

import compare
from config import load_config, to_dict
from errors import UserError
from report import free_form
from report import page as compare_page
from report.comparison import _disagreement
from report.free_form import score_free_form, token_f1
from report.metrics import score_click, score_cls, score_vqa
from report.variance import Estimate
from report.words import notes

HOSTILE = '<img src=x onerror="document.title=1"></script><script>document.title=1</script> & "quoted" {{title}} | pipe'


def write_results(folder, rows, **scores):
    folder.mkdir(parents=True)
    score = score_cls if "predicted_label" in rows[0] else score_click if "predicted_point" in rows[0] else None
    measured = score(rows) if score else score_vqa(rows, {rows[0]["question"]: rows[0]["answer"]})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "generated_predictions.jsonl").write_text(lines, encoding="utf-8")
    (folder / "predict_results.json").write_text(json.dumps({**measured, **scores}), encoding="utf-8")
    return str(folder)


def vqa_rows(skill, seed, images=24, questions=6):
    """Answers of one experiment; which sample is hard depends on the image alone."""
    generator = np.random.default_rng(seed)
    rows = []
    for image in range(images):
        ease = skill + 0.4 * np.sin(image)
        for question in range(questions):
            answer = "yes" if question < 3 else "polyp; ulcer"
            right = generator.random() < ease
            rows.append(
                {
                    "id": f"{image}-{question}",
                    "images": [f"{image}.png"],
                    "question": f"question {question}?",
                    "answer": answer,
                    "prediction": answer.upper() if right else "no",
                    "stage": question % 3 + 1,
                    "multi_label": question >= 3,
                    "candidates": ["yes", "no", "polyp", "ulcer"],
                    "group": f"group {image}",
                }
            )
    return rows


def right_of(rows):
    return np.array([row["prediction"] != "no" for row in rows], dtype=int)


def run(*arguments, out):
    compare.main([*arguments, "--out", str(out)])
    return json.loads((out / "compare.json").read_text(encoding="utf-8"))


@pytest.fixture
def two(tmp_path):
    first = write_results(tmp_path / "exp1", vqa_rows(0.5, 1))
    second = write_results(tmp_path / "exp2", vqa_rows(0.7, 2))
    return first, second


def sentence_rows(skill, seed, images=12, questions=3):
    """Sentences that share more words with the gold ones the greater the skill, and hardly ever all of them."""
    generator = np.random.default_rng(seed)
    rows = []
    for row in vqa_rows(skill, seed, images, questions):
        gold = [f"word{n}" for n in generator.integers(0, 50, 8)]
        said = [word if generator.random() < skill else "other" for word in gold]
        row |= {"answer": " ".join(gold) + ".", "prediction": " ".join(said), "multi_label": False}
        rows.append({key: value for key, value in row.items() if key != "candidates"})
    return rows


def with_gold_of(rows, others):
    """The rows, about the other rows' gold answers: the same words at the same places are right."""
    found = []
    for row, other in zip(rows, others, strict=True):
        places = zip(row["prediction"].split(), other["answer"].rstrip(".").split(), strict=True)
        said = " ".join("other" if word == "other" else gold for word, gold in places)
        found.append({**row, "answer": other["answer"], "prediction": said})
    return found


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_difference_interval_and_p_value_agree_with_scipy(two, tmp_path):
    report = run(*two, out=tmp_path / "out")
    pair = report["pairs"][0]
    differences = (right_of(vqa_rows(0.5, 1)) - right_of(vqa_rows(0.7, 2))).reshape(24, 6).sum(axis=1)
    p = stats.permutation_test((differences,), np.sum, permutation_type="samples", n_resamples=50_000, rng=0).pvalue
    interval = stats.bootstrap((differences / 6,), np.mean, method="percentile", rng=0).confidence_interval
    assert pair["difference"] == pytest.approx(differences.sum() / 144)
    assert pair["p"] == pair["p_holm"] == pytest.approx(p, rel=0.1)
    assert pair["difference_ci"] == pytest.approx(list(interval), abs=0.01)
    assert pair["clusters_that_differ"] == np.count_nonzero(differences)


def test_parts_agree_with_scipy_too(two, tmp_path):
    report = run(*two, out=tmp_path / "out")
    assert [(part["kind"], part["name"]) for part in report["parts"]] == [
        *(("stage", str(stage)) for stage in (1, 2, 3)),
        *(("question", f"question {number}?") for number in range(6)),
    ]
    both = [right_of(vqa_rows(skill, seed)).reshape(24, 6) for skill, seed in ((0.5, 1), (0.7, 2))]
    for number in range(6):  # one question of every image: the exact sign test
        part = report["parts"][3 + number]
        first, second = (right[:, number] for right in both)
        only_first, only_second = int((first > second).sum()), int((second > first).sum())
        assert (part["pairs"][0]["only_first_right"], part["pairs"][0]["only_second_right"]) == (
            only_first,
            only_second,
        )
        assert part["pairs"][0]["p"] == pytest.approx(stats.binomtest(only_first, only_first + only_second).pvalue)
        assert [a["accuracy"] for a in part["accuracies"]] == pytest.approx([first.mean(), second.mean()])
    assert {part["pairs"][0]["family_size"] for part in report["parts"][:3]} == {3}
    assert {part["pairs"][0]["family_size"] for part in report["parts"][3:]} == {6}


def test_accuracy_and_its_interval_are_those_of_evaluate(two, tmp_path):
    report = run(*two, out=tmp_path / "out")
    for folder, experiment in zip(two, report["experiments"], strict=True):
        scores = json.loads((compare.Path(folder) / "predict_results.json").read_text())
        for name in ("predict_accuracy", "predict_accuracy_ci", "predict_f1_ci", "predict_accuracy_stage2_ci"):
            assert experiment[name] == pytest.approx(scores[name])
    for part in report["parts"][:3]:  # one bootstrap, two rooms: the same draws
        assert part["accuracies"][0]["accuracy_ci"] == pytest.approx(
            report["experiments"][0][f"predict_accuracy_stage{part['name']}_ci"]
        )


@pytest.fixture
def token_f1_alone(monkeypatch):
    """Without the libraries of the other scores of sentences, whose import takes seconds."""
    monkeypatch.setattr(free_form, "missing_libraries", lambda: list(free_form.LIBRARIES))


def test_sentences_are_compared_by_token_f1_and_every_table_says_so(token_f1_alone, tmp_path, capsys):
    first = sentence_rows(0.5, 1)
    second = with_gold_of(sentence_rows(0.7, 2), first)
    names = [write_results(tmp_path / name, rows) for name, rows in (("first", first), ("second", second))]
    report = run(*names, out=tmp_path / "out")
    f1 = [np.array([token_f1(row["prediction"], row["answer"]) for row in rows]) for rows in (first, second)]
    of_images = (f1[0] - f1[1]).reshape(12, 3).sum(axis=1)
    exact = stats.permutation_test((of_images,), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
    pair = report["pairs"][0]
    assert report["headline"] == "predict_token_f1"
    assert pair["p"] == pytest.approx(exact, abs=2e-3) and 0 < exact < 0.2
    assert pair["difference"] == pytest.approx(f1[0].mean() - f1[1].mean())
    assert pair["only_second_right"] == (f1[1] > f1[0]).sum()
    low, high = pair["difference_ci"]
    assert low < pair["difference"] < high
    for scores, values in zip(report["experiments"], f1, strict=True):
        assert scores["predict_token_f1"] == pytest.approx(values.mean()) and scores["predict_accuracy"] < 0.2
        rows = first if scores["name"] == "first" else second
        assert scores["predict_token_f1_ci"] == score_free_form(rows)["predict_token_f1_ci"], "evaluate.py's"
    assert "token F1" in pair["sentence"] and "right" not in pair["sentence"]
    assert any("token F1 is compared" in note for note in report["notes"])
    page, told = (tmp_path / "out/compare.html").read_text(), capsys.readouterr().out
    assert "36 questions on 12 images. Compared by token F1." in page
    for text in (page, told, (tmp_path / "out/compare.md").read_text()):
        assert "Token F1 % by stage" in text and "first higher on" in text and "Accuracy % by" not in text
    assert "first scores highest" in page and "is right" not in page and "before an answer is its token F1" in page
    stage = report["parts"][0]
    assert stage["accuracies"][0]["accuracy"] == pytest.approx(f1[0].reshape(12, 3)[:, 0].mean())


def test_seeds_of_sentences_have_a_mean_an_interval_and_a_spread(token_f1_alone, tmp_path):
    gold = sentence_rows(0.5, 0)
    for name, skill in (("a", 0.5), ("b", 0.7)):
        for seed in (1, 2, 3):
            write_results(
                tmp_path / f"{name}_seed{seed}", with_gold_of(sentence_rows(skill, 10 * seed), gold), seed=seed
            )
    runs = [",".join(str(tmp_path / f"{name}_seed{seed}") for seed in (1, 2, 3)) for name in "ab"]
    report = run(*runs, out=tmp_path / "out")
    for scores in report["experiments"]:
        assert scores["predict_token_f1"] == pytest.approx(np.mean([one["token_f1"] for one in scores["runs"]]))
        low, high = scores["predict_token_f1_ci"]
        assert low < scores["predict_token_f1"] < high and scores["seed_spread"] is not None
    assert report["pairs"][0]["p"] < 0.05 and "b scores higher than a" in report["pairs"][0]["sentence"]


def test_a_comparison_takes_rouge_and_meteor_from_the_rows_that_evaluate_has_scored(tmp_path, monkeypatch):
    rows = sentence_rows(0.5, 1)
    pytest.importorskip("nltk"), pytest.importorskip("rouge_score")
    scores = score_free_form(rows)  # as evaluate.py does before it writes them
    names = [write_results(tmp_path / name, rows) for name in ("first", "second")]
    monkeypatch.setattr(free_form, "meteor", lambda *_: pytest.fail("computed again"))
    monkeypatch.setattr(free_form, "_rouge", lambda: pytest.fail("computed again"))
    for one in run(*names, out=tmp_path / "out")["experiments"]:
        for name in free_form.NAMES:
            assert one[name] == pytest.approx(scores[name])


def test_holm_runs_over_all_pairs(two, tmp_path):
    third = write_results(tmp_path / "exp3", vqa_rows(0.95, 3))
    pairs = run(*two, third, out=tmp_path / "out")["pairs"]
    ordered = sorted(pairs, key=lambda pair: pair["p"])
    assert len(pairs) == 3 and {pair["family_size"] for pair in pairs} == {3}
    assert ordered[0]["p_holm"] == pytest.approx(3 * ordered[0]["p"])
    assert ordered[1]["p_holm"] == pytest.approx(max(ordered[0]["p_holm"], min(1, 2 * ordered[1]["p"])))


def test_the_order_of_the_file_changes_nothing(two, tmp_path):
    shuffled = write_results(tmp_path / "shuffled" / "exp2", vqa_rows(0.7, 2)[::-1])
    assert run(*two, out=tmp_path / "a")["pairs"] == run(two[0], shuffled, out=tmp_path / "b")["pairs"]


def test_folders_joined_with_plus_count_as_one_experiment(two, tmp_path):
    rows = vqa_rows(0.7, 2)
    parts = [write_results(tmp_path / f"stage{s}", [r for r in rows if r["stage"] == s]) for s in (1, 2, 3)]
    report = run(two[0], "exp2=" + "+".join(parts), out=tmp_path / "joined")
    whole = run(*two, out=tmp_path / "whole")
    assert report["pairs"] == whole["pairs"]
    assert report["experiments"][1]["predict_accuracy_ci"] == whole["experiments"][1]["predict_accuracy_ci"]


def test_question_only_results_and_majority_answer_are_labelled_as_baselines(two, tmp_path):
    rows = [{**row, "images": []} for row in vqa_rows(0.2, 4)]
    for row in rows:
        del row["group"]  # nothing ties the samples of an image together but the other experiments
    blind = write_results(tmp_path / "blind", rows, image="none", predict_accuracy_ci=None)
    report = run(blind, *two, out=tmp_path / "out")
    assert "majority answer: 120 questions are never asked in training, and count as wrong." in report["notes"]
    assert report["clusters"] == 24
    assert [scores["baseline"] for scores in report["experiments"]] == ["question only", None, None]
    assert report["majority_baselines"][0]["predict_accuracy"] == pytest.approx(1 / 6)
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "blind (baseline: question only)" in text and "majority answer (baseline: no model)" in text
    assert text.count("| majority answer") == 1  # the experiments agree about it


def test_six_classifications_make_one_table(tmp_path, capsys):
    generator = np.random.default_rng(5)
    truth = generator.integers(0, 2, 80)
    folders = []
    for number in range(6):
        positive = np.clip(0.5 + 0.3 * (truth - 0.5) * number + generator.normal(0, 0.2, 80), 0.01, 0.99)
        rows = [
            {"id": n, "title": f"paper {n}", "logits": [0, 0], "probabilities": [1 - p, p], "label": int(t)}
            | {"predicted_label": int(p > 0.5), "true_label": int(t)}
            for n, (p, t) in enumerate(zip(positive.tolist(), truth, strict=True))
        ]
        if number >= 3:
            rows = [{**row, "images": [f"{row['id']}.png"]} for row in rows]  # the vision half of the experiment
        folders.append(write_results(tmp_path / f"lr_{number}", rows))
    report = run(*folders, out=tmp_path / "out")
    assert report["task"] == "cls" and len(report["pairs"]) == 15 and report["clusters"] == 80
    printed = capsys.readouterr().out
    for heading in ("accuracy %", "F1 %", "AUROC", "Brier score", "calibration error %"):
        assert heading in printed
    assert all(f"lr_{number} " in printed for number in range(6))


def test_clicks_are_compared_by_hits_and_by_target_size(tmp_path):
    def rows(spread, seed):
        generator = np.random.default_rng(seed)
        return [
            {"id": str(n), "images": [f"{n}.png"], "instruction": "click", "point": [50, 50], "image_size": [100, 100]}
            | {"bbox": [40, 40, 60, 60] if n % 2 else [49, 49, 51, 51]}
            | {"predicted_point": None if n == 3 else generator.normal(50, spread, 2).tolist()}
            for n in range(40)
        ]

    folders = [write_results(tmp_path / f"click{n}", rows(spread, n)) for n, spread in enumerate((1, 30))]
    report = run(*folders, out=tmp_path / "out")
    assert [(part["kind"], part["name"]) for part in report["parts"]] == [("size", "large"), ("size", "small")]
    assert report["experiments"][0]["unparsable"] == 1 and report["pairs"][0]["p"] < 0.001


@pytest.mark.parametrize("stated_first", [True, False])
def test_a_group_that_only_some_clicks_state_is_a_part_of_those(tmp_path, stated_first):
    def rows(seed):
        generator = np.random.default_rng(seed)
        made = [
            {"id": str(n), "images": [f"{n}.png"], "instruction": "click", "point": [50, 50], "image_size": [100, 100]}
            | {"bbox": [40, 40, 60, 60], "predicted_point": generator.normal(50, 10, 2).tolist()}
            | ({"platform": ("web", "mobile")[n % 2]} if n >= 10 else {})
            for n in range(40)
        ]
        return made[::-1] if stated_first else made

    folders = [write_results(tmp_path / f"click{n}", rows(n)) for n in range(2)]
    parts = run(*folders, out=tmp_path / "out")["parts"]
    assert [(p["name"], p["samples"]) for p in parts if p["kind"] == "platform"] == [("mobile", 15), ("web", 15)]


# --- the words --------------------------------------------------------------------------------------------------------


def test_a_difference_beyond_chance_is_said_without_a_boast(two, tmp_path):
    third = write_results(tmp_path / "exp3", vqa_rows(1.2, 3))
    text = run(two[0], third, out=tmp_path / "out")["pairs"][0]["sentence"]
    assert text.startswith("exp3 is right more often than exp1, by more than the choice of images explains: ")
    assert re.search(
        r"\d\d\.\d % against \d\d\.\d %, \d\d\.\d points \(95 % interval .* to .* points, p < 0.0001\)", text
    )
    assert "significan" not in text


def test_no_shown_difference_is_not_called_equality(tmp_path):
    folders = [write_results(tmp_path / f"exp{seed}", vqa_rows(0.6, seed)) for seed in (1, 2)]
    text = run(*folders, out=tmp_path / "out")["pairs"][0]["sentence"]
    assert text.startswith("These numbers do not tell ") and "nor show them equal" in text


def test_too_few_differing_images_are_named_as_such(tmp_path):
    rows = vqa_rows(0.6, 1)
    better = [{**row, "prediction": row["answer"]} if int(row["id"].split("-")[0]) < 5 else row for row in rows]
    folders = [write_results(tmp_path / "exp1", rows), write_results(tmp_path / "exp2", better)]
    text = run(*folders, out=tmp_path / "out")["pairs"][0]["sentence"]
    assert re.search("exp2 and exp1 differ on only [2-5] images, too few for any test to tell them apart", text)


def test_equally_many_right_on_every_image_is_said_so_where_the_questions_are_others(tmp_path):
    rows = vqa_rows(0.6, 1)

    def right_on(number):
        return [{**row, "prediction": row["answer"] if row["id"].endswith(f"-{number}") else "no"} for row in rows]

    folders = [write_results(tmp_path / f"exp{number}", right_on(number)) for number in (1, 2)]
    text = run(*folders, out=tmp_path / "out")["pairs"][0]["sentence"]
    assert "exp1 and exp2 are right equally often on every image, but on other questions: " in text


def test_identical_results_are_said_to_be_identical_in_what_was_right(tmp_path):
    folders = [write_results(tmp_path / name, vqa_rows(0.6, 1)) for name in ("exp1", "exp2")]
    report = run(*folders, out=tmp_path / "out")
    assert report["pairs"][0]["sentence"] == "exp1 and exp2 are right and wrong on exactly the same questions."
    assert "nothing to show" in (tmp_path / "out" / "compare.html").read_text()


# --- recipes and seeds ------------------------------------------------------------------------------------------------


def recorded(name, seed=42, weights=None, **changes):
    """What evaluate.py records of a run of a shipped config."""
    config = to_dict(load_config(REPO_ROOT / "configs" / f"{name}.yaml", [f"{k}={v}" for k, v in changes.items()]))
    config["seed"] = seed
    return {
        "seed": seed,
        "adapter_sha256": weights or f"{name} {seed} {changes}",
        "data_sha256": {"train": "0" * 64, "test": "1" * 64},
        "questions_per_step": 64,
        "checkpoint": config["output_dir"],
        "trained_config": config,
        "config": config,
    }


def recipe_of(tmp_path, first, second):
    folders = [
        write_results(tmp_path / name, vqa_rows(0.6, seed), **record)
        for seed, (name, record) in enumerate((("one", first), ("two", second)))
    ]
    return run(*folders, out=tmp_path / "out")["pairs"][0]


@pytest.mark.parametrize(
    ("name", "key", "shown"),
    [
        ("exp2_random_order", "order", "order (sequential / random)"),
        ("exp2_standard_prompt", "template", "template (ultra_condensed / standard)"),
        ("exp2_qwen2_vl", "model_name", "image_size (768 / 756, the nearest that fits the model)"),
    ],
)
def test_a_pair_that_differs_in_one_thing_is_said_to(tmp_path, name, key, shown):
    pair = recipe_of(tmp_path, recorded("exp2"), recorded(name))
    assert [entry["key"] for entry in pair["differing_keys"] if entry["matters"]] == [key]
    assert (
        pair["recipe"].startswith(f"one and two differ in {key} alone. Keys that differ: ") and shown in pair["recipe"]
    )


def test_a_difference_between_recipes_that_differ_in_more_is_ascribed_to_nothing(tmp_path):
    first = recorded("exp1") | {"questions_per_step": 16}
    pair = recipe_of(tmp_path, first, recorded("exp2") | {"data_sha256": {"train": "2" * 64, "test": "1" * 64}})
    mattering = {entry["key"] for entry in pair["differing_keys"] if entry["matters"]}
    assert mattering == {"model_name", "template", "order", "questions of a step", "training data"}
    assert "5 things that matter, so no difference between them can be ascribed to any one of these" in pair["recipe"]
    for shown in (
        "order (random / sequential)",
        "questions of a step (16 / 64)",
        "training data (00000000 / 22222222)",
    ):
        assert shown in pair["recipe"]
    assert "Keys that differ" in (tmp_path / "out" / "compare.md").read_text()


def test_another_seed_is_no_other_recipe_and_what_is_not_recorded_is_said(tmp_path):
    pair = recipe_of(tmp_path / "a", recorded("exp2", seed=1), recorded("exp2", seed=2))
    assert pair["recipe"] == "The recipes of one and two are the same. Keys that differ: seed (1 / 2)."
    assert "is not recorded: run evaluate.py again" in recipe_of(tmp_path / "b", {}, recorded("exp2"))["recipe"]


def test_what_only_the_evaluation_changed_is_a_difference_too(tmp_path):
    other = recorded("exp2")
    other["config"] = other["config"] | {"template": "standard"}
    assert "differ in template at evaluation alone" in recipe_of(tmp_path, recorded("exp2"), other)["recipe"]
    base = recorded("exp2") | {"checkpoint": "base", "trained_config": None, "adapter_sha256": None}
    assert "differ in trained alone" in recipe_of(tmp_path / "base", recorded("exp2"), base)["recipe"]


@pytest.mark.parametrize("known", [(None, None), (None, "0" * 64), ("0" * 64, None)])
def test_training_data_that_a_run_did_not_record_are_never_called_the_same(tmp_path, known):
    first, second = (recorded("exp2", seed) | {"data_sha256": {"train": k}} for seed, k in enumerate(known))
    pair = recipe_of(tmp_path, first, second)
    assert pair["recipe"] == (
        "The recipes of one and two are the same in all that is recorded of them; training data not recorded, which "
        "may differ as well. Keys that differ: seed (0 / 1)."
    )
    assert "not recorded" in (tmp_path / "out" / "compare.md").read_text().split("## Keys that differ")[1]
    other = recorded("exp2_random_order") | {"data_sha256": {"train": known[1]}}
    text = recipe_of(tmp_path / "order", recorded("exp2") | {"data_sha256": {"train": known[0]}}, other)["recipe"]
    assert "differ in order; training data not recorded, which may differ as well." in text and "alone" not in text


def test_an_untrained_model_has_no_training_data_to_record(tmp_path):
    base = recorded("exp2") | {"checkpoint": "base", "trained_config": None, "adapter_sha256": None}
    base["data_sha256"] = {"train": None, "test": "1" * 64}
    pair = recipe_of(tmp_path, recorded("exp2"), base)
    assert "differ in trained alone" in pair["recipe"] and "not recorded" not in pair["recipe"]


def test_among_many_pairs_those_with_unrecorded_training_data_are_named(tmp_path):
    folders = []
    for seed in range(4):
        record = recorded("exp2", seed) | ({"data_sha256": {"test": "1" * 64}} if seed == 3 else {})
        folders.append(write_results(tmp_path / f"exp{seed}", vqa_rows(0.6, seed), **record))
    run(*folders, out=tmp_path / "out")
    named = "exp0 and exp3; exp1 and exp3; exp2 and exp3."
    assert (
        f"3 of 6 pairs: training data not recorded, which may differ: {named}"
        in (tmp_path / "out" / "compare.md").read_text()
    )


def test_answers_of_another_program_are_marked_and_get_no_cure_that_cannot_help(two, tmp_path):
    api = write_results(tmp_path / "api", vqa_rows(0.6, 3), predictions="api.jsonl", predictions_sha256="3" * 64)
    pair = run(two[0], api, out=tmp_path / "out")["pairs"][0]
    assert pair["recipe"] == "api's answers were made elsewhere; what made them is not known."
    assert "trained models" not in pair["sentence"] and pair["sentence"].endswith("of these answers alone.")
    text = (tmp_path / "out" / "compare.md").read_text()
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "api (answers made elsewhere)" in text and "exp1 (answers" not in text
    assert '<span class="tag">answers made elsewhere</span>' in page
    assert "run evaluate.py again" not in text + page
    assert "train 3 seeds" in text, "exp1 was trained"
    gpt = write_results(tmp_path / "gpt", vqa_rows(0.7, 4), predictions="gpt.jsonl", predictions_sha256="4" * 64)
    pair = run(api, gpt, out=tmp_path / "both")["pairs"][0]
    assert pair["recipe"] == "The answers of api and gpt were made elsewhere; what made them is not known."
    assert "train 3 seeds" not in (tmp_path / "both" / "compare.md").read_text()
    run(*two, api, gpt, out=tmp_path / "many")
    head = (tmp_path / "many" / "compare.md").read_text().split("## ")[0]
    assert "The answers of api and gpt were made elsewhere; what made them is not known." in head


@pytest.fixture
def seeds(tmp_path):
    """Two experiments of three runs each, NAME=FOLDER,FOLDER,FOLDER."""
    arguments = []
    for name, skill in (("exp2", 0.75), ("exp2_random_order", 0.5)):
        folders = [
            write_results(tmp_path / f"{name}_seed{n}", vqa_rows(skill, 10 * n + len(name)), **recorded(name, seed=n))
            for n in (1, 2, 3)
        ]
        arguments.append(f"{name}={','.join(folders)}")
    return arguments


def test_experiments_of_several_seeds_are_compared_by_the_two_way_t(seeds, tmp_path):
    report = run(*seeds, out=tmp_path / "out")
    pair = report["pairs"][0]
    hits = [
        np.array([right_of(vqa_rows(skill, 10 * n + len(name))).reshape(24, 6).sum(axis=1) for n in (1, 2, 3)])
        for name, skill in (("exp2", 0.75), ("exp2_random_order", 0.5))
    ]
    estimate = Estimate.of(hits, np.full(24, 6))
    assert pair["runs"] == [3, 3] and pair["difference_ci"] == estimate.interval()
    assert (pair["difference"], pair["p"]) == (pytest.approx(estimate.value), estimate.p_value())
    assert "by more than the choice of images and of seeds explains" in pair["sentence"]
    assert "trained models" not in pair["sentence"]
    first = report["experiments"][0]
    assert [one["seed"] for one in first["runs"]] == [1, 2, 3]
    assert [one["accuracy"] for one in first["runs"]] == pytest.approx(list(hits[0].sum(axis=1) / 144))
    assert first["predict_accuracy"] == pytest.approx(hits[0].sum() / 432) and "predict_f1_ci" not in first
    assert any(note.startswith("exp2: 3 runs, spread from seed to seed ") for note in report["notes"])


def test_with_one_run_the_sentence_speaks_of_the_trained_models(seeds, two, tmp_path):
    single = run(*two, out=tmp_path / "a")["pairs"][0]
    assert single["sentence"].endswith(
        "With one run each, this speaks of these two trained models, not of their recipes."
    )
    mixed = run(seeds[0], two[0], out=tmp_path / "b")["pairs"][0]
    assert mixed["sentence"].endswith(
        "With a single run of exp1, this speaks of these trained models, not of their recipes."
    )
    assert mixed["runs"] == [3, 1]


def test_a_name_is_taken_from_the_seeds_and_one_run_given_as_three_is_refused(seeds, tmp_path):
    unnamed = seeds[0].removeprefix("exp2=")
    report = run(unnamed, seeds[1], out=tmp_path / "out")
    assert [one["name"] for one in report["experiments"]] == ["exp2", "exp2_random_order"]
    folders = unnamed.split(",")
    out = tmp_path / "refused"
    assert "are the same run" in refused(f"a={folders[0]},{folders[0]}", seeds[1], out=out)
    copy = write_results(tmp_path / "copy", vqa_rows(0.7, 5), **recorded("exp2", seed=1))
    assert "are the same run" in refused(f"a={folders[0]},{copy}", seeds[1], out=out)
    other = write_results(tmp_path / "other", vqa_rows(0.7, 5), **recorded("exp2", seed=4, learning_rate="1e-5"))
    assert "differ in learning_rate, so they are no seeds of one" in refused(
        f"a={folders[0]},{other}", seeds[1], out=out
    )
    assert "need a name" in refused(f"{folders[0]},{other}", seeds[1], out=out)


def test_experiments_scored_as_sentences_and_as_words_are_refused_with_the_cure(tmp_path):
    sentences, words = (
        write_results(tmp_path / name, [{**row, "free_form": free} for row in sentence_rows(0.6, 1)])
        for name, free in (("rb", True), ("ra", False))
    )
    message = refused(words, sentences, out=tmp_path / "out")
    assert f"the answers of {sentences} are scored as sentences, those of {words} as words; run" in message


def test_scores_that_several_runs_add_up_in_another_order_are_no_difference():
    scores = np.array([[0.1], [0.2], [0.3]])
    assert scores.mean(axis=0) != scores[::-1].mean(axis=0), "else nothing is tested"
    assert _disagreement(scores, scores[::-1]) == {"only_first_right": 0, "only_second_right": 0}
    asked, other = np.array([1, 1]), np.array([[0.9], [0.5], [0.5]])
    first, second = (np.hstack([order, more]) for order, more in ((scores, other), (scores[::-1], other - 0.2)))
    differing = Estimate.of([first, second], asked)
    exact = Estimate.of([np.round(first, 12), np.round(np.hstack([scores, other - 0.2]), 12)], asked)
    assert differing.image == pytest.approx(exact.image)


def test_the_notes_tell_the_interval_of_several_runs_token_f1_from_the_bootstrap():
    scores = {"name": "a", "runs": [0, 1], "seed_spread": None, "made_elsewhere": False}
    said = {
        headline: "".join(notes("vqa", [scores], [], headline)) for headline in ("predict_token_f1", "predict_accuracy")
    }
    told = "several runs: means, without interval, but of token F1: t over images and seeds."
    assert told in said["predict_token_f1"] and "without interval." in said["predict_accuracy"]


@pytest.mark.parametrize("first_is_words", [True, False])
def test_seeds_scored_as_sentences_and_as_words_are_refused_with_the_cure(two, tmp_path, first_is_words):
    runs = [
        write_results(tmp_path / f"x_seed{n}", [{**row, "free_form": free} for row in vqa_rows(0.6, n)])
        for n, free in ((1, not first_is_words), (2, first_is_words))
    ]
    message = refused(f"x={','.join(runs)}", two[0], out=tmp_path / "out")
    sentences, words = runs[first_is_words], runs[not first_is_words]
    assert f"the answers of {sentences} are scored as sentences, those of {words} as words; run" in message
    assert "--answers" in message


def test_seeds_on_one_image_are_compared_and_their_spread_is_said_to_be_unknown(tmp_path):
    arguments = []
    for name in ("a", "b"):
        runs = [
            write_results(tmp_path / f"{name}{n}", vqa_rows(0.5, 10 * n + ord(name), images=1, questions=12))
            for n in (1, 2)
        ]
        arguments.append(f"{name}={','.join(runs)}")
    report = run(*arguments, "--plan", "2", "--margin", "1", out=tmp_path / "out")
    assert "a: 2 runs; a single image tells nothing of their spread from seed to seed." in report["notes"]


# --- power and equivalence --------------------------------------------------------------------------------------------


def test_a_comparison_that_finds_nothing_says_what_it_could_have_found(tmp_path):
    folders = [write_results(tmp_path / f"exp{seed}", vqa_rows(0.6, seed)) for seed in (1, 2)]
    pair = run(*folders, out=tmp_path / "out")["pairs"][0]
    power = f"A true difference of {100 * pair['detectable_difference']:.2f} points would be found in 80 % of cases."
    assert power in pair["sentence"]
    low, high = pair["difference_ci"]
    t = stats.t(23)
    assert pair["detectable_difference"] == pytest.approx((high - low) / 2 / t.ppf(0.975) * (t.ppf(0.975) + t.ppf(0.8)))


def test_a_margin_gives_the_sentence_a_third_outcome(tmp_path):
    folders = [write_results(tmp_path / f"exp{seed}", vqa_rows(0.6, seed, images=150)) for seed in (1, 2)]
    wide = run(*folders, "--margin", "15", out=tmp_path / "wide")["pairs"][0]
    assert wide["sentence"].startswith("exp1 and exp2 are shown equal within 15 points: ")
    low, high = wide["margin_ci"]
    assert "90 % interval" in wide["sentence"] and -0.15 < low < high < 0.15
    assert high - low < np.diff(wide["difference_ci"])[0]
    narrow = run(*folders, "--margin", "1", out=tmp_path / "narrow")["pairs"][0]
    assert "nor show them equal within 1 point: " in narrow["sentence"]
    assert "--margin 0" in refused(*folders, "--margin", "0", out=tmp_path / "refused")


def test_a_plan_tells_images_and_seeds(seeds, two, tmp_path, capsys):
    report = run(*seeds, "--plan", "2", out=tmp_path / "a")
    rows = report["pairs"][0]["plan"]["rows"]
    assert [row["runs"] for row in rows] == [3, 5, 10] and not report["pairs"][0]["plan"]["spread_is_assumed"]
    assert rows[0]["detectable_here"] > rows[1]["detectable_here"] > rows[2]["detectable_here"]
    assert "Plan: to find 2 points in 80 % of cases" in capsys.readouterr().out
    assumed = run(*two, "--plan", "2", out=tmp_path / "b")["pairs"][0]["plan"]
    assert assumed["spread_is_assumed"] and len(assumed["rows"]) == 9
    assert "--plan -1" in refused(*two, "--plan=-1", out=tmp_path / "refused")


def test_many_pairs_that_end_alike_share_one_statement(tmp_path):
    folders = [
        write_results(tmp_path / f"exp{seed}", vqa_rows(0.6, seed), **recorded("exp2", seed)) for seed in range(4)
    ]
    better = write_results(tmp_path / "better", vqa_rows(1.3, 9), **recorded("exp2", 9))
    report = run(*folders, better, out=tmp_path / "out")
    head = (tmp_path / "out" / "compare.md").read_text().split("## ")[0]
    lines = [line for line in head.splitlines() if line.startswith("- ")]
    assert len(lines) == 4, "findings, the others, what single runs mean, and their keys"
    assert (
        lines[0].startswith("- 4 of 10 pairs differ by more than the choice of images explains")
        and "better over exp0 by" in lines[0]
    )
    assert "6 of 10 pairs are not told apart by these numbers, nor shown equal: exp0 and exp1; " in lines[1]
    assert "trained models, not of their recipes" in lines[2] and "0 of 10 pairs differ in one key alone." in lines[3]
    assert len(report["pairs"]) == 10


def test_one_undecided_pair_has_one_detectable_difference_and_no_range(tmp_path):
    skills = {"exp0": 0.6, "exp1": 0.6, "exp2": 0.0, "exp3": 2.0}
    folders = [write_results(tmp_path / name, vqa_rows(skill, 5 + n)) for n, (name, skill) in enumerate(skills.items())]
    report = run(*folders, out=tmp_path / "out")
    text = (tmp_path / "out" / "compare.md").read_text()
    size = f"{100 * report['pairs'][0]['detectable_difference']:.2f}"
    assert "1 of 6 pairs are not told apart" in text
    assert f" A true difference of {size} points would be found in 80 % of cases." in text


def test_among_many_pairs_those_right_on_the_same_questions_are_not_called_undecided(tmp_path):
    folders = [
        write_results(tmp_path / name, vqa_rows(0.6, seed))
        for name, seed in (("exp0", 1), ("same", 1), ("exp1", 2), ("exp2", 3))
    ]
    run(*folders, out=tmp_path / "out")
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "1 of 6 pairs are right and wrong on exactly the same questions: exp0 and same." in text
    assert "nor shown equal: exp0 and exp1; " in text


# --- what it refuses --------------------------------------------------------------------------------------------------


def refused(*arguments, out):
    with pytest.raises(UserError) as caught:
        compare.main([*map(str, arguments), "--out", str(out)])
    assert not out.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_different_test_sets_are_refused_with_how_many_ids_differ_and_the_first_of_them(two, tmp_path):
    other = write_results(tmp_path / "other", vqa_rows(0.7, 2, images=26)[6:])
    message = refused(two[0], other, out=tmp_path / "out")
    assert "6 ids (0-0, 0-1, 0-2, 0-3, 0-4, ...) only in exp1" in message
    assert "12 ids (24-0, 24-1, 24-2, 24-3, 24-4, ...) only in other" in message


@pytest.mark.parametrize("key", ["answer", "question"])
def test_another_gold_answer_or_question_under_the_same_id_is_refused(two, tmp_path, key):
    rows = vqa_rows(0.7, 2)
    rows[7][key] += "?"
    other = write_results(tmp_path / "other", rows)
    assert f"disagree on the {key} of 1 id (1-1)" in refused(two[0], other, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("generated_predictions.jsonl", None, "missing; run evaluate.py"),
        ("predict_results.json", None, "missing; run evaluate.py"),
        ("generated_predictions.jsonl", "", "empty"),
        ("generated_predictions.jsonl", '{"id": "1"}\n{"id": "2", "que', "line 2: not valid JSON"),
        ("generated_predictions.jsonl", "[1]\n", "line 1: not a sample with an id"),
        ("generated_predictions.jsonl", '{"id": "1"}\n{"id": 1}\n', "line 2: id 1 is there twice"),
        ("generated_predictions.jsonl", b"\xff\xfe", "not UTF-8"),
        ("generated_predictions.jsonl", '{"id": "1", "images": 5}', "line 1: key 'image' or 'images' must be a path"),
        ("generated_predictions.jsonl", '{"id": ' + "9" * 5000 + "}", "line 1: not valid JSON"),
        ("predict_results.json", "[" * 100_000, "line 1: not valid JSON"),
        ("predict_results.json", "", "not valid JSON"),
        ("predict_results.json", '{"predict_accuracy": NaN}', "NaN is no JSON number"),
        ("predict_results.json", "[]", "no table of scores"),
        ("predict_results.json", '{"predict_samples": 7}', "144 samples, predict_results.json speaks of 7"),
        ("predict_results.json", '{"predict_samples": 144, "predict_accuracy": 0.123}', "of different runs"),
    ],
)
def test_missing_empty_and_corrupt_files_are_refused_in_one_line(two, tmp_path, name, content, message):
    path = tmp_path / "exp2" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    error = refused(*two, out=tmp_path / "out")
    assert message in error and "exp2" in error


def test_rows_without_what_their_task_needs_are_refused(two, tmp_path):
    rows = vqa_rows(0.7, 2)
    other = write_results(tmp_path / "other", rows)
    (tmp_path / "other" / "generated_predictions.jsonl").write_text(
        "".join(json.dumps({k: v for k, v in row.items() if k != "prediction"}) + "\n" for row in rows)
    )
    assert "sample '0-0' lacks prediction" in refused(two[0], other, out=tmp_path / "out")


@pytest.mark.parametrize("images", [4, 350])
def test_a_score_file_that_is_off_by_one_answer_is_noticed(tmp_path, images):
    rows = vqa_rows(0.7, 2, images)
    right = sum(row["prediction"] != "no" for row in rows)
    first = write_results(tmp_path / "exp1", rows)
    stale = write_results(tmp_path / "exp2", rows, predict_accuracy=(right - 1) / len(rows))
    assert "of different runs" in refused(first, stale, out=tmp_path / "out")
    exact = write_results(tmp_path / "exp3", rows, predict_accuracy=right / len(rows))
    run(first, exact, out=tmp_path / "out")


def test_one_path_as_text_is_one_image_and_not_its_first_letter(tmp_path):
    rows = [{**row, "images": row["images"][0], "group": None} for row in vqa_rows(0.7, 2)]
    folders = [write_results(tmp_path / name, rows) for name in ("exp1", "exp2")]
    assert run(*folders, out=tmp_path / "out")["clusters"] == 24


def test_options_that_cannot_be_meant_are_refused_before_anything_is_read(two, tmp_path):
    assert "--pictures -5" in refused(*two, "--pictures", "-5", out=tmp_path / "out")
    (tmp_path / "file").write_text("kept")
    for out in (tmp_path / "file", tmp_path / "file" / "under"):
        with pytest.raises(UserError, match=r"--out .*file is no folder"):
            compare.main([*two, "--out", str(out)])


def test_one_folder_two_of_one_name_two_tasks_and_overlapping_parts_are_refused(two, tmp_path):
    out = tmp_path / "out"
    assert "at least two" in refused(two[0], out=out)
    assert "two results of one name" in refused(two[0], two[0], out=out)
    assert "no such results folder" in refused(two[0], tmp_path / "nowhere", out=out)
    assert "more than one of the joined folders" in refused(two[0], f"x={two[0]}+{two[1]}", out=out)
    row = {"id": "1", "probabilities": [0.5, 0.5], "predicted_label": 0, "true_label": 0}
    assert "no comparison" in refused(two[0], write_results(tmp_path / "cls", [row]), out=out)


def test_the_command_ends_with_one_line_and_code_2(two, tmp_path):
    command = [sys.executable, str(REPO_ROOT / "compare.py"), two[0], str(tmp_path / "nowhere"), "--out", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr == f"error: {tmp_path / 'nowhere'}: no such results folder\n"


# --- the page ---------------------------------------------------------------------------------------------------------


def draw_images(folder, count=24):
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (640, 480), (10 * number, 90, 120)).save(folder / f"{number}.png")
    return str(folder)


def test_the_page_needs_no_network_and_shows_hostile_text_as_text(two, tmp_path):
    rows = vqa_rows(0.7, 2)
    rows[0]["prediction"] = HOSTILE
    other = write_results(tmp_path / "<b>bold", rows, image_root=draw_images(tmp_path / "images"))
    run(two[0], other, out=tmp_path / "out")
    page = (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
    assert "<img src=x" not in page and "<b>bold" not in page
    assert "&lt;img src=x" in page and "{{title}} | pipe" in page
    assert page.count("<script>") == 1
    assert not re.search(r"(src|href)=\"(?!data:)|url\(|@import|https?://", page)
    assert "default-src 'none'" in page


def test_left_out_and_missing_images_are_counted(two, tmp_path, capsys):
    root = draw_images(tmp_path / "images", count=3)
    compare.main([*two, "--out", str(tmp_path / "out"), "--image-root", root, "--pictures", "10"])
    summary = next(line for line in capsys.readouterr().out.splitlines() if "disagree" in line)
    found = re.search(
        r"disagree on (\d+) images; the page shows 10.* (\d+) are left out .*\. (\d+) images could not", summary
    )
    total, left_out, unreadable = map(int, found.groups())
    assert total == left_out + 10 and 7 <= unreadable <= 10
    page = (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
    assert page.count("image not found") == unreadable
    assert summary.split(";")[0] in page


def test_the_page_has_a_dot_for_each_seed_the_chance_of_two_classes_and_long_answers_clamped(seeds, tmp_path):
    rows = vqa_rows(0.75, 14)
    rows[0]["prediction"] = "<b>" + "and so on " * 100
    long = write_results(tmp_path / "long", rows, **recorded("exp2", seed=4))
    run(f"{seeds[0]},{long}", seeds[1], out=tmp_path / "out")
    page = (tmp_path / "out" / "compare.html").read_text()
    assert page.count('<span class="seed"') == 7 and page.count('<span class="chance"') == 0
    assert '<details class="long"><summary>&lt;b&gt;and so on' in page
    assert "in most runs" in page and "exp2 is right" in page
    papers = [
        {"id": n, "probabilities": [0.4, 0.6], "predicted_label": 1, "true_label": n % 3 > 0, "logits": [0, 0]}
        for n in range(30)
    ]
    folders = [write_results(tmp_path / name, papers) for name in ("lr_1", "lr_2")]
    run(*folders, out=tmp_path / "cls")
    page = (tmp_path / "cls" / "compare.html").read_text()
    assert page.count('<span class="chance"') == 2 and "chance, 50 %" in page


def test_clicks_that_hit_alike_are_not_said_to_be_the_same_answers(tmp_path):
    def rows(offset):
        point = {"point": [50, 50], "image_size": [100, 100], "bbox": [40, 40, 60, 60]}
        return [
            {
                "id": str(n),
                "images": [f"{n}.png"],
                "instruction": "click",
                **point,
                "predicted_point": [50 + offset, 50],
            }
            for n in range(8)
        ]

    run(*[write_results(tmp_path / f"click{n}", rows(n)) for n in (0, 5)], out=tmp_path / "out")
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "hit and missed the same targets" in page and "same answers" not in page


def test_no_question_is_crowded_out_of_the_chosen_images():
    cards = [{"items": [{"asked": "common"}]} for _ in range(50)] + [{"items": [{"asked": "rare"}]}]
    assert cards[-1] in compare_page._choose(cards, 4)
    assert len(compare_page._choose(cards, 4)) == 4 and compare_page._choose(cards, 60) == cards


def test_in_a_browser_a_filter_is_clicked_and_images_are_seen(two, tmp_path):
    rows = vqa_rows(0.7, 2)
    rows[0]["prediction"] = HOSTILE
    other = write_results(tmp_path / "exp3", rows, image_root=draw_images(tmp_path / "images"))
    report = run(*two, other, out=tmp_path / "out")
    shown = "[...document.querySelectorAll('.items > li')].filter(e => e.offsetParent).map(e => e.dataset.stage)"
    with headless_browser(tmp_path / "profile") as browser:
        browser.open(tmp_path / "out" / "compare.html")
        assert browser.run("document.title") == " · ".join(e["name"] for e in report["experiments"])  # no script ran
        assert set(browser.run(shown)) == {"1", "2", "3"}
        everything = len(browser.run(shown))

        browser.click("input[name=stage][value='2']")
        seen = browser.run(shown)
        assert set(seen) == {"2"} and browser.run("location.hash") == "#stage=2"
        assert f"{len(seen)} of {everything} questions" in browser.run("document.getElementById('count').textContent")
        sizes = "[...document.querySelectorAll('.card img')].filter(e => e.offsetParent).map(e => e.naturalWidth)"
        assert set(browser.run(sizes)) == {320}

        browser.click("button[type=reset]")
        browser.run("new Promise(done => setTimeout(done, 50))")
        assert len(browser.run(shown)) == everything and browser.run("location.hash") == ""

        browser.open(tmp_path / "out" / "compare.html", "#stage=3&question=question+2%3F&right=only-0", width=400)
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        asked = shown.replace("dataset.stage", "dataset.right + e.dataset.question")
        assert set(browser.run(asked)) == {"0question 2?"}
        marks = "[...document.querySelectorAll('.items > li:not([hidden]) .mark')].map(e => e.textContent).join('')"
        assert re.fullmatch("(✓✗✗)+", browser.run(marks))  # right and wrong differ in more than colour

        browser.open(tmp_path / "out" / "compare.html", "#stage=99&length=3&right=nonsense")  # a stale address
        assert len(browser.run(shown)) in (0, everything)
        assert {request.split(":")[0] for request in browser.requests} <= {"file", "data", "about"}
