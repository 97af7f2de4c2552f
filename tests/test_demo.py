"""The drawn set is laid out as the published one, shows what its answers say, and cannot be guessed."""

import csv
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from conftest import REPO_ROOT, shared_data
from PIL import Image

import demo
import prepare_data
from config import load_config
from errors import UserError
from family import load_family
from prepare.stager import stage_by_rules
from toy import endoscopy


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A drawn set of 120 images."""
    return endoscopy.write_endoscopy_set(tmp_path_factory.mktemp("drawn") / "raw", images=120)


def table(folder):
    with open(folder / "metadata.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_layout_and_questions_are_those_of_kvasir_vqa(drawn):
    rows = table(drawn)
    real = shared_data("kvasir/kvasir_vqa_3000.csv")
    with open(real, newline="", encoding="utf-8") as file:
        published = list(csv.DictReader(file))
    assert list(rows[0]) == list(published[0])
    assert {row["question"] for row in rows} <= {row["question"] for row in published}
    assert {path.stem for path in (drawn / "images").iterdir()} == {row["img_id"] for row in rows}
    assert len(rows) == 4 * 120


def test_each_place_named_shows_a_polyp_of_a_colour_named_and_no_other_place_does(drawn):
    answers = defaultdict(dict)
    for row in table(drawn):
        answers[row["img_id"]][row["question"]] = row["answer"]
    for img_id, answer in answers.items():
        image = Image.open(drawn / "images" / f"{img_id}.jpg")
        assert (image.size, image.mode) == ((endoscopy.WIDTH, endoscopy.HEIGHT), "RGB")
        named = [endoscopy.COLORS[name] for name in answer[endoscopy.COLOR].split("; ")]
        seen = {}
        for place, (column, row) in endoscopy.PLACES.items():
            x, y = endoscopy.WIDTH * (0.5 + 0.275 * column), endoscopy.HEIGHT * (0.5 + 0.265 * row)
            box = (round(x) - 6, round(y) - 6, round(x) + 7, round(y) + 7)
            channels = image.crop(box).resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
            # Hue and saturation tell polyp from tissue; the light on the ball changes only how bright it is.
            seen[place] = min(closeness(channels, color) for color in named)
        places = answer[endoscopy.PLACE].split("; ")
        assert sorted(places) == places and len(places) == int(answer[endoscopy.NUMBER])
        nearest = sorted(seen, key=seen.get)[: len(places)]
        assert set(nearest) == set(places), (img_id, seen)


def closeness(channels, color):
    """Distance of two colours, each scaled to its own brightness."""
    scaled = [[value / max(max(triple), 1) for value in triple] for triple in (channels, color)]
    return sum((a - b) ** 2 for a, b in zip(*scaled, strict=True))


def test_always_giving_the_commonest_answer_is_right_less_than_a_quarter_of_the_time(drawn):
    counts = defaultdict(Counter)
    for row in table(drawn):
        counts[row["question"]][row["answer"]] += 1
    commonest = sum(answers.most_common(1)[0][1] for answers in counts.values())
    assert commonest / (4 * 120) < 0.25
    assert all(len(answers) >= 3 for answers in counts.values())


def test_same_seed_gives_the_same_bytes_and_another_seed_other_images(tmp_path):
    a, b, c = (endoscopy.write_endoscopy_set(tmp_path / name, 6, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    for file in (path for path in a.rglob("*") if path.is_file()):
        assert file.read_bytes() == (b / file.relative_to(a)).read_bytes()
    assert (a / "metadata.csv").read_bytes() != (c / "metadata.csv").read_bytes()
    with pytest.raises(ValueError, match="exists"):
        endoscopy.write_endoscopy_set(a)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c"}


def test_prepare_data_takes_it_by_rules_and_finds_no_answer_outside_the_candidates(drawn, tmp_path):
    prepare_data.main(["kvasir", "--source", str(drawn), "--out", str(tmp_path)])
    assert [stage_by_rules(q) for q in (endoscopy.PROCEDURE, endoscopy.NUMBER, endoscopy.COLOR, endoscopy.PLACE)] == [
        1,
        2,
        2,
        2,
    ]
    assert "test answers outside the training candidates | 0" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_demo_config_is_valid_and_fits_the_model_that_demo_writes(tmp_path, monkeypatch):
    config = load_config(REPO_ROOT / "configs" / "demo.yaml")
    demo.write_demo_model(tmp_path / config.model_name)
    monkeypatch.chdir(tmp_path)
    load_family(config.model_name).check_image_size(config.image_size, "configs/demo.yaml")
    assert {Path(path).parent for path in (config.data.train, config.data.val, config.data.test)} == {Path("demo/data")}


def test_summary_before_a_run_is_one_line_that_names_the_cure(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="make demo"):
        demo.main(["--summary"])


@pytest.mark.parametrize(("right", "code"), [(5, 0), (4, 1)])
def test_summary_shows_both_accuracies_and_fails_below_the_promise(tmp_path, monkeypatch, capsys, right, code):
    monkeypatch.chdir(tmp_path)
    for folder in ("demo/data", "results/demo"):
        (tmp_path / folder).mkdir(parents=True)
    train = [{"question": endoscopy.NUMBER, "answer": answer} for answer in ("2", "2", "3")]
    (tmp_path / "demo/data/train.json").write_text(json.dumps(train))
    rows = [
        {"images": [f"images/{n}.jpg"], "question": endoscopy.NUMBER, "answer": "2" if n < 2 else "3",
         "prediction": "3", "correct": n < right} for n in range(10)
    ]  # fmt: skip
    (tmp_path / "results/demo/generated_predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = {"majority_accuracy": 0.2, "predict_accuracy": right / 10}
    (tmp_path / "results/demo/predict_results.json").write_text(json.dumps(scores))
    assert demo.main(["--summary"]) == code
    shown = capsys.readouterr().out
    assert re.search(rf"How many polyps .* 20\.0 +{10 * right}\.0 +10\n", shown)
    assert "demo/raw/images/0.jpg" in shown and f"{right / 2:.1f} times the majority" in shown


def test_a_second_call_leaves_what_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "write_endoscopy_set", lambda folder: Path(folder).mkdir())
    assert demo.main([]) == 0
    before = (tmp_path / "demo/model/model.safetensors").stat().st_mtime_ns
    assert demo.main([]) == 0
    assert capsys.readouterr().out.count("there already") == 2
    assert (tmp_path / "demo/model/model.safetensors").stat().st_mtime_ns == before


def test_the_demos_model_can_be_of_the_family_with_recurrent_layers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo" / "raw").mkdir(parents=True)  # of no interest here
    assert demo.main(["--family", "qwen3_5"]) == 0
    assert json.loads((tmp_path / "demo" / "model" / "config.json").read_text())["model_type"] == "qwen3_5"
