"""predict.py: one image, one prompt, one answer; and clicks from training to the mark on the image."""

import functools
import hashlib
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import shared_data
from PIL import Image
from support import click_runs, tiny_runs

import dataset
import evaluate
import predict
import prepare_data
import tasks
import train
from config import load_config
from errors import UserError

FAMILIES = tiny_runs.FAMILIES
POINT = re.compile(r"^Point: (\d+), (\d+) in pixels of the image \((\d+)×(\d+)\)$", re.M)


@pytest.fixture
def run(tiny_models):
    """Folder of a trained and evaluated click run; read it, never write into it."""
    return click_runs.click_run(tiny_models, "qwen3_vl")


def ask(capsys, *arguments):
    """What `python predict.py ARGUMENTS` prints."""
    capsys.readouterr()
    predict.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def red(run, adapter="out"):
    return ["--adapter-path", run / adapter, "--image", run / "red.png", "--prompt", "click the red button"]


# ------------------------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize("family", FAMILIES)
def test_a_learnt_click_is_answered_in_pixels_of_the_original_by_every_family(tiny_models, capsys, family):
    run = click_runs.click_run(tiny_models, family)
    for line in click_runs.predictions(run):
        assert line["correct"], line
        printed = ask(capsys, "--adapter-path", run / "out", "--image", run / line["images"][0],
                      "--prompt", line["instruction"])  # fmt: skip
        assert f"Answer: {line['prediction']}\n" in printed
        x, y, width, height = map(int, POINT.search(printed).groups())
        assert [width, height] == line["image_size"]
        assert line["bbox"][0] <= x <= line["bbox"][2] and line["bbox"][1] <= y <= line["bbox"][3]
        assert re.search(r"^Loaded in \d+\.\d s, answered in \d+\.\d\d s on cpu$", printed, re.M)


def test_an_output_folder_a_checkpoint_and_a_copied_checkpoint_give_the_same_answer(run, capsys, tmp_path):
    (checkpoint,) = run.glob("out/checkpoint-*")
    copy = shutil.copytree(checkpoint, tmp_path / "elsewhere")
    answers = set()
    for folder in (run / "out", checkpoint, copy):
        printed = ask(capsys, "--adapter-path", folder, *red(run)[2:])
        answers.add(printed[: printed.index("Loaded in")])
    assert len(answers) == 1 and "Point: " in answers.pop()


def test_an_adapter_folder_without_a_config_says_that_it_needs_one(run, capsys, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run / "out" / name, tmp_path / name)
    arguments = ["--adapter-path", tmp_path, *red(run)[2:]]
    with pytest.raises(UserError, match="--config FILE"):
        ask(capsys, *arguments)
    assert POINT.search(ask(capsys, *arguments, "--config", run / "run.yaml"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "nowhere.png"], "nowhere.png does not exist"),
        (["--image", "https://example.org/x.png"], "x.png is an address, and only files are read"),
        (["--adapter-path", "nowhere"], "nowhere is no folder"),
        (["--draw", "mark.txt"], "ends with .png"),
        (["image_size=256"], "image_size 128, here 256"),
        (["max_tokens=5"], "exceed max_tokens"),
        (["--draw", f"{__file__}/mark.png"], "--draw .*test_predict.py is no folder"),
    ],
)
def test_a_mistake_is_one_line_and_costs_no_loading_of_weights(run, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(predict, "load_trained", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=message):
        ask(capsys, *red(run), *arguments)


def test_a_trained_question_is_answered_and_needs_the_candidates_it_was_trained_with(tiny_models, capsys, tmp_path):
    samples = tiny_runs.vqa_samples(images=1, questions=2)
    tiny_runs.write_images(tmp_path, ["0.png"])
    (tmp_path / "all.json").write_text(json.dumps(samples))
    config = click_runs.write_config(tmp_path, tiny_models["qwen3_vl"], "qwen3_vl", task="vqa",
                                     template="ultra_condensed", num_train_epochs=30)  # fmt: skip
    train.main(["--config", str(config)])
    arguments = ["--adapter-path", tmp_path / "out", "--image", tmp_path / "0.png"]
    for sample in samples:
        printed = ask(capsys, *arguments, "--prompt", sample["question"], "--candidates", "red; blue; green; none")
        assert printed.splitlines()[0] == f"Answer: {sample['answer']}"
        assert "Point" not in printed
        found = ask(capsys, *arguments, "--prompt", sample["question"])
        assert found.startswith(f"Candidates, as in {tmp_path / 'all.json'}: red; blue; green; none\nAnswer: ")
        assert f"Answer: {sample['answer']}\n" in found, "those of the run's data, where none are given"
    assert "asks no such question with candidates. Give them with --candidates" in ask(
        capsys, *arguments, "--prompt", "?"
    )
    with pytest.raises(UserError, match="--draw marks clicks, and this model's task is 'vqa'"):
        ask(capsys, *arguments, "--prompt", "?", "--draw", tmp_path / "mark.png")


def test_a_model_of_conversations_answers_a_single_question(tiny_models, capsys, tmp_path):
    (tmp_path / "all.json").write_text(json.dumps(tiny_runs.vqa_samples(images=1, questions=2)))
    tiny_runs.write_images(tmp_path, ["0.png"])
    config = click_runs.write_config(tmp_path, tiny_models["qwen3_vl"], "qwen3_vl", task="vqa",
                                     template="sequential_cot", num_train_epochs=1)  # fmt: skip
    train.main(["--config", str(config)])
    arguments = ["--adapter-path", tmp_path / "out", "--image", tmp_path / "0.png", "--prompt", "What is it?"]
    assert "\nAnswer: " in ask(capsys, *arguments)


@pytest.mark.parametrize("system", [None, "Answer in one word."])
@pytest.mark.parametrize("gap", ["", "\n"])
def test_a_run_on_conversations_is_asked_with_their_system_turn_and_layout(tiny_models, capsys, tmp_path, system, gap):
    run = tiny_runs.tiny_run(tiny_models, "qwen3_vl")
    turns = [{"from": "human", "value": f"<image>{gap}What is it?"}, {"from": "gpt", "value": "a polyp"}]
    trained = {"id": "a", "image": "0.png", "conversations": turns, **({"system": system} if system else {})}
    (tmp_path / "train.json").write_text(json.dumps([trained]))
    data = replace(run.config.data, train=str(tmp_path / "train.json"))
    config = replace(run.config, template="ultra_condensed", data=data)
    asked = {"id": "b", "image": "0.png"}
    asked |= tasks.vqa.sample_to_predict([run.folder / "0.png"], "What is it?", [], config)
    encoder = run.encoder(template="ultra_condensed")
    images = [encoder.load_image("0.png")]
    prompts = [encoder.encode(sample, images, generation=True).input_ids.tolist() for sample in (trained, asked)]
    assert prompts[0] == prompts[1]
    assert (repr(system) if system else "no system turn") in capsys.readouterr().out
    with pytest.raises(UserError, match="--candidates has no place"):
        tasks.vqa.sample_to_predict([run.folder / "0.png"], "What is it?", ["a"], config)


# --------------------------------------------------------------------------------------------------------------- marks


def test_draw_marks_the_point_and_leaves_the_rest_of_the_image(run, capsys, tmp_path):
    drawn = tmp_path / "new" / "mark.png"
    printed = ask(capsys, *red(run), "--draw", drawn)
    assert f"Drawn in {drawn}" in printed
    x, y, *_ = map(int, POINT.search(printed).groups())
    before = np.asarray(Image.open(run / "red.png").convert("RGB")).astype(int)
    after = np.asarray(Image.open(drawn)).astype(int)
    assert before.shape == after.shape
    rows, columns = np.nonzero((before != after).any(-1))
    assert abs(columns.mean() - x) < 2 and abs(rows.mean() - y) < 2  # the mark is centred on the point
    assert np.ptp(columns) < 60 and np.ptp(rows) < 60


@pytest.mark.parametrize("point", [(0, 0), (299.99, 0), (300, 200), (150, 100)])
@pytest.mark.parametrize("background", ["black", "white", "#e0352b"])
def test_a_mark_is_visible_on_any_background_and_at_any_edge(background, point):
    before = Image.new("RGB", (300, 200), background)
    after = predict.draw_point(before, point)
    assert after.size == before.size
    assert (np.abs(np.asarray(before).astype(int) - np.asarray(after)).sum(-1) > 150).sum() > 20


def test_the_ring_leaves_its_target_free():
    before = Image.effect_noise((720, 1280), 90).convert("RGB")
    x, y = 300.4, 700.7
    after = predict.draw_point(before, (x, y))
    changed = np.argwhere((np.asarray(before) != np.asarray(after)).any(-1))  # (row, column)
    distances = np.hypot(changed[:, 0] + 0.5 - y, changed[:, 1] + 0.5 - x)
    assert 60 < distances.min() < 75 and distances.max() < 120


@pytest.mark.parametrize(("point", "pixel"), [([300.0, 200.0], "299, 199"), ([0.0, 99.99], "0, 99")])
def test_a_point_on_the_far_edge_is_printed_as_the_last_pixel(point, pixel):
    row = {"prediction": "", "cut_off": False, "predicted_point": point, "image_size": [300, 200]}
    assert tasks.click.describe(row)[1].startswith(f"Point: {pixel} in pixels")


def test_an_answer_without_a_point_is_said_nothing_is_drawn_and_the_exit_code_tells(run, capsys, monkeypatch, tmp_path):
    line = {"prediction": "I see no button", "cut_off": True, "predicted_point": None, "image_size": [300, 200]}
    monkeypatch.setattr(predict, "predict_split", lambda *_: [line])
    with pytest.raises(SystemExit) as end:
        ask(capsys, *red(run), "--draw", tmp_path / "mark.png")
    assert end.value.code == 1
    printed = capsys.readouterr().out
    assert "Answer: I see no button ... (cut off)" in printed and "Point: none" in printed
    assert not (tmp_path / "mark.png").exists()


# ------------------------------------------------------------------------------------- the run that predict.py goes by


def test_evaluation_scores_clicks_by_target_size_and_draws_the_worst_misses(run):
    scores = json.loads((run / "results" / "predict_results.json").read_text())
    assert scores["predict_accuracy"] == 1.0 and scores["predict_samples"] == scores["boxes_known"] == 3
    assert scores["unparsable"] == 0 and scores["task"] == "click"
    for size in ("small", "medium", "large"):
        assert f"predict_accuracy_{size}" in scores
    with Image.open(run / "results" / "worst_misses.png") as sheet:
        assert sheet.width > 300
    for line in click_runs.predictions(run):
        assert {"id", "images", "question", "answer", "prediction", "correct", "point", "predicted_point",
                "image_size", "bbox", "instruction", "cut_off"} <= line.keys()  # fmt: skip


def test_the_question_only_baseline_of_clicks_sees_no_image_and_still_speaks_its_pixels(run, tmp_path):
    config = run / "run.yaml"
    evaluate.main(["--config", str(config), "image=none", f"results_dir={tmp_path / 'blind'}"])
    text = (tmp_path / "blind_question_only" / "generated_predictions.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["image_size"] for line in lines] == [line["image_size"] for line in click_runs.predictions(run)]


def test_the_convention_lies_beside_the_weights_of_checkpoints_and_of_the_final_adapter(run):
    (checkpoint,) = run.glob("out/checkpoint-*")
    kept = {(folder / "coordinates.json").read_text() for folder in (run / "out", checkpoint)}
    assert len(kept) == 1
    assert json.loads(kept.pop()) == {
        "coordinates": "0 to 1000 of the image the model sees",
        "resize": "letterbox",
        "image_size": 128,
        "template": "plain",
    }
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert "coordinates.json" in state["files"]


def test_an_evaluation_or_a_start_under_another_convention_is_refused(run, tiny_models, tmp_path):
    config = str(run / "run.yaml")
    with pytest.raises(UserError, match="image_size 128, here 160"):
        evaluate.main(["--config", config, "image_size=160"])
    with pytest.raises(UserError, match="image_size 128, here 160"):
        train.main(["--config", config, f"init_adapter={run / 'out'}", f"output_dir={tmp_path}", "image_size=160"])
    other = tiny_models["qwen2_5_vl"]
    with pytest.raises(UserError, match="here 'pixels of the image"):
        evaluate.main(["--config", config, f"model_name={other}", "image_size=112", f"output_dir={run / 'out'}"])


def test_a_resume_under_another_convention_is_refused(run, tmp_path):
    folder = shutil.copytree(run / "out", tmp_path / "out")
    (checkpoint,) = folder.glob("checkpoint-*")
    record = checkpoint / "coordinates.json"
    record.write_text(record.read_text().replace("1000", "0999"))
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state["sha256"]["coordinates.json"] = hashlib.sha256(record.read_bytes()).hexdigest()  # else it is not used at all
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"0 to 0999 .* here '0 to 1000"):
        train.main(["--config", str(run / "run.yaml"), f"output_dir={folder}"])


def test_bad_points_are_found_before_training_and_named_by_file_and_row(run, tiny_models, tmp_path):
    samples = click_runs.write_screens(tmp_path / "data")
    samples[1]["point"] = [121, 5]
    del samples[1]["bbox"]
    samples[2]["image_size"] = "?"
    (tmp_path / "data" / "all.json").write_text(json.dumps(samples))
    config = click_runs.write_config(tmp_path / "data", tiny_models["qwen3_vl"], "qwen3_vl")
    with pytest.raises(UserError) as error:
        train.main(["--config", str(config)])
    assert re.search(r"all\.json row 2 \(id green\): point \[121, 5\] lies outside", str(error.value))
    assert "row 3 (id blue): key 'image_size' is '?'" in str(error.value)


@pytest.mark.parametrize("rank", [16, 32, 64])
def test_the_click_experiments_take_64_clicks_a_step_with_alpha_twice_the_rank_and_else_differ_in_length_alone(rank):
    config = load_config(tiny_runs.REPO_ROOT / f"configs/click_rank{rank}.yaml")
    assert (config.lora.r, config.lora.alpha) == (rank, 2 * rank)
    length = ("num_train_epochs", "train_bs", "grad_accum", "save_steps", "max_samples")
    expected = [2.5, 2, 4, 500, 100_000] if rank == 64 else [1, 4, 2, 200, None]
    assert [getattr(config, key) for key in length] == expected
    reference = load_config(
        tiny_runs.REPO_ROOT / "configs/click_rank16.yaml",
        [f"{key}={getattr(config, key) or ''}" for key in ("output_dir", "results_dir", *length)]
        + [f"experiment='{config.experiment}'", f"lora.r={rank}", f"lora.alpha={2 * rank}"],
    )
    assert config == reference


# ----------------------------------------------------------------------------------------------- the real screenshots


@pytest.fixture
def decoded_once(monkeypatch):
    """Training for many epochs on a few large images is mostly decoding: each is decoded once."""
    load = dataset.SampleEncoder.load_image
    cached = functools.cache(lambda path, root, resize, size, encoder: load(encoder, path))

    def load_image(self, path):
        config = self.config
        return cached(path, config.data.image_root, config.resize, config.image_size or config.max_pixels, self)

    monkeypatch.setattr(dataset.SampleEncoder, "load_image", load_image)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "resize"),
    [
        ("qwen3_vl", {"resize": "letterbox", "image_size": 128}),
        ("qwen2_5_vl", {"resize": "native", "image_size": None, "max_pixels": 24 * 28 * 28}),
    ],
)
def test_forty_real_screenshots_are_learnt_by_heart_and_the_mark_sits_on_the_right_card(
    tiny_models, capsys, tmp_path, decoded_once, family, resize
):
    folder = shared_data("gui/number-game")
    cards = json.loads((folder / "layout.json").read_text())["cards_bbox_xyxy_px"]
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    source = tmp_path / "source.jsonl"
    source.write_text("".join(json.dumps({**row, "bbox": cards[row["clicked_index"]]}) + "\n" for row in rows))
    prepare_data.main(["click", "--source", str(source), "--image-root", str(folder), "--out", str(tmp_path / "data"),
                       "--split", "100/0/0"])  # fmt: skip
    model = tiny_models.build(family, hidden_size=128, intermediate_size=256)
    data = dict.fromkeys(("train", "val", "test"), str(tmp_path / "data" / "train.json")) | {"image_root": str(folder)}
    config = click_runs.write_config(tmp_path, model, family, data=data, lora={"r": 64, "alpha": 128, "dropout": 0.0},
                                     learning_rate=3e-3, num_train_epochs=90, train_bs=20, order="random",
                                     warmup_steps=5, **resize)  # fmt: skip
    train.main(["--config", str(config)])
    evaluate.main(["--config", str(config)])
    scores = json.loads((tmp_path / "results" / "predict_results.json").read_text())
    assert scores["boxes_known"] == scores["predict_samples"] == 40
    assert scores["predict_accuracy"] >= 0.9

    right = {line["id"] for line in click_runs.predictions(tmp_path) if line["correct"]}
    row = next(
        row for row in rows if row["clicked_index"] == row["answer_index"] and row["image"].split("/")[1][:-4] in right
    )
    drawn = tmp_path / "mark.png"
    printed = ask(capsys, "--adapter-path", tmp_path / "out", "--image", folder / row["image"],
                  "--prompt", row["problem"].removeprefix("<image>"), "--draw", drawn)  # fmt: skip
    before = np.asarray(Image.open(folder / row["image"]).convert("RGB")).astype(int)
    ys, xs = np.nonzero((before != np.asarray(Image.open(drawn))).any(-1))
    left, top, rightmost, bottom = cards[row["answer_index"]]
    assert left <= xs.mean() <= rightmost and top <= ys.mean() <= bottom
    x, y, *_ = map(int, POINT.search(printed).groups())
    assert abs(xs.mean() - x) < 3 and abs(ys.mean() - y) < 3
