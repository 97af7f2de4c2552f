"""`prepare_data.py click`: screenshots with instructions -> samples by split and a report."""

import json

import pytest
from conftest import shared_data
from PIL import Image

import prepare_data
from config import load_config
from errors import UserError
from images import letterbox_placement
from tasks.click import as_question

SPLITS = ("train", "val", "test")


@pytest.fixture
def source(tmp_path):
    """Write rows to a source file (ten images of 200×400 beside it); returns the function that does."""
    (tmp_path / "images").mkdir()
    for number in range(10):
        Image.new("RGB", (200, 400), (number, 0, 0)).save(tmp_path / "images" / f"{number}.png")

    def write(rows, name="source.jsonl"):
        path = tmp_path / name
        text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")
        return path

    return write


def row(number=0, **changes):
    return {"image": f"images/{number}.png", "instruction": "tap on the card", "point": [20, 40], **changes}


def prepare(source, *options):
    out = source.parent / "data"
    prepare_data.main(["click", "--source", str(source), "--out", str(out), *map(str, options)])
    return {name: json.loads((out / f"{name}.json").read_text(encoding="utf-8")) for name in SPLITS}


def prepare_train(source, *options):
    return prepare(source, "--split", "100/0/0", *options)["train"]


def test_the_forty_real_screenshots_are_read_with_their_own_names_for_things(tmp_path):
    folder = shared_data("gui/number-game")
    prepare_data.main(["click", "--source", str(folder / "train.jsonl"), "--out", str(tmp_path)])
    by_split = {name: json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8")) for name in SPLITS}
    assert {name: len(samples) for name, samples in by_split.items()} == {"train": 28, "val": 6, "test": 6}
    published = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    expected = {r["image"]: (r["problem"].removeprefix("<image>"), r["click_position_px"]) for r in published}
    found = {s["image"]: (s["instruction"], s["point"]) for samples in by_split.values() for s in samples}
    assert found == expected
    assert len({s["id"] for samples in by_split.values() for s in samples}) == 40
    assert all(s["image_size"] == [720, 1280] for samples in by_split.values() for s in samples)


def test_a_published_screenshot_with_boxes_as_corner_and_size_is_clicked_at_their_centres(tmp_path):
    file = shared_data("gui/calendar_boxes.json")
    prepare_data.main(["click", "--source", str(file), "--out", str(tmp_path), "--boxes", "xywh", "--split", "100/0/0"])
    samples = json.loads((tmp_path / "train.json").read_text(encoding="utf-8"))
    for sample in samples:
        x0, y0, x1, y1 = sample["bbox"]
        assert sample["point"] == sample["center_px"] == [(x0 + x1) / 2, (y0 + y1) / 2]
    assert sorted(s["bbox"] for s in samples)[0] == [341, 70, 413, 139]


@pytest.mark.parametrize(("coordinates", "numbers"), [("pixels", [20, 100]), ("relative1000", [100, 250]),
                                                      ("relative1", [0.1, 0.25])])  # fmt: skip
def test_points_in_each_stated_unit_become_pixels_of_the_original(source, coordinates, numbers):
    options = [] if coordinates == "pixels" else ["--coordinates", coordinates]
    rows = [row(point=numbers), row(1, point=None, bbox=[0, 0, *(2 * n for n in numbers)])]
    for sample in prepare_train(source(rows), *options):
        assert sample["point"] == [20, 100]


def test_shares_of_the_image_without_saying_so_are_refused_and_not_guessed(source):
    path = source([row(point=[0.1, 0.25]), row(1, point=[0.5, 0.5])])
    with pytest.raises(UserError, match="--coordinates relative1"):
        prepare(path, "--split", "100/0/0")
    for unit, number in (("relative1", 1.5), ("relative1000", 1001)):
        path = source([row(point=[number, 1])])
        with pytest.raises(UserError, match=f"{unit} means .* is {number}"):
            prepare(path, "--split", "100/0/0", "--coordinates", unit)


@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_share_gpt_files_give_a_click_for_each_user_turn_with_a_point_or_box(source, form):
    def turn(role, text):
        spoken = {"user": "human", "assistant": "gpt"}.get(role, role)
        return {"role": role, "content": text} if form == "messages" else {"from": spoken, "value": text}

    turns = [
        turn("system", "You click."),
        turn("user", "<image>\ntap on red"),
        turn("assistant", '{"point_2d": [500, 250]}'),
        turn("user", "tap on blue"),
        turn("assistant", "[0, 0, 500, 500]"),
    ]
    path = source([{form: turns, "images": ["images/3.png"], "id": "a"}], "source.json")
    samples = prepare_train(path, "--coordinates", "relative1000")
    found = {s["instruction"]: (s["point"], s.get("bbox"), s["id"]) for s in samples}
    assert found == {
        "tap on red": ([100, 100], None, "a-1"),
        "tap on blue": ([50, 100], [0, 0, 100, 200], "a-2"),
    }
    assert "| system turns, left out of the samples | 1 |" in (path.parent / "data" / "report.md").read_text()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(point=[201, 40]), "outside the image of 200×400"),
        (row(point=[20, 401]), "outside the image of 200×400"),
        (row(point=[-1, 40]), "outside the image of 200×400"),
        (row(bbox=[0, 0, 300, 50]), "leaves the image"),
        (row(bbox=[30, 50, 60, 90]), "outside its bbox"),
        (row(bbox=[100, 100, 40, 40]), "width, height"),
        (row(point=None), "no point and no box"),
        (row(point="[20, 40]"), "list of 2 numbers"),
        (row(instruction="<image>"), "no instruction"),
        (row(image=None), "has 0"),
        ({"messages": [{"role": "user", "content": "<image>hi"}], "images": ["images/1.png"]}, "no assistant turn"),
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Done."}],
          "images": ["images/1.png"]}, "no point and no box in the answer 'Done.'"),
        (row(image="../secret.png"), "leaves data.image_root"),
    ],
)  # fmt: skip
def test_a_bad_row_is_an_error_with_file_and_row_and_nothing_is_written(source, bad, message):
    path = source([row(5), bad, row(6)])
    with pytest.raises(UserError, match=message) as error:
        prepare(path)
    assert f"{path} row 2: " in str(error.value)
    assert [file.name for file in (path.parent / "data").iterdir()] == ["refused_rows.jsonl"]


def test_every_bad_row_is_counted_and_the_first_ten_are_listed(source):
    with pytest.raises(UserError, match=r"12 row\(s\) cannot be used") as error:
        prepare(source([row(number % 10, point=[999, 1]) for number in range(12)]))
    assert "row 10: " in str(error.value) and "row 11: " not in str(error.value) and "2 more" in str(error.value)


def test_missing_and_broken_images_are_named(source):
    path = source([row(77), row(1), row(2)])
    with pytest.raises(UserError, match=r"1 of 3 images cannot be read: .*77\.png"):
        prepare(path)
    (path.parent / "images" / "1.png").write_bytes((path.parent / "images" / "1.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"1 of 2 images cannot be read: .*1\.png"):
        prepare(source([row(1), row(2)]))


def test_files_of_identical_content_stay_in_one_split_and_a_repeated_click_is_kept_once(source, tmp_path):
    for number in range(3):
        copy = tmp_path / "images" / f"copy{number}.png"
        copy.write_bytes((tmp_path / "images" / f"{number}.png").read_bytes())
    rows = [row(number, instruction=text) for number in range(10) for text in ("a", "b")]
    rows += [row(f"copy{number}", instruction="c") for number in range(3)]
    rows += [row("copy0", instruction="a"), row(4, instruction="b", point=[21, 41])]
    by_split = prepare(source(rows))
    groups = {name: {s["group"] for s in samples} for name, samples in by_split.items()}
    assert all(groups.values()) and sum(map(len, groups.values())) == 10 == len(set.union(*groups.values()))
    report = (tmp_path / "data" / "report.md").read_text(encoding="utf-8")
    for line in (
        "exact repeats, dropped | 1 |",
        "clicks kept | 24 |",
        "image files | 13 |",
        "distinct images | 10 |",
    ):
        assert line in report
    assert "several points on one image, all kept | 1 |" in report


def test_the_same_seed_gives_the_same_files_and_another_another_split(source):
    path = source([row(number) for number in range(10)])
    first, again, other = prepare(path), prepare(path), prepare(path, "--seed", "7")
    assert first == again
    assert {s["id"] for s in first["train"]} != {s["id"] for s in other["train"]}


def test_a_photo_turned_by_exif_is_measured_upright(source, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (400, 200)).save(tmp_path / "images" / "turned.jpg", exif=exif)
    (sample,) = prepare_train(source([row(image="images/turned.jpg", point=[150, 390])]))
    assert sample["image_size"] == [200, 400]
    with pytest.raises(UserError, match="outside the image of 200×400"):
        prepare(source([row(image="images/turned.jpg", point=[390, 150])]))


def test_prepared_samples_are_what_training_takes_and_other_keys_are_kept(source):
    from family import Family

    (sample,) = prepare_train(source([row(bbox=[0, 0, 40, 80], app="game", question="?")]))
    assert sample["app"] == "game" and sample["bbox"] == [0, 0, 40, 80]
    asked = as_question(sample, letterbox_placement(200, 400, 64), Family("qwen3_vl", "relative"))
    assert asked["answer"] == "[300, 100]"


def screenspot(source, form, bad=0):
    """A folder of files as ScreenSpot-v2 (xywh, three files) or -Pro (xyxy, its own keys) publishes them; `bad` rows
    of theirs cannot be used. The same targets in both."""
    folder = source([]).parent / f"screenspot_{form}"
    folder.mkdir()
    for part, platform in enumerate(("mobile", "desktop", "web")):
        rows = []
        for number in range(4):
            x, y, kind = 20 * part, 10 * number, ("icon", "text")[number % 2]
            row = {"img_filename": f"{3 * part + number % 3}.png", "instruction": f"open {number}"}
            if form == "xywh":
                row |= {"bbox": [x, y, 30, 40], "data_type": kind, "data_source": "windows"}
            else:
                row |= {"bbox": [x, y, x + 30, y + 40], "ui_type": kind, "platform": platform, "group": "Dev",
                        "id": f"{platform}-{number}", "img_size": [200, 400]}  # fmt: skip
            rows.append(row)
        rows += [{**rows[0], "img_filename": f"gone{n}.png"} for n in range(bad) if n % 3 == part and n % 2]
        rows += [{**rows[0], "instruction": f"bad {n}", "bbox": [190, 390, 300, 500]}
                 for n in range(bad) if n % 3 == part and not n % 2]  # fmt: skip
        name = f"screenspot_{platform}_v2.json" if form == "xywh" else f"application{part}.json"
        (folder / name).write_text(json.dumps(rows))
    return folder


def test_screenspot_in_both_box_forms_gives_the_same_test_only_clicks_with_their_groups(source, tmp_path):
    found = {}
    for form in ("xywh", "xyxy"):
        folder = screenspot(source, form)
        with pytest.raises(UserError, match=r"\[x, y, width, height\] is --boxes xywh \(ScreenSpot-v2\)"):
            prepare(folder, "--split", "0/0/100", "--image-root", tmp_path / "images")
        by_split = prepare(folder, "--split", "0/0/100", "--image-root", tmp_path / "images", "--boxes", form)
        assert not by_split["train"] and not by_split["val"]
        found[form] = {
            (s["image"], s["instruction"], *s["bbox"], *s["point"], s["data_type"], s["platform"])
            for s in by_split["test"]
        }
        assert all(s["category"] == "Dev" and len(s["group"]) == 16 for s in by_split["test"] if "category" in s)
    assert len(found["xywh"]) == 12 and found["xywh"] == found["xyxy"]
    assert "| platform | web | 4 |" in (tmp_path / "data/report.md").read_text()


def test_every_refused_row_is_listed_with_its_image_and_dropped_on_request(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = screenspot(source, "xywh", bad=20)
    options = ["--split", "0/0/100", "--image-root", tmp_path / "images", "--boxes", "xywh"]
    with pytest.raises(UserError, match=r"20 row\(s\) cannot be used.*refused_rows.jsonl.*--drop-refused"):
        prepare(folder, *options)
    listed = [json.loads(line) for line in (tmp_path / "data/refused_rows.jsonl").read_text().splitlines()]
    assert len(listed) == 20 and sorted(row["image"] for row in listed if "gone" in row["image"]) == sorted(
        f"gone{n}.png" for n in range(1, 20, 2)
    )
    assert all(row["problem"] and row["file"].endswith("_v2.json") for row in listed)
    (tmp_path / "data/refused_rows.jsonl").unlink()
    by_split = prepare(folder, *options, "--drop-refused", "--config", "configs/spot.yaml")
    assert len(by_split["test"]) == 12
    assert len((tmp_path / "data/refused_rows.jsonl").read_text().splitlines()) == 20
    assert (
        "| rows refused and dropped, listed in refused_rows.jsonl | 20 |" in (tmp_path / "data/report.md").read_text()
    )
    written = load_config("configs/spot.yaml")
    assert (written.task, written.data.train, written.resize) == ("click", None, "native")


@pytest.mark.parametrize("whole_folder", [False, True])
def test_a_source_file_that_would_be_overwritten_is_refused_and_stays(source, whole_folder):
    path = source([row(number) for number in range(10)], "train.json")
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"train\.json is a file that --out .* would overwrite; give another --out"):
        given = path.parent if whole_folder else path
        prepare_data.main(["click", "--source", str(given), "--out", str(path.parent)])
    assert path.read_bytes() == before


def test_the_help_shows_the_usual_command_and_the_names_it_understands(capsys):
    with pytest.raises(SystemExit):
        prepare_data.main(["click", "--help"])
    told = capsys.readouterr().out
    for text in ("prepare_data.py click --source FILE.jsonl --out DATA_DIR", '"problem"', "click_position_px", "xywh"):
        assert text in told
