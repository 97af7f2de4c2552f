"""`prepare_data.py kvasir-x1`: parquet as published, images found by id, a split of images and the published one."""

import json
from pathlib import Path

import pytest
from support.tiny_runs import run_script, short_answers, write_images

import prepare_data
from config import load_config
from errors import UserError

SPLITS = ("train", "val", "test")
datasets = pytest.importorskip("datasets")


def write_x1(folder, images=10, first="a"):
    """The published form: parquet files by part, each image with questions in both."""
    ids = [f"{first}{number}" for number in range(images)]
    write_images(folder / "kvasir/images", [f"{img_id}.jpg" for img_id in ids])
    (folder / "x1/data").mkdir(parents=True)
    for part, numbers in (("train", range(5)), ("test", range(5, 6))):
        rows = [
            {"img_id": img_id, "complexity": 1 + number % 3, "question": f"Please describe finding {number}?",
             "answer": f"There is no finding {number} in image {img_id}.", "original": "[]",
             "question_class": ["finding count"]}
            for img_id in ids for number in numbers
        ]  # fmt: skip
        datasets.Dataset.from_list(rows).to_parquet(str(folder / f"x1/data/{part}-00000-of-00001.parquet"))
    return folder


@pytest.fixture
def published(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_x1(tmp_path)


def prepare(*options, out="data/x1"):
    prepare_data.main(["kvasir-x1", "--source", "x1", "--images", "kvasir", "--out", out, *map(str, options)])
    by_split = {name: json.loads(Path(out, f"{name}.json").read_text()) for name in SPLITS}
    return by_split, Path(out, "report.md").read_text()


def test_the_default_split_is_one_of_images_with_complexity_as_stage_and_free_form_answers(published):
    by_split, report = prepare()
    images = {split: {sample["image"] for sample in by_split[split]} for split in SPLITS}
    assert all(images.values()) and sum(map(len, images.values())) == 10 == len(set.union(*images.values()))
    samples = [sample for split in SPLITS for sample in by_split[split]]
    assert len(samples) == 60 and len({sample["id"] for sample in samples}) == 60
    assert {(s["stage"], s["free_form"]) for s in samples} == {(1, True), (2, True), (3, True)}
    assert {s["official_split"] for s in by_split["train"]} == {"train", "test"}
    assert "| distinct images in test and in train | 0 |" in report and "| ... of the official split | 10 |" in report
    assert load_config("configs/x1.yaml").data.shared_images == "refused"


def test_the_official_split_runs_on_purpose_and_its_results_say_what_they_share(published, tiny_models):
    by_split, report = prepare("--split", "official", "--model-name", tiny_models["qwen3_vl"])
    assert [len(by_split[split]) for split in SPLITS] == [50, 0, 10]
    assert {s["official_split"] for s in by_split["test"]} == {"test"}
    assert "| test samples on images that train has | 10 |" in report
    options = ["num_train_epochs=0.1", "logging_steps=1", "dataloader_num_workers=0", "image_size=64"]
    code, _, err = run_script("train.py", "--config", "configs/x1.yaml", "data.shared_images=refused", *options)
    assert code == 2 and "stand in more than one split" in err
    code, out, err = run_script("train.py", "--config", "configs/x1.yaml", *options)
    assert code == 0, err
    assert "10 image(s) stand in more than one split, as data.shared_images allows" in out
    with short_answers(2):
        code, out, err = run_script("evaluate.py", "--config", "configs/x1.yaml", *options)
    assert code == 0, err
    scores = json.loads(Path("results/x1/predict_results.json").read_text())
    assert scores["samples_on_training_images"] == scores["predict_samples"] == 10 and scores["free_form"] is True
    assert "predict_token_f1" in out and "memory as well as skill" in out


def test_copies_of_an_image_stay_on_one_side(published):
    for number in range(5):
        Path(f"kvasir/images/a{number}.jpg").write_bytes(Path("kvasir/images/a9.jpg").read_bytes())
    for seed in range(4):
        by_split, _ = prepare("--seed", seed)
        homes = {split for split in SPLITS for s in by_split[split] if s["image"][8:9] in "012349"}
        assert len(homes) == 1


def test_rows_without_their_image_are_listed_and_dropped_on_request(published):
    Path("kvasir/images/a3.jpg").unlink()
    Path("kvasir/images/a4.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"12 row\(s\) cannot be used: .*no image 'a3' in kvasir"):
        prepare()
    listed = [json.loads(line) for line in Path("data/x1/refused_rows.jsonl").read_text().splitlines()]
    assert len(listed) == 12 and {row["image"] for row in listed} == {"a3", "images/a4.jpg"}
    by_split, report = prepare("--drop-refused")
    assert sum(map(len, by_split.values())) == 48 and "listed in refused_rows.jsonl | 12 |" in report


def test_a_mistake_is_one_line_with_its_cure(published):
    for options, message in (
        (["--images", "x1"], "no images there; give the folder of Kvasir-VQA"),
        (["--source", "kvasir"], "no parquet file there"),
        (["--source", "./none"], "SimulaMet/Kvasir-VQA-x1"),
        (["--split", "1/2/3"], "or 0/0/100"),
    ):
        with pytest.raises(UserError, match=message) as error:
            prepare(*options)
        assert "\n" not in str(error.value)
    Path("x1/data/test-00000-of-00001.parquet").rename("x1/data/rest.parquet")
    with pytest.raises(UserError, match=r"10 row\(s\) cannot be used: .*called train-\*.parquet"):
        prepare("--split", "official")
    datasets.Dataset.from_list([{"question": "?"}]).to_parquet("x1/data/other.parquet")
    with pytest.raises(UserError, match=r"column\(s\) img_id, complexity, answer missing"):
        prepare()
