"""Answers that are sentences: token F1, BLEU, ROUGE and METEOR are the libraries' own, with intervals over images."""

import json
import random

import numpy as np
import pytest
from conftest import shared_data
from support.tiny_runs import run_script, short_answers, tiny_run, vqa_samples, write_config, write_images

from checkpoint import save_adapter
from evaluate import table
from report import free_form
from report.free_form import are_sentences, is_free_form, is_sentence, score_free_form, token_f1
from tasks import vqa

WORDS = "the a small red polyp polyps instruments is in lower left of colon no instrument here, text; (no) Two".split()


def rows(number=100, images=20, seed=0):
    """Random pairs of sentences that share some words."""
    dice = random.Random(seed)
    made = []
    for index in range(number):
        gold = dice.choices(WORDS, k=dice.randint(3, 12))
        said = [word if dice.random() < 0.7 else dice.choice(WORDS) for word in gold][: dice.randint(1, 14)]
        made.append({"id": str(index), "group": str(index % images), "images": [], "question": "Describe.",
                     "answer": " ".join(gold) + ".", "prediction": " ".join(said) + "!" * (index % 2)})  # fmt: skip
    made[0]["prediction"] = ""
    return made


def libraries():
    for name in free_form.LIBRARIES:
        pytest.importorskip(name)


def test_scores_equal_the_reference_implementations_on_100_pairs():
    libraries()
    from nltk import word_tokenize
    from nltk.translate.meteor_score import meteor_score
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu import corpus_bleu

    made = rows()
    scores = score_free_form(made, overrule=True)
    said, gold = [row["prediction"] for row in made], [row["answer"] for row in made]
    assert scores["predict_bleu"] == pytest.approx(corpus_bleu(said, [gold]).score / 100, abs=1e-12)
    for kind in ("rouge1", "rouge2", "rougeL"):
        one = RougeScorer([kind])
        expected = np.mean([one.score(g, s)[kind].fmeasure for g, s in zip(gold, said, strict=True)])
        assert scores[f"predict_{kind}"] == pytest.approx(expected, abs=1e-12)
    split = [[word_tokenize(text, preserve_line=True) for text in texts] for texts in (gold, said)]
    wordnet = free_form._wordnet()
    expected = np.mean([meteor_score([g], s, wordnet=wordnet) for g, s in zip(*split, strict=True)])
    assert scores["predict_meteor"] == pytest.approx(expected, abs=1e-12)
    assert 0.2 < scores["predict_bleu"] < 0.9 and scores["meteor_matches"] in free_form.meteor_matches()


def test_bleu_of_a_resample_is_that_of_the_corpus_it_stands_for():
    libraries()
    from sacrebleu import corpus_bleu

    made = rows(30)
    _, bleu = free_form.columns(made)
    weights = np.random.default_rng(1).integers(0, 3, (5, len(made))).astype(float)
    for found, counts in zip(bleu(weights), weights.astype(int), strict=True):
        drawn = [row for row, count in zip(made, counts, strict=True) for _ in range(count)]
        expected = corpus_bleu([row["prediction"] for row in drawn], [[row["answer"] for row in drawn]]).score
        assert found == pytest.approx(expected / 100, abs=1e-12)


def test_every_score_has_an_interval_over_images_that_is_wider_where_images_agree_within():
    libraries()
    made = rows(120, images=120)
    together = sorted(made, key=lambda row: token_f1(row["prediction"], row["answer"]))
    together = [{**row, "group": str(number // 10)} for number, row in enumerate(together)]
    apart, clustered = score_free_form(made, overrule=True), score_free_form(together, overrule=True)
    for name in free_form.NAMES:
        low, high = apart[f"{name}_ci"]
        assert low < apart[name] < high
        wide_low, wide_high = clustered[f"{name}_ci"]
        assert clustered[name] == pytest.approx(apart[name]) and wide_high - wide_low > 1.2 * (high - low)


@pytest.mark.parametrize(
    ("said", "gold", "f1"),
    [
        ("A red polyp.", "the red polyp", 1.0),
        ("red polyp", "red red polyp", 0.8),
        ("", "polyp", 0.0),
        ("the", "a", 1.0),
        ("blue", "red", 0.0),
    ],
)
def test_token_f1_is_that_of_squad(said, gold, f1):
    assert token_f1(said, gold) == pytest.approx(f1)


def test_sets_of_sentences_are_told_from_sets_of_words_and_a_set_that_says_so_is_believed():
    with open(shared_data("kvasir/kvasir_vqa_3000.csv"), encoding="utf-8") as file:
        real = [line.rsplit(",", 2)[1] for line in file][1:]
    assert not are_sentences(real) and not any(
        map(is_sentence, ("polyp; ulcerative colitis", "capsule endoscopy", "3"))
    )
    assert is_sentence("No polyps are visible here") and is_sentence("It is red.")
    made = rows(10)
    assert is_free_form(made) and not is_free_form([{**row, "free_form": False} for row in made])
    assert not is_free_form([{**row, "candidates": ["a"]} for row in made])
    short = [{**row, "answer": "yes"} for row in made]
    assert not is_free_form(short) and is_free_form([{**row, "free_form": True} for row in short])
    assert score_free_form(short) == {}


def test_without_the_libraries_token_f1_is_scored_and_the_table_names_the_cure(monkeypatch):
    monkeypatch.setattr(free_form, "missing_libraries", lambda: list(free_form.LIBRARIES))
    scores = score_free_form(rows(10))
    assert scores["predict_token_f1"] > 0 and scores["predict_bleu"] is scores["predict_meteor"] is None
    assert any(
        "sacrebleu, rouge_score, nltk missing; pip install -r requirements-extra.txt" in line for line in table(scores)
    )


def test_a_library_is_not_missing_where_its_scores_are_kept(monkeypatch):
    kept = {"predict_rouge1": 0.5, "predict_rouge2": 0.5, "predict_rougeL": 0.5}
    monkeypatch.setattr(free_form, "missing_libraries", lambda: list(free_form.LIBRARIES))
    scores = score_free_form([{**row, free_form.KEPT: kept} for row in rows(10)])
    assert scores["predict_rougeL"] == 0.5 and scores["free_form_missing"] == ["sacrebleu", "nltk"]


def test_compare_shows_them_as_evaluate_does():
    made = rows(10)
    names = [name for name in vqa.compared_scores(made) if name in free_form.NAMES]
    assert names == free_form.NAMES
    assert vqa.compared_scores([{**row, "free_form": False} for row in made]).keys().isdisjoint(names)


def test_evaluate_adds_them_and_the_flag_decides_otherwise(tiny_models, tmp_path):
    run = tiny_run(tiny_models, "qwen3_vl")
    write_images(tmp_path, ["0.png", "1.png", "2.png"])
    samples = [{k: v for k, v in s.items() if k != "candidates"} | {"multi_label": False} for s in vqa_samples(3, 2)]
    for sample in samples:
        sample["answer"] = f"There is a {sample['answer']} thing in the image."
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.json").write_text(json.dumps(samples))
    (tmp_path / "out").mkdir()
    save_adapter(run.model(), tmp_path / "out")
    config = write_config(tmp_path, run.model_folder, template="plain")
    found = {}
    with short_answers(2):
        for flag in ("auto", "short"):
            code, out, err = run_script("evaluate.py", "--config", config, "--answers", flag)
            assert (code, err) == (0, "")
            scores = json.loads((tmp_path / "results/predict_results.json").read_text())
            found[flag] = "predict_token_f1" in scores, "predict_token_f1" in out
            assert scores["predict_accuracy"] == 0
    assert found == {"auto": (True, True), "short": (False, False)}
