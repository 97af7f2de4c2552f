"""The majority baseline of a run is that of what its questions were trained on."""

import json
from types import SimpleNamespace

from conftest import REPO_ROOT

from config import load_config
from report.baseline import majority_answers_for, stage_files
from report.metrics import majority_answers, score_vqa
from tasks import vqa

TRAIN = [  # stage, question, answer
    (1, "Is there text?", "no"),
    (2, "How many polyps?", "1"),
    (1, "Is there text?", "yes"),
    (3, "Was it removed?", "yes"),
    (2, "How many polyps?", "2"),
    (1, "Is there text?", "yes"),
    (2, "How many polyps?", "2"),
]


def samples_of(stages):
    return [{"question": q, "answer": a} for stage in stages for s, q, a in TRAIN if s == stage]


def write_stages(folder, stages=(1, 2, 3)):
    folder.mkdir(exist_ok=True)
    for stage in stages:
        (folder / f"train_stage{stage}.json").write_text(json.dumps(samples_of([stage])))
    (folder / "val_stage1.json").write_text(json.dumps([{"question": "Is there text?", "answer": "no"}] * 9))
    return folder


def config_of(train, max_samples=None):
    return SimpleNamespace(data=SimpleNamespace(train=str(train)), max_samples=max_samples)


def test_the_baseline_of_each_stage_of_exp4_is_that_of_all_three_training_files(tmp_path):
    write_stages(tmp_path)
    rows = [
        {"id": str(n), "question": q, "answer": a, "prediction": "-", "group": str(n)}
        for n, (_, q, a) in enumerate(TRAIN)
    ]
    whole = score_vqa(rows, majority_answers(samples_of((1, 2, 3))))
    for stage in (1, 2, 3):
        named = load_config(REPO_ROOT / "configs" / f"exp4_stage{stage}.yaml").data.train.rsplit("/", 1)[1]
        found = vqa.score(rows, config_of(tmp_path / named))
        assert found == whole and found["majority_accuracy"] == 5 / 7 and found["majority_unseen"] == 0


def test_a_run_whose_own_file_has_every_question_is_measured_by_that_file_alone(tmp_path):
    write_stages(tmp_path)
    (tmp_path / "train.json").write_text(json.dumps(samples_of((1, 2))))
    (tmp_path / "train_stage2.json").write_text(json.dumps([{"question": "Is there text?", "answer": "no"}]))
    assert majority_answers_for({"Is there text?"}, config_of(tmp_path / "train_stage1.json")) == {
        "Is there text?": "yes"
    }
    assert "Was it removed?" not in majority_answers_for({"Was it removed?"}, config_of(tmp_path / "train.json"))


def test_stages_are_joined_in_their_order_and_as_far_as_training_reads_them(tmp_path):
    write_stages(tmp_path)
    (tmp_path / "train_stage10.json").write_text("[]")
    files = stage_files(tmp_path / "train_stage3.json")
    assert [file.name for file in files] == [f"train_stage{stage}.json" for stage in (1, 2, 3, 10)]
    (tmp_path / "train_stage10.json").unlink()
    first = majority_answers_for({"How many polyps?"}, config_of(tmp_path / "train_stage3.json", max_samples=1))
    assert first == {"Is there text?": "no", "How many polyps?": "1", "Was it removed?": "yes"}


def test_questions_that_training_never_asks_are_counted(tmp_path):
    write_stages(tmp_path, stages=(1,))
    rows = [
        {"id": q, "question": q, "answer": "yes", "prediction": "yes"} for q in ("Is there text?", "New?", "Newer?")
    ]
    majority = majority_answers_for({row["question"] for row in rows}, config_of(tmp_path / "train_stage1.json"))
    scores = score_vqa(rows, majority)
    assert (scores["majority_unseen"], scores["majority_accuracy"]) == (2, 1 / 3)
    assert score_vqa(rows, {})["majority_unseen"] is None


def test_a_set_without_training_data_has_no_majority_baseline():
    config = SimpleNamespace(data=SimpleNamespace(train=None), max_samples=None)
    rows = [{"id": "1", "question": "Q?", "answer": "a", "prediction": "a", "group": "1"}]
    scores = vqa.score(rows, config)
    assert scores["predict_accuracy"] == 1 and scores["majority_accuracy"] is None is scores["majority_unseen"]
