"""evaluate.py leaves predictions and scores that agree with each other, and says plainly what it cannot do."""

import errno
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support.tiny_runs import REPO_ROOT, run_script, short_answers, tiny_run, vqa_samples, write_config, write_images

import compare
import evaluate
from checkpoint import save_adapter
from config import load_config, to_dict
from distributed import Ranks
from errors import UserError
from files import file_sha256
from inference import answer_split
from report import free_form
from report.results import read_run, task_named_by
from samples import load_samples
from tasks import click, cls, vqa


@pytest.fixture
def setup(tiny_models, tmp_path):
    """A folder with images, splits and a trained adapter; returns (folder, config path)."""
    run = tiny_run(tiny_models, "qwen3_vl")
    write_images(tmp_path, ["0.png", "1.png", "2.png"])
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.json").write_text(json.dumps(vqa_samples(3, 2)))
    (tmp_path / "out").mkdir()
    save_adapter(run.model(), tmp_path / "out")
    return tmp_path, write_config(tmp_path, run.model_folder)


def results(folder: Path) -> tuple[list[dict], dict, dict]:
    lines = (folder / "generated_predictions.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    rows = [json.loads(line) for line in lines]
    return rows, *(json.loads((folder / name).read_text()) for name in ("predict_results.json", "all_results.json"))


def test_answers_are_kept_where_scoring_fails_and_no_older_scores_stand_beside_them(setup, monkeypatch):
    folder, config = setup
    (folder / "results").mkdir()
    (folder / "results" / "predict_results.json").write_text("{}")

    def fail(*_):
        raise UserError("a stage file is being written")

    monkeypatch.setattr(vqa, "score", fail)
    with short_answers(), pytest.raises(UserError, match=r"being written; the answers are kept: .* --score-again"):
        evaluate.main(["--config", str(config)])
    assert (folder / "results" / "generated_predictions.jsonl").read_text().count("\n") == 6
    assert not (folder / "results" / "predict_results.json").exists()


def second_time_full(write):
    calls = iter([write])

    def write_once(path, text):
        if (first := next(calls, None)) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        first(path, text)

    return write_once


def test_kept_answers_are_scored_again_without_a_model_and_give_the_scores_of_a_whole_evaluation(setup, monkeypatch):
    folder, config = setup
    command = ["--config", str(config)]
    with short_answers():
        evaluate.main(command)
    _, whole, history = results(folder / "results")
    score = vqa.score
    for scoring_fails in (True, False):  # its answers alone are left; its scores are there too
        if scoring_fails:
            monkeypatch.setattr(vqa, "score", lambda *_: 1 / 0)
            with short_answers(), pytest.raises(ZeroDivisionError):
                evaluate.main(command)
            monkeypatch.setattr(vqa, "score", score)
            monkeypatch.setattr(evaluate, "load_trained", lambda *_: pytest.fail("weights were loaded"))
        evaluate.main([*command, "--score-again"])
        again, changing = results(folder / "results"), ("load_seconds", "predict_seconds", "predict_samples_per_second")
        assert again[1] == whole | {key: again[1][key] for key in changing} and again[1].keys() == whole.keys()
        assert again[2]["history"] == history["history"]
        assert not (folder / "results" / evaluate.FACTS).exists()
    evaluate.main([*command, "--score-again", "--answers", "sentences"])
    assert "predict_token_f1" in results(folder / "results")[1]
    path = folder / "results" / "generated_predictions.jsonl"
    rows = results(folder / "results")[0]
    scored = [row[free_form.KEPT] for row in rows]
    outdated = [
        {**row, free_form.KEPT: dict.fromkeys(scored[0], 9) | {"synonyms": free_form.has_synonyms()}} for row in rows
    ]
    path.write_text(evaluate.json_lines(outdated), encoding="utf-8")
    evaluate.main([*command, "--score-again"])
    assert [row[free_form.KEPT] for row in results(folder / "results")[0]] == scored
    monkeypatch.setattr(evaluate, "write_text", second_time_full(evaluate.write_text))
    with pytest.raises(UserError, match=r"Free some space and score again; the answers are kept: .* --score-again"):
        evaluate.main([*command, "--score-again"])
    with pytest.raises(
        UserError, match=r"predict_results\.json: missing; run evaluate\.py with --score-again for this"
    ):
        read_run(str(folder / "results"))


@pytest.mark.parametrize("task", ["click", "cls"])
def test_kept_clicks_and_classes_are_scored_again_as_well(setup, task):
    folder, config = setup
    samples = [vqa_samples(1, 1)[0] | {"id": str(n)} for n in range(12)]
    (folder / "test.json").write_text(json.dumps(samples))
    click_row = {"images": ["0.png"], "image_size": [60, 45], "question": "tap", "point": [30, 20], "correct": True}
    rows = {
        "click": [click_row | {"id": str(n), "predicted_point": [30, n], "prediction": "-"} for n in range(12)],
        "cls": [{"id": str(n), "images": [], "logits": [0, n - 4], "probabilities": [1 - n / 12, n / 12],
                 "predicted_label": int(n > 6), "true_label": n % 2, "cut_tokens": 0} for n in range(12)],
    }[task]  # fmt: skip
    (folder / "results").mkdir()
    (folder / "results/generated_predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = {"checkpoint": "base", "split": "test", "data_sha256": {"test": file_sha256(folder / "test.json")}}
    facts["answers_sha256"] = evaluate.answers_sha256(rows)
    (folder / "results" / evaluate.FACTS).write_text(json.dumps(facts))
    changes = ["task=click"] if task == "click" else ["task=cls", "num_labels=2", "template=paper_decision"]
    evaluate.main(["--config", str(config), "--score-again", *changes])
    expected = {"click": click, "cls": cls}[task].score(rows, load_config(config))
    found = results(folder / "results")[1]
    assert found.items() >= {key: value for key, value in expected.items() if value is not None}.items()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "val"], "no answers to score again; evaluate without --score-again"),
        (["data.test=train.json"], "its answers are to another file than"),
        (["--checkpoint", "base"], "its answers are those of .*out; evaluate without"),
        (["--predictions", "f.jsonl"], "--score-again is for answers in a results folder"),
    ],
)
def test_answers_that_are_not_those_of_the_command_are_not_scored_again(setup, monkeypatch, arguments, message):
    folder, config = setup
    monkeypatch.chdir(folder)
    (folder / "train.json").write_text(json.dumps(vqa_samples(3, 2)[:4]))
    (folder / "results").mkdir()
    (folder / "results" / "generated_predictions.jsonl").write_text("{}\n")
    facts = {"checkpoint": str(folder / "out"), "data_sha256": {"test": file_sha256(folder / "test.json")}}
    (folder / "results" / evaluate.FACTS).write_text(json.dumps(facts))
    with pytest.raises(UserError, match=message):
        evaluate.main(["--config", str(config), "--score-again", *arguments])


ROW = '{"id": "p0q0", "question": "?", "answer": "red", "prediction": "red"}\n'


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("{}\n", r"jsonl line 1: not a sample with an id; evaluate without"),
        ("[1]\n", r"jsonl line 1: not a sample with an id; evaluate without"),
        ('{"id": "p0q0", "question": "?"}\n', "sample 'p0q0' lacks answer, prediction; evaluate without"),
        (ROW + ROW, "line 2: id 'p0q0' is there twice"),
        (ROW, r"its answers are not one to each sample of .*test\.json; evaluate without"),
        ('{"id": 1, "probabilities": [1], "predicted_label": 0, "true_label": 0}\n', "are of task cls, not vqa; eval"),
    ],
)
def test_answers_that_are_not_one_to_each_sample_of_the_split_are_not_scored_again(setup, lines, message):
    folder, config = setup
    (folder / "results").mkdir()
    (folder / "results" / "generated_predictions.jsonl").write_text(lines)
    facts = {"checkpoint": "base", "data_sha256": {"test": file_sha256(folder / "test.json")}}
    (folder / "results" / "predict_results.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=message):
        evaluate.main(["--config", str(config), "--score-again"])


@pytest.fixture
def evaluated(setup):
    """A folder with answers of the adapter that are scored, and the command that scores them."""
    with short_answers():
        evaluate.main(["--config", str(setup[1])])
    return setup[0], ["--config", str(setup[1])]


def test_earlier_answers_are_not_scored_as_those_that_a_full_disk_kept_from_being_written(
    evaluated, monkeypatch, capsys
):
    folder, command = evaluated
    write = evaluate.write_text

    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(evaluate, "write_text", full)
    with short_answers(2), pytest.raises(UserError, match="Free some space and evaluate again"):
        evaluate.main([*command, "--checkpoint", "base"])
    assert evaluate.facts_file(folder / "results").name == evaluate.FACTS
    evaluate.say_what_is_replaced(folder / "results", str(folder / "out"), "checkpoint")
    assert "Replacing the results of base" in capsys.readouterr().out, "answers without scores are hours of work, too"
    monkeypatch.setattr(evaluate, "write_text", write)
    with pytest.raises(UserError, match=r"are not those that answered_with\.json speaks of; evaluate without"):
        evaluate.main([*command, "--score-again"])


def test_predictions_scores_and_history_are_written_and_agree(setup):
    folder, config = setup
    history = [{"step": 2, "loss": 3.0}, {"step": 2, "eval_loss": 2.5}, {"step": 4, "eval_loss": 2.25}]
    cut = '{"step": 5, "eval_lo'  # the last line of a run that was killed
    (folder / "out" / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history) + cut)
    with short_answers():
        code, out, err = run_script("evaluate.py", "--config", config)
    assert (code, err) == (0, "")
    rows, scores, everything = results(folder / "results")
    assert [row["id"] for row in rows] == [sample["id"] for sample in vqa_samples(3, 2)]
    assert scores["predict_samples"] == 6 and scores["split"] == "test" and scores["image"] == "shown"
    assert scores["predict_accuracy"] == sum(row["correct"] for row in rows) / 6
    low, high = scores["predict_accuracy_ci"]
    assert low <= scores["predict_accuracy"] <= high
    assert scores["cut_off"] == sum(row["cut_off"] for row in rows)
    assert everything == {"history": history[1:], "final": scores}
    assert "predict_accuracy" in out and "95 % interval" in out and "majority_accuracy" in out
    assert f"{scores['outside_candidates']} of 6 answers" in out and str(folder / "results") in out
    assert torch.is_grad_enabled(), "whoever calls it keeps gradients"


def test_results_record_what_they_were_made_with(setup):
    """The config as it was trained, which an override at training time may have changed, and that of the evaluation."""
    folder, config = setup
    evaluated = to_dict(load_config(config))
    trained = evaluated | {"seed": 7, "learning_rate": 0.5}
    (folder / "out" / "config.yaml").write_text(yaml.safe_dump(trained))
    (folder / "out" / "checkpoint-9").mkdir()
    (folder / "out" / "checkpoint-9" / "trainer_state.json").write_text('{"global_batch": 64}')
    with short_answers(2):
        assert run_script("evaluate.py", "--config", config)[0] == 0
    scores = results(folder / "results")[1]
    assert scores["trained_config"] == trained and scores["config"] == evaluated and scores["seed"] == 7
    assert scores["questions_per_step"] == 64
    hashes = {name: file_sha256(folder / f"{name}.json") for name in ("train", "test")}
    assert scores["data_sha256"] == hashes
    with short_answers(2):
        code, _, _ = run_script("evaluate.py", "--config", config, "data.train=null", f"results_dir={folder / 'only'}")
    assert code == 0 and results(folder / "only")[1]["data_sha256"] == hashes, "of the run, not of the config that asks"
    before = scores["adapter_sha256"]
    weights = folder / "out" / "adapter_model.safetensors"
    changed = {name: tensor + 1 for name, tensor in load_file(weights).items()}
    save_file(changed, weights, metadata={"format": "pt"})
    (folder / "out" / "config.yaml").unlink()
    with short_answers(2):
        assert run_script("evaluate.py", "--config", config)[0] == 0
    scores = results(folder / "results")[1]
    assert len(before) == 64 and scores["adapter_sha256"] != before
    assert scores["trained_config"] is None and scores["seed"] is None, "weights that came from elsewhere"
    assert scores["data_sha256"]["train"] is None


def test_the_baseline_and_other_splits_have_results_folders_of_their_own(setup):
    folder, config = setup
    with short_answers(2):
        for arguments, name in (
            (["--split", "val"], "results_val"),
            (["image=none"], "results_question_only"),
            (["--split", "val", "image=none"], "results_val_question_only"),
        ):
            assert run_script("evaluate.py", "--config", config, *arguments)[0] == 0
            _, scores, _ = results(folder / name)
            assert scores["image"] == ("none" if "question_only" in name else "shown")
    assert not (folder / "results").exists()


def test_the_training_file_as_test_split_is_warned_of_and_recorded(setup):
    folder, config = setup
    other = vqa_samples(3, 2)[:3]
    found = []
    for samples in (vqa_samples(3, 2), other):
        (folder / "test.json").write_text(json.dumps(samples))
        with short_answers(2):
            _, out, _ = run_script("evaluate.py", "--config", config)
        scores = results(folder / "results")[1]
        found.append((out.count("WARNING: test is the file that training reads"), scores["split_is_training_file"]))
    assert found == [(1, True), (0, False)]


def test_the_base_a_checkpoint_and_the_final_adapter_can_be_evaluated_and_differ(setup):
    folder, config = setup
    (folder / "out").rename(folder / "checkpoint-7")
    predictions = {}
    with short_answers():
        for name, arguments in {"base": ["base"], "adapter": [folder / "checkpoint-7"]}.items():
            code, out, err = run_script("evaluate.py", "--config", config, "--checkpoint", *arguments)
            assert code == 0, err
            assert ("Replacing the results of base in" in out) == (name == "adapter")
            predictions[name] = [row["prediction"] for row in results(folder / "results")[0]]
    assert predictions["base"] != predictions["adapter"]


def test_the_adapter_answers_as_the_model_it_was_saved_from(setup, tiny_models):
    folder, config = setup
    run = tiny_run(tiny_models, "qwen3_vl")
    with short_answers():
        run_script("evaluate.py", "--config", config)
        samples = load_samples(folder / "test.json")
        expected = answer_split(run.model(), samples, run.encoder(), Ranks(0, 1, torch.device("cpu")))
    assert results(folder / "results")[0] == expected


def test_a_test_only_benchmark_is_scored_by_group_with_the_base_and_no_training_file(
    tiny_models, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path, ["0.png", "1.png", "2.png"], size=(96, 64))
    rows = [
        {"img_filename": f"{number % 3}.png", "bbox": [number, 2, 30, 40], "instruction": f"open {number}",
         "data_type": ("icon", "text")[number % 2], "data_source": ("ios", "android")[number < 3]}
        for number in range(6)
    ]  # fmt: skip
    (tmp_path / "spot.json").write_text(json.dumps(rows))
    code, _, err = run_script(
        *("prepare_data.py", "click", "--source", "spot.json", "--out", "data", "--split", "0/0/100"),
        *("--boxes", "xywh", "--config", "spot.yaml", "--model-name", tiny_models["qwen3_vl"]),
    )
    assert (code, err) == (0, "")
    with short_answers(2):
        code, out, err = run_script("evaluate.py", "--config", "spot.yaml", "--checkpoint", "base")
    assert (code, err) == (0, "")
    scored, scores, _ = results(tmp_path / "results/spot")
    assert scores["predict_samples"] == 6 and scores["checkpoint"] == "base" and not scores["split_is_training_file"]
    for name, number in {"data_type_icon": 3, "platform_ios": 3, "ios_text": 2, "android_icon": 2}.items():
        of_group = [row["correct"] for row in scored if name.removeprefix("data_type_").removeprefix("platform_") in
                    (row["data_type"], row["platform"], f"{row['platform']}_{row['data_type']}")]  # fmt: skip
        assert len(of_group) == number and scores[f"predict_accuracy_{name}"] == sum(of_group) / number
        assert f"predict_accuracy_{name}" in out
    code, _, err = run_script("train.py", "--config", "spot.yaml")
    assert code == 2 and "key 'data.train' is not set" in err


def test_nothing_to_evaluate_is_an_error_that_says_what_to_do(setup):
    folder, config = setup
    for arguments in ([f"output_dir={folder}/none"], ["--checkpoint", folder / "none"]):
        code, _, err = run_script("evaluate.py", "--config", config, *arguments)
        assert code == 2 and err.count("\n") == 1 and "train first, or give --checkpoint" in err
    code, _, err = run_script("evaluate.py", "--config", config, f"data.test={folder}/none.json")
    assert code == 2 and "data.test: the file" in err
    assert not (folder / "results").exists()


def test_the_table_shows_percent_with_intervals_and_warns_of_answers_without_an_end():
    lines = evaluate.table(
        {
            "predict_accuracy": 0.5,
            "predict_accuracy_ci": [0.25, 0.75],
            "predict_f1": None,
            "predict_f1_ci": None,
            "outside_candidates": 3,
            "predict_samples": 8,
            "cut_off": 2,
        }
    )
    assert [" ".join(line.split()) for line in lines] == [
        "predict_accuracy 50.0 % 95 % interval 25.0 to 75.0",
        "outside_candidates 3 of 8 answers",
        "cut_off 2 answers without an end; is the model trained?",
    ]


def test_the_usual_command_comes_first_in_the_help():
    for script in ("train.py", "evaluate.py"):
        code, out, _ = run_script(script, "--help")
        assert code == 0 and f"{script} --config configs/exp2.yaml" in out
        first_line = (REPO_ROOT / script).read_text().splitlines()[0]
        assert first_line.startswith('"""') and f"{script} --config configs/exp2.yaml" in first_line


# ------------------------------------------------------------------------------------------- answers of another program


def write_predictions(path, samples, wrong=()):
    """The gold answers, but for some ids."""
    lines = [{"id": s["id"], "prediction": "nonsense" if s["id"] in wrong else s["answer"]} for s in samples]
    path.write_text("".join(json.dumps(line) + "\n" for line in reversed(lines)))


def test_answers_of_another_program_are_scored_without_a_model_and_compared_with_ours(setup, monkeypatch, capsys):
    folder, config = setup
    with short_answers(2):
        run_script("evaluate.py", "--config", config)
    monkeypatch.setattr(evaluate, "load_trained", lambda *_: pytest.fail("weights were loaded"))
    monkeypatch.setattr(evaluate, "open_encoder", lambda *_: pytest.fail("a tokenizer was loaded"))
    write_predictions(folder / "served.jsonl", vqa_samples(3, 2), wrong=("p0q0", "p2q1"))
    evaluate.main(["--config", str(config), "--predictions", str(folder / "served.jsonl")])
    rows, scores, everything = results(folder / "results_predictions_served")
    assert [row["id"] for row in rows] == [sample["id"] for sample in vqa_samples(3, 2)]
    assert scores["predict_accuracy"] == 4 / 6 and scores["majority_accuracy"] is not None
    assert scores["predictions"] == str(folder / "served.jsonl") and scores["checkpoint"] is None
    assert everything == {"history": [], "final": scores}
    assert "made elsewhere: test, 6 samples" in capsys.readouterr().out
    out = folder / "compared"
    compare.main([str(folder / "results"), str(folder / "results_predictions_served"), "--out", str(out)])
    names = [experiment["name"] for experiment in json.loads((out / "compare.json").read_text())["experiments"]]
    assert names == ["results", "results_predictions_served"]
    assert "results_predictions_served" in (out / "compare.md").read_text()


def test_missing_extra_and_repeated_ids_are_refused_with_their_counts(setup):
    folder, config = setup
    path = folder / "served.jsonl"
    write_predictions(path, vqa_samples(3, 2))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:4], lines[0], lines[1], '{"id": 7, "prediction": "red"}\n']))
    code, _, err = run_script("evaluate.py", "--config", config, "--predictions", path)
    assert code == 2 and err.count("\n") == 1
    for told in ("2 id(s) have no line (p0q0, p0q1)", "1 id(s) are no sample's (7)",
                 "2 id(s) are there more than once (p2q1, p2q0)"):  # fmt: skip
        assert told in err
    assert not (folder / "results_predictions_served").exists()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"id": "p0q0"}', "line 1: no object with 'id' and 'prediction'"),
        ('{"id": "p0q0", "prediction": null}', "line 1 (id p0q0): key 'prediction' is 'None' but must be a text"),
        ("[1]", "line 1: no object"),
    ],
)
def test_a_prediction_that_is_none_is_named_by_file_and_line(setup, line, told):
    folder, config = setup
    (folder / "served.jsonl").write_text(line + "\n")
    code, _, err = run_script("evaluate.py", "--config", config, "--predictions", folder / "served.jsonl")
    assert code == 2 and f"served.jsonl {told}" in err


def test_every_task_takes_predictions_in_the_forms_that_it_knows(tiny_models):
    config = replace(tiny_run(tiny_models, "qwen3_vl").config, num_labels=2)
    assert vqa.output_of(" polyp; ulcer\n", config) == ("polyp; ulcer", True)
    assert vqa.output_of(3, config) == ("3", True)
    assert click.output_of([3, 4.5], config) == ([3, 4.5], True)
    assert click.output_of("[3, 4]", config) == ("[3, 4]", True)
    logits, cut = cls.output_of([0.25, 0.75], config)
    assert [math.exp(value) for value in logits] == pytest.approx([0.25, 0.75]) and cut == 0
    bad = [(vqa, [1]), (click, [1, 2, 3]), (cls, 1), (cls, [0.5, 0.2]), (cls, [-1, 2]), (cls, [0.2, 0.3, 0.5])]
    for task, prediction in bad:
        with pytest.raises(UserError, match="key 'prediction' is"):
            task.output_of(prediction, config)


def test_a_click_in_pixels_and_one_in_words_are_the_same_click(tiny_models):
    run = tiny_run(tiny_models, "qwen3_vl")
    sample = {"id": "a", "image": "0.png", "instruction": "tap", "point": [30, 20]}  # 60 × 45 pixels
    encoder = run.encoder(task="click", resize="native", image_size=None, max_pixels=64 * 64, template="plain")
    words = click.row(sample, encoder, click.output_of("[500, 400]", encoder.config))
    pixels = click.row(sample, encoder, click.output_of(words["predicted_point"], encoder.config))
    assert pixels["predicted_point"] == words["predicted_point"] and pixels["correct"] == words["correct"]
    assert task_named_by(words, "results") == "click", "compare.py would score it as words"
