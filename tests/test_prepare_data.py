"""prepare_data.py kvasir: splits, candidates, orders and errors, on real rows with images made here."""

import csv
import io
import itertools
import json
import random
import subprocess
import sys
from collections import Counter, defaultdict

import pytest
from conftest import REPO_ROOT, shared_data
from PIL import Image

import files
import prepare_data
from errors import UserError
from prepare import kvasir, kvasir_source, splits

SPLITS = ("train", "val", "test")
QUESTIONS = ("Is there text?", "How many polyps are in the image?", "Have all polyps been removed?")


def image(number, quality=95):
    """JPEG bytes of an image that no other number gives: random blocks, so that the perceptual hashes differ too."""
    dice = random.Random(number)
    blocks = Image.frombytes("RGB", (6, 4), bytes(dice.randrange(256) for _ in range(6 * 4 * 3)))
    buffer = io.BytesIO()
    blocks.resize((48, 32), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def write_raw(folder, rows, images):
    """The published layout. rows: (img_id, question, answer); images: img_id -> bytes."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for img_id, content in images.items():
        (folder / "images" / f"{img_id}.jpg").write_bytes(content)
    with open(folder / "metadata.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["source", "question", "answer", "img_id"])
        writer.writerows(["Polyps", question, answer, img_id] for img_id, question, answer in rows)
    return folder


def small_raw(folder, images=10):
    ids = [f"img{number:02d}" for number in range(images)]
    answers = ("yes", "1", "no")
    rows = [(img_id, question, answer) for img_id in ids for question, answer in zip(QUESTIONS, answers, strict=True)]
    return write_raw(folder, rows, {img_id: image(img_id) for img_id in ids})


def prepare(source, out, *options):
    prepare_data.main(["kvasir", "--source", str(source), "--out", str(out), *options])
    return {split: json.loads((out / f"{split}.json").read_text(encoding="utf-8")) for split in SPLITS}


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def real_rows(path):
    with open(shared_data(path), encoding="utf-8", newline="") as file:
        return [(row["img_id"], row["question"], row["answer"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The 3,007 real rows over images made here, every tenth image a copy of the one before; prepared once."""
    rows = real_rows("kvasir/kvasir_vqa_3000.csv")
    ids = list(dict.fromkeys(img_id for img_id, _, _ in rows))
    images = {img_id: image(number - (number % 10 == 9)) for number, img_id in enumerate(ids)}
    folder = tmp_path_factory.mktemp("real")
    write_raw(folder / "raw", rows, images)
    return folder, rows, images, prepare(folder / "raw", folder / "data")


def test_published_images_give_every_distinct_row_once(tmp_path):
    by_split = prepare(shared_data("kvasir/kvasir-vqa"), tmp_path / "data")
    samples = [sample for split in SPLITS for sample in by_split[split]]
    rows = real_rows("kvasir/kvasir-vqa/metadata.csv")
    assert len(rows) == 19 and len(samples) == 18  # one row of the three images is an exact repeat
    made = {(sample["image"], sample["question"], sample["answer"]) for sample in samples}
    assert made == {(f"images/{img_id}.jpg", question, answer) for img_id, question, answer in rows}
    assert all(by_split.values()), "three images fill three splits"
    assert "| exact repeats, dropped | 1 |" in (tmp_path / "data/report.md").read_text()


def test_a_sample_holds_the_facts_of_the_contract_and_ids_are_unique(real):
    samples = [sample for split in SPLITS for sample in real[3][split]]
    keys = ["id", "image", "question", "answer", "candidates", "multi_label", "stage", "group", "source"]
    assert all(list(sample) == keys for sample in samples)
    assert len({sample["id"] for sample in samples}) == len(samples) == len(set(real[1]))


def test_every_image_and_all_its_copies_are_in_one_split_and_in_one_group(real):
    _, _, images, by_split = real
    split_of, group_of = defaultdict(set), defaultdict(set)
    for split in SPLITS:
        for sample in by_split[split]:
            bytes_ = images[sample["image"].removeprefix("images/").removesuffix(".jpg")]
            split_of[bytes_].add(split)
            group_of[bytes_].add(sample["group"])
    assert all(len(found) == 1 for found in split_of.values())
    assert all(len(found) == 1 for found in group_of.values())
    assert len(set.union(*group_of.values())) == len(set(images.values())) < len(images)


def test_splits_have_the_shares_asked_for(real):
    images = {split: len({sample["image"] for sample in real[3][split]}) for split in SPLITS}
    total = sum(images.values())
    assert [round(100 * images[split] / total) for split in SPLITS] == [70, 15, 15]


def test_candidates_are_the_items_of_the_training_answers(real):
    train_answers, multi_label = defaultdict(set), defaultdict(bool)
    for split in SPLITS:
        for sample in real[3][split]:
            multi_label[sample["question"]] |= ";" in sample["answer"]
            if split == "train":
                train_answers[sample["question"]].add(sample["answer"])
    assert {True, False} == set(multi_label.values())
    for split in SPLITS:
        for sample in real[3][split]:
            question = sample["question"]
            expected = {item.strip() for answer in train_answers[question] for item in answer.split(";")}
            assert sample["multi_label"] == multi_label[question]
            assert set(sample["candidates"]) == expected and len(sample["candidates"]) == len(expected)


def test_a_question_is_multi_label_when_any_answer_of_any_split_holds_several_items(tmp_path):
    from prepare.kvasir import describe_questions

    rows = [{"img_id": f"{split}-{q}", "question": q, "answer": "red; blue" if split == q else "red"}
            for split in SPLITS for q in (*SPLITS, "never")]  # fmt: skip
    described = describe_questions(rows, {row["img_id"]: row["img_id"].split("-")[0] for row in rows})
    assert {q: about["multi_label"] for q, about in described.items()} == {
        "train": True, "val": True, "test": True, "never": False}  # fmt: skip
    assert described["test"]["candidates"] == ["red"] and described["train"]["candidates"] == ["blue", "red"]


def test_answers_outside_the_candidates_are_counted(tmp_path):
    raw = small_raw(tmp_path / "raw")
    by_split = prepare(raw, tmp_path / "data")
    test_image = by_split["test"][0]["image"].removeprefix("images/").removesuffix(".jpg")
    lines = (raw / "metadata.csv").read_text().splitlines()
    lines = [line.replace(",1,", ",7,") if line.endswith(test_image) else line for line in lines]
    (raw / "metadata.csv").write_text("\n".join(lines) + "\n")
    prepare(raw, tmp_path / "data")
    report = (tmp_path / "data/report.md").read_text()
    assert "| val answers outside the training candidates | 0 |" in report
    assert "| test answers outside the training candidates | 1 |" in report


def test_candidates_are_sorted_as_people_count():
    from prepare.kvasir import _natural

    assert sorted(["10", "2", "none", "0"], key=_natural) == ["0", "2", "10", "none"]
    assert sorted([">20mm", "11-20mm", "5-10mm", "<5mm"], key=_natural) == ["5-10mm", "11-20mm", "<5mm", ">20mm"]


def runs(values):
    """How many runs of equal neighbours."""
    values = list(values)
    return sum(number == 0 or value != values[number - 1] for number, value in enumerate(values))


def test_stage_order_goes_through_the_stages_once_with_the_questions_of_an_image_side_by_side(real):
    train = real[3]["train"]
    stages = [sample["stage"] for sample in train]
    assert stages == sorted(stages) and set(stages) == {1, 2, 3}
    for stage in (1, 2, 3):
        images = [sample["image"] for sample in train if sample["stage"] == stage]
        assert runs(images) == len(set(images))
        assert list(dict.fromkeys(images)) != sorted(set(images)), "images are shuffled"


def test_val_and_test_keep_an_image_together_with_its_stages_ascending(real):
    for split in ("val", "test"):
        samples = real[3][split]
        assert runs(sample["image"] for sample in samples) == len({sample["image"] for sample in samples})
        steps = itertools.pairwise(samples)
        assert all(a["image"] != b["image"] or a["stage"] <= b["stage"] for a, b in steps)


def test_random_order_has_the_same_samples_and_splits_but_mixes_stages_and_images(real, tmp_path):
    folder, _, _, by_split = real
    shuffled = prepare(folder / "raw", tmp_path, "--order", "random")
    assert sorted(s["id"] for s in shuffled["train"]) == sorted(s["id"] for s in by_split["train"])
    assert shuffled["val"] == by_split["val"] and shuffled["test"] == by_split["test"]
    assert runs(sample["stage"] for sample in shuffled["train"]) > len(shuffled["train"]) / 4
    assert runs(sample["image"] for sample in shuffled["train"]) > len(shuffled["train"]) * 0.9


def test_same_seed_gives_the_same_bytes_and_another_seed_another_split(tmp_path):
    raw = small_raw(tmp_path / "raw")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepare(raw, tmp_path / name, "--seed", str(seed))
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert content(tmp_path / "a")["test.json"] != content(tmp_path / "c")["test.json"]


def test_the_split_does_not_depend_on_the_order_of_the_rows(tmp_path):
    raw = small_raw(tmp_path / "raw")
    before = prepare(raw, tmp_path / "a")
    header, *lines = (raw / "metadata.csv").read_text().splitlines()
    (raw / "metadata.csv").write_text("\n".join([header, *reversed(lines)]) + "\n")
    after = prepare(raw, tmp_path / "b")
    for split in SPLITS:
        assert sorted(s["id"] for s in before[split]) == sorted(s["id"] for s in after[split])


def test_groups_fill_every_split_asked_for_and_none_other():
    sizes = {f"g{number}": 1 + number % 3 for number in range(200)}
    assigned = splits.assign_groups(sizes, splits.parse_split("60/40/0"), seed=3)
    share = Counter()
    for group, split in assigned.items():
        share[split] += sizes[group]
    assert set(share) == {"train", "val"}
    assert abs(share["train"] / sum(sizes.values()) - 0.6) < 0.02
    for seed in range(20):
        tiny = splits.assign_groups({"a": 5, "b": 1, "c": 1}, splits.parse_split("98/1/1"), seed)
        assert set(tiny.values()) == set(SPLITS)
    with pytest.raises(UserError, match="cannot fill 3 splits"):
        splits.assign_groups({"a": 5, "b": 1}, splits.parse_split("70/15/15"), 0)


def test_everything_in_train_leaves_empty_lists(tmp_path):
    by_split = prepare(small_raw(tmp_path / "raw"), tmp_path / "data", "--split", "100/0/0")
    assert [len(by_split[split]) for split in SPLITS] == [30, 0, 0]


def test_the_stage_table_counts_the_samples_written(real):
    folder, _, _, by_split = real
    report = (folder / "data/report.md").read_text()
    names = {1: "1 initial assessment", 2: "2 findings", 3: "3 clinical context"}
    for stage, name in names.items():
        numbers = [sum(sample["stage"] == stage for sample in by_split[split]) for split in SPLITS]
        assert f"| {name} | {' | '.join(f'{number:,}' for number in [*numbers, sum(numbers)])} |" in report
    numbers = [len(by_split[split]) for split in SPLITS]
    assert f"| all | {' | '.join(f'{number:,}' for number in [*numbers, sum(numbers)])} |" in report
    assert sum(numbers) == 3007
    assert "| groups of identical files under several ids | 35 |" in report


def test_a_split_file_has_one_sample_a_line(real):
    lines = (real[0] / "data/val.json").read_text(encoding="utf-8").splitlines()
    assert (lines[0], lines[-1]) == ("[", "]")
    assert [json.loads(line.removesuffix(",")) for line in lines[1:-1]] == real[3]["val"]


def test_repeats_are_dropped_contradictions_kept_and_rows_without_question_dropped_and_all_are_counted(tmp_path):
    rows = [(f"i{number}", "Is there text?", "yes") for number in range(4)]
    rows += [("i0", "Is there text?", "yes"), ("i0", "Is there text?", "no")]
    rows += [
        ("i1", "What color is the abnormality?", "red; pink"),
        ("i1", "What color is the abnormality?", "pink; red"),
    ]
    rows += [("i2", "", "none"), ("i3", "None", "")]
    raw = write_raw(tmp_path / "raw", rows, {f"i{number}": image(number) for number in range(4)})
    by_split = prepare(raw, tmp_path / "data")
    samples = [sample for split in SPLITS for sample in by_split[split]]
    assert sorted((s["image"], s["answer"]) for s in samples if s["question"] == "Is there text?") == [
        ("images/i0.jpg", "no"),
        *((f"images/i{number}.jpg", "yes") for number in range(4)),
    ]
    assert len({sample["id"] for sample in samples}) == len(samples) == 7
    report = (tmp_path / "data/report.md").read_text()
    assert "| rows read | 10 |" in report
    assert "| rows without a question, dropped | 2 |" in report
    assert "| exact repeats, dropped | 1 |" in report
    assert "| image-question pairs with different answers, all kept | 2 |" in report
    assert "| ... of which only the order of the items differs | 1 |" in report


def test_candidates_that_look_like_misspellings_of_each_other_are_shown_in_the_report(tmp_path):
    assert kvasir.look_alikes(["cecum", "caecum", "Cecum", "ileum"]) == [
        ("cecum", "caecum"), ("cecum", "Cecum"), ("caecum", "Cecum")]  # fmt: skip
    assert kvasir.look_alikes(["5-10mm", "11-20mm", "upper-left", "upper-right", "type 1 polyp", "type 2 polyp"]) == []
    raw = small_raw(tmp_path / "raw", images=30)
    assert "look alike" not in report_of(raw, tmp_path / "first")
    path = raw / "metadata.csv"
    lines = path.read_text().splitlines(keepends=True)
    lines = [line.replace(",no,", f",{'ulcerative ' + 'colitis' * (n % 2) or 'x'},") for n, line in enumerate(lines)]
    path.write_text("".join(lines).replace("ulcerative ,", "ulcerative collitis,"))
    report = report_of(raw, tmp_path / "second")
    assert "## Candidates that look alike" in report
    assert f"| {QUESTIONS[2]} | ulcerative colitis | ulcerative collitis |" in report


def report_of(raw, out):
    prepare(raw, out)
    return (out / "report.md").read_text()


def test_stages_edited_by_hand_are_kept_and_used_on_the_next_run(tmp_path, capsys):
    raw, data = small_raw(tmp_path / "raw"), tmp_path / "data"
    assert {s["stage"] for s in prepare(raw, data)["train"] if s["question"] == "Is there text?"} == {1}
    stages = json.loads((data / "stages.json").read_text())
    stages["Is there text?"] = 3
    (data / "stages.json").write_text(json.dumps(stages))
    by_split = prepare(raw, data)
    assert {s["stage"] for split in SPLITS for s in by_split[split] if s["question"] == "Is there text?"} == {3}
    assert json.loads((data / "stages.json").read_text()) == stages
    assert "1 question(s) kept as stages.json had them: Is there text?" in capsys.readouterr().out


def test_an_unknown_question_is_an_error_whose_cure_works(tmp_path):
    rows = [(f"i{number}", "Quo vadis?", "a") for number in range(4)] + [("i0", "Cui bono?", "b")]
    raw = write_raw(tmp_path / "raw", rows, {f"i{number}": image(number) for number in range(4)})
    with pytest.raises(UserError, match=r'2 of 2 questions: "Cui bono\?"; "Quo vadis\?".*stages\.json') as error:
        prepare(raw, tmp_path / "data")
    assert '{"Cui bono?": 2}' in str(error.value) and not (tmp_path / "data").exists()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/stages.json").write_text('{"Cui bono?": 2, "Quo vadis?": 3}')
    assert len(prepare(raw, tmp_path / "data")["train"]) >= 2


def break_image(raw):
    path = raw / "images/img03.jpg"
    path.write_bytes(path.read_bytes()[:-200])


def replace_text(raw, old, new, count=-1):
    path = raw / "metadata.csv"
    path.write_text(path.read_text().replace(old, new, count))


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (lambda raw: (raw / "images/img03.jpg").unlink(), [], r"1 of 10 images .* missing .*images/img03\.jpg"),
        (break_image, [], r"1 of 10 images cannot be read: img03\.jpg"),
        (lambda raw: (raw / "images/img03.jpg").write_bytes(b""), [], r"1 of 10 images cannot be read: img03\.jpg"),
        (lambda raw: replace_text(raw, "img_id", "image"), [], r"column\(s\) img_id missing; found .*image"),
        (lambda raw: replace_text(raw, ",yes,", ", ,", 1), [], r"1 row\(s\) with an empty answer: row 2 \(img00"),
        (lambda raw: replace_text(raw, ",img04", ",../img04"), [], r"3 row\(s\) whose img_id is empty or no plain"),
        (lambda raw: replace_text(raw, "Polyps,", "Polyps,one,more,", 1), [], r"line 2: 4 columns expected"),
        (lambda raw: (raw / "metadata.csv").write_bytes(b"source,question,answer,img_id\n\xff"), [], "not UTF-8"),
        (
            lambda raw: (raw / "metadata.csv").write_text("source,question,answer,img_id\n"),
            [],
            "no row with a question",
        ),
        (lambda raw: (raw / "metadata.csv").unlink(), [], "has neither metadata.csv"),
        (lambda raw: None, ["--split", "70/20/20"], "--split 70/20/20: .* add up to 100"),
        (lambda raw: None, ["--split", "70/30"], "--split 70/30: "),
        (lambda raw: None, ["--split", "0/50/50"], "--split 0/50/50: "),
        (lambda raw: None, ["--split", "nan/50/50"], "--split nan/50/50: "),
        (lambda raw: None, ["--split", "a/b/c"], "--split a/b/c: "),
    ],
)
def test_a_mistake_is_one_clear_error_and_leaves_an_older_data_set_untouched(tmp_path, damage, options, message):
    raw, data = small_raw(tmp_path / "raw"), tmp_path / "data"
    prepare(raw, data)
    before = content(data)
    damage(raw)
    with pytest.raises(UserError, match=message) as error:
        prepare(raw, data, *options)
    assert "\n" not in str(error.value)
    assert content(data) == before
    with pytest.raises(UserError):
        prepare(raw, tmp_path / "fresh", *options)
    assert not (tmp_path / "fresh").exists()


def test_missing_images_are_counted_and_the_first_ten_named(tmp_path):
    raw = small_raw(tmp_path / "raw", images=15)
    for number in range(12):
        (raw / f"images/img{number:02d}.jpg").unlink()
    with pytest.raises(UserError, match="12 of 15 images") as error:
        prepare(raw, tmp_path / "data")
    assert "img09.jpg" in str(error.value) and "img10.jpg" not in str(error.value)
    assert "(2 more)" in str(error.value)


def test_a_full_disk_leaves_the_older_files_and_no_stumps(tmp_path, monkeypatch):
    raw, data = small_raw(tmp_path / "raw"), tmp_path / "data"
    prepare(raw, data)
    before = content(data)

    def full_after_two(descriptor, calls=[]):  # noqa: B006 - the list is the counter
        calls.append(descriptor)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full_after_two)
    with pytest.raises(UserError, match="No space left"):
        prepare(raw, data, "--seed", "7")
    assert content(data) == before
    with pytest.raises(UserError, match="No space left"):
        prepare(raw, tmp_path / "fresh")
    assert not (tmp_path / "fresh").exists()


def test_the_command_line_says_one_line_and_exits_with_2():
    command = [sys.executable, "prepare_data.py", "kvasir", "--source", "no/such/folder", "--out", "no/such/out"]
    done = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --source no/such/folder is no folder") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["kvasir", "--help"]])
def test_help_shows_the_usual_command_first(arguments):
    done = subprocess.run(
        [sys.executable, "prepare_data.py", *arguments], cwd=REPO_ROOT, capture_output=True, text=True
    )
    first = "usage: python prepare_data.py kvasir --source RAW_DIR --out DATA_DIR"
    assert done.returncode == 0 and done.stdout.startswith(first)


def write_parquet(folder, rows, images):
    """The hub's schema: one row a question, the image's file inside each row."""
    datasets = pytest.importorskip("datasets")
    columns = {key: [] for key in ("image", "source", "question", "answer", "img_id")}
    for img_id, question, answer in rows:
        values = ({"bytes": images[img_id], "path": None}, "Polyps", question, answer, img_id)
        for key, value in zip(columns, values, strict=True):
            columns[key].append(value)
    kinds = {key: datasets.Value("string") for key in columns} | {"image": datasets.Image()}
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    (folder / "data").mkdir(parents=True)
    half = len(rows) // 2
    table.select(range(half)).to_parquet(str(folder / "data/00000.parquet"))
    table.select(range(half, len(rows))).to_parquet(str(folder / "data/00001.parquet"))
    return folder


def test_a_parquet_folder_gives_the_samples_and_the_very_files_of_the_csv_layout(tmp_path):
    raw = small_raw(tmp_path / "raw")
    rows = [(f"img{n:02d}", q, a) for n in range(10) for q, a in zip(QUESTIONS, ("yes", "1", "no"), strict=True)]
    images = {f"img{number:02d}": image(f"img{number:02d}") for number in range(10)}
    parquet = write_parquet(tmp_path / "hub", [*rows, ("img00", None, None)], images)
    (tmp_path / "b/images").mkdir(parents=True)
    (tmp_path / "b/images/mine.txt").write_text("stays")
    assert prepare(parquet, tmp_path / "b") == prepare(raw, tmp_path / "a")
    made = content(tmp_path / "b/images")
    assert made.pop("mine.txt") == b"stays"
    assert made == content(raw / "images")
    assert "| rows without a question, dropped | 1 |" in (tmp_path / "b/report.md").read_text()
    assert not [path for path in (tmp_path / "b").iterdir() if path.name.startswith(".")]


def test_a_bad_parquet_folder_is_an_error_and_leaves_nothing(tmp_path):
    images = {"a": image(1), "b": image(2)[:-200], "c": image(3)}
    rows = [(img_id, "Is there text?", "yes") for img_id in images]
    folder = write_parquet(tmp_path / "hub", rows, images)
    with pytest.raises(UserError, match=r"1 of 3 images cannot be read: b\.jpg"):
        prepare(folder, tmp_path / "data")
    assert not (tmp_path / "data").exists()
    import datasets

    datasets.Dataset.from_dict({"question": ["a"], "photo": ["b"]}).to_parquet(str(tmp_path / "bad/0.parquet"))
    with pytest.raises(UserError, match=r"source, answer, img_id, image missing; found question, photo"):
        prepare(tmp_path / "bad", tmp_path / "data")


def test_an_id_that_stands_for_two_images_is_an_error(tmp_path):
    images = {"a": image(1), "b": image(2)}
    folder = write_parquet(tmp_path / "hub", [("a", "Is there text?", "yes"), ("b", "Is there text?", "yes")], images)
    images = {"a": image(3)}
    write_parquet(folder / "more", [("a", "Is there text?", "no")] * 2, images)
    with pytest.raises(UserError, match=r"1 img_id\(s\) stand for several images: a"):
        prepare(folder, tmp_path / "data")


def test_without_the_datasets_library_the_error_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # import datasets -> ImportError
    with pytest.raises(UserError, match=r"pip install -r requirements-extra\.txt"):
        prepare("SimulaMet-HOST/Kvasir-VQA", tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_hub_name_is_loaded_through_the_library_with_all_its_splits(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    images = {img_id: image(img_id) for img_id in "abcd"}
    folder = write_parquet(tmp_path / "hub", [(img_id, "Is there text?", "yes") for img_id in images], images)
    files = [str(path) for path in folder.rglob("*.parquet")]
    asked = []

    def load_dataset(name):
        asked.append(name)
        return datasets.DatasetDict({"raw": datasets.Dataset.from_parquet(files, cache_dir=str(tmp_path / "cache"))})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    by_split = prepare("SimulaMet-HOST/Kvasir-VQA", tmp_path / "data")
    assert asked == ["SimulaMet-HOST/Kvasir-VQA"] and sum(map(len, by_split.values())) == 4
    assert content(tmp_path / "data/images") == {f"{img_id}.jpg": content_ for img_id, content_ in images.items()}


def test_near_identical_images_across_splits_are_reported_with_both_images(tmp_path):
    ids = [f"i{number}" for number in range(30)]
    images = {img_id: image(number // 2, quality=80 + number % 2) for number, img_id in enumerate(ids)}
    raw = write_raw(tmp_path / "raw", [(img_id, "Is there text?", "yes") for img_id in ids], images)
    by_split = prepare(raw, tmp_path / "data", "--split", "50/25/25")
    where = {sample["image"]: split for split in SPLITS for sample in by_split[split]}
    apart = sum(where[f"images/i{2 * n}.jpg"] != where[f"images/i{2 * n + 1}.jpg"] for n in range(15))
    page = (tmp_path / "data/near_identical.html").read_text()
    assert apart > 0 and page.count("<section>") == apart and page.count("data:image/jpeg;base64,") == 2 * apart
    assert f"| near-identical pairs of images across splits | {apart} |" in (tmp_path / "data/report.md").read_text()
    prepare(raw, tmp_path / "data", "--split", "100/0/0")
    assert not (tmp_path / "data/near_identical.html").exists(), "an older page would be wrong now"


def test_rows_name_their_line_in_the_file(tmp_path):
    raw = small_raw(tmp_path / "raw")
    with kvasir_source.opened(str(raw), tmp_path / "data") as read:
        assert [row["row"] for row in read.rows] == list(range(2, 32))


@pytest.mark.parametrize("family", ["kvasir", "click", "papers"])
def test_an_out_that_is_no_folder_is_refused_before_the_source_is_read(tmp_path, family):
    (tmp_path / "file").write_text("kept")
    for out in ("file", "file/under"):
        with pytest.raises(UserError, match=r"--out .*file is no folder"):
            prepare_data.main([family, "--source", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / out)])
    assert (tmp_path / "file").read_text() == "kept"
