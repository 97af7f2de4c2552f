"""`prepare_data.py vqa`: own questions and answers in every form of the README -> samples by split, report, config."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO_ROOT, shared_data
from support.own_data import FORMS, QUESTIONS, write_own_data
from support.tiny_runs import run_script, write_images

import prepare_data
from config import load_config
from errors import UserError
from leakage import refuse_identical
from prepare import starting_config
from prepare.kvasir import items
from samples import load_samples
from templates import image_paths, to_messages

SPLITS = ("train", "val", "test")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Configs are written to ./configs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepare(source, *options, out="data/mine"):
    prepare_data.main(["vqa", "--source", str(source), "--out", str(out), *map(str, options)])
    by_split = {name: json.loads(Path(out, f"{name}.json").read_text(encoding="utf-8")) for name in SPLITS}
    return by_split, Path(out, "report.md").read_text(encoding="utf-8")


def rows_about(names, question="What is it?", answer="a", **more):
    return [{"image": name, "question": question, "answer": answer, **more} for name in names]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def own_images(folder, number, **more):
    names = [f"{n:02d}.png" for n in range(number)]
    write_images(folder, names, **more)
    return names


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_samples_split_by_image_with_candidates_as_for_kvasir(tmp_path, form):
    source = write_own_data(tmp_path / "source", form)
    by_split, report = prepare(source)
    images = {split: {path for s in by_split[split] for path in image_paths(s)} for split in SPLITS}
    assert {split: len(names) for split, names in images.items()} == {"train": 20, "val": 5, "test": 5}
    assert len(set.union(*images.values())) == 30
    train = [sample for sample in by_split["train"]]
    for split in SPLITS:
        for sample in by_split[split]:
            said = {i for s in train if s["question"] == sample["question"] for i in items(s["answer"])}
            assert set(sample["candidates"]) == said
            assert sample["multi_label"] is (sample["question"] == QUESTIONS[2]) and sample["free_form"] is False
    refuse_identical(by_split, source.parent if source.is_file() else source)
    assert "| samples kept | 90 |" in report and "multi-label" in report
    written = load_config("configs/mine.yaml")
    assert written.template == "candidates" and written.data.train == "data/mine/train.json"
    assert len(load_samples(written.data.train)) == 60


def test_the_files_of_two_large_projects_are_read_as_published(tmp_path):
    llava = shared_data("formats/qwen-vl-finetune/single_images.json")
    root = tmp_path / "demo/images"
    write_images(root, [Path(row["image"]).name for row in json.loads(llava.read_text())])
    by_split, _ = prepare(llava, "--image-root", tmp_path, "--split", "0/0/100")
    rows = json.loads(llava.read_text())
    published = {turn["value"].strip() for row in rows for turn in row["conversations"] if turn["from"] == "gpt"}
    assert len(by_split["test"]) == len(rows)
    assert {to_messages(sample, "plain")[-1]["content"].strip() for sample in by_split["test"]} <= published

    share_gpt = shared_data("formats/llamafactory/mllm_demo.json")
    rows = json.loads(share_gpt.read_text())
    write_images(tmp_path / "mllm_demo_data", sorted({Path(name).name for row in rows for name in row["images"]}))
    by_split, _ = prepare(share_gpt, "--image-root", tmp_path, "--split", "0/0/100", out="data/b")
    assert sorted(json.dumps(s["messages"]) for s in by_split["test"]) == sorted(
        json.dumps(r["messages"]) for r in rows
    )


def test_a_csv_of_a_spreadsheet_is_read_by_its_column_names_with_lists_in_a_cell(tmp_path):
    names = own_images(tmp_path / "s", 6)
    with open(tmp_path / "s/all.csv", "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["answer", "image", "question", "candidates", "stage", "site"])
        writer.writerows(["1, or 2", name, "How many?", "1, or 2; 3", "2", ""] for name in names)
    by_split, _ = prepare(tmp_path / "s", "--split", "100/0/0")
    for sample in by_split["train"]:
        assert (sample["candidates"], sample["stage"], sample["answer"]) == (["1, or 2", "3"], 2, "1, or 2")
        assert "site" not in sample


def test_a_question_with_hardly_an_answer_twice_gets_no_candidates_and_the_report_says_why(tmp_path):
    names = own_images(tmp_path, 12)
    rows = [{"image": name, "question": "Who is it?", "answer": f"Person {n}"} for n, name in enumerate(names)]
    rows += rows_about(names[:3], "Rare?", "yes") + rows_about(names, "Same?", "yes")
    by_split, report = prepare(write(tmp_path / "s.jsonl", rows), "--split", "100/0/0")
    assert not any("candidates" in sample for sample in by_split["train"])
    for why in ("12 different answers on 12 training images", "fewer than 5", "one answer in training"):
        assert why in report
    assert load_config("configs/mine.yaml").template == "plain"


def test_conversations_stay_as_they_are_when_one_of_them_has_two_questions(tmp_path):
    names = own_images(tmp_path, 4)

    def turn(asked):
        said = [{"role": "user", "content": asked}, {"role": "assistant", "content": "Yes."}]
        return said

    rows = [{"images": [name], "messages": turn("<image>Red?")} for name in names]
    rows[2]["messages"] += turn("Large?")
    by_split, report = prepare(write(tmp_path / "s.jsonl", rows), "--split", "100/0/0")
    assert sorted(len(sample["messages"]) for sample in by_split["train"]) == [2, 2, 2, 4]
    assert "| conversation, as it is | 4 | 0 | 0 | 4 |" in report


def test_copies_images_shown_together_and_pairs_of_a_file_stay_on_one_side(tmp_path):
    names = own_images(tmp_path, 20)
    (tmp_path / "copy.png").write_bytes((tmp_path / names[0]).read_bytes())
    rows = [*rows_about([*names, "copy.png"]), *rows_about(["copy.png"], "More?")]
    rows.append({"images": [names[1], names[2]], "question": "Same?", "answer": "no"})
    (tmp_path / "pairs.json").write_text(json.dumps([{"images": [names[3], names[4]]}, {"images": [names[4], names[5]]},
                                                     {"images": [names[6], "gone.png"]}]))  # fmt: skip
    source = write(tmp_path / "s.jsonl", rows)
    for seed in range(8):
        by_split, report = prepare(source, "--seed", seed, "--keep-together", tmp_path / "pairs.json")
        where = {path: split for split in SPLITS for sample in by_split[split] for path in image_paths(sample)}
        for together in ((names[0], "copy.png"), names[1:3], names[3:6]):
            assert len({where[name] for name in together}) == 1
        assert len({s["group"] for split in SPLITS for s in by_split[split] if s["id"][:2] in ("03", "04", "05")}) == 1
    assert "| groups kept together (copies, images shown together, --keep-together) | 3 |" in report


def test_near_identical_images_are_shown_and_on_request_kept_together_under_any_seed(tmp_path):
    names = own_images(tmp_path, 15, size=(96, 64))
    from PIL import Image

    for name in names:
        Image.open(tmp_path / name).save(tmp_path / f"like-{name[:2]}.jpg", quality=80)
    source = write(tmp_path / "s.jsonl", rows_about([*names, *(f"like-{n[:2]}.jpg" for n in names)]))
    _, report = prepare(source)
    pairs = json.loads(Path("data/mine/near_identical.json").read_text())
    apart = sum(len(set(pair["splits"])) == 2 for pair in pairs)
    assert apart > 0 and f"| near-identical pairs of images across splits | {apart} |" in report
    Path("data/mine/near_identical.json").rename("pairs.json")
    for seed in range(5):
        _, report = prepare(source, "--keep-together", "pairs.json", "--seed", seed)
        assert "near-identical pairs of images across splits | 0 |" in report
    assert not Path("data/mine/near_identical.html").exists()


@pytest.mark.parametrize("removed", [0, 2])
def test_the_command_with_the_sorted_pairs_of_its_own_folder_works_twice_and_leaves_them(tmp_path, removed):
    from PIL import Image

    names = own_images(tmp_path, 15, size=(96, 64))
    for name in names:
        Image.open(tmp_path / name).save(tmp_path / f"like-{name[:2]}.jpg", quality=80)
    source = write(tmp_path / "s.jsonl", rows_about([*names, *(f"like-{n[:2]}.jpg" for n in names)]))
    prepare(source)
    kept, page = Path("data/mine/near_identical.json"), Path("data/mine/near_identical.html")
    assert (
        f"Take out of {kept} those that differ, and run prepare_data.py again with --keep-together {kept}"
        in page.read_text()
    )
    assert "by hand in the files of the splits is undone" in page.read_text()
    kept.write_text(json.dumps(json.loads(kept.read_text())[removed:]))
    by_eye = kept.read_text()
    first = prepare(source, "--keep-together", kept)
    assert kept.read_text() == by_eye
    assert prepare(source, "--keep-together", kept) == first and kept.read_text() == by_eye
    if page.exists():  # for the pairs that were taken out
        assert removed and f"Add those that show the same scene to {kept}" in page.read_text()
    if not removed:
        kept.rename("pairs.json")
        prepare(source, "--keep-together", "pairs.json")
        assert [pair["images"] for pair in json.loads(kept.read_text())] == [p["images"] for p in json.loads(by_eye)]


def test_check_writes_the_pairs_that_keep_together_takes_and_names_them_on_the_page(tmp_path, monkeypatch):
    import leakage
    from preflight import check_leakage
    from prepare.vqa import read_pairs

    pairs = [leakage.NearPair(2, "train", "a.png", "test", "b.png")]
    monkeypatch.setattr("preflight.refuse_leakage", lambda config, splits: splits)
    source = write(tmp_path / "s.jsonl", rows_about(own_images(tmp_path, 6)))
    prepare(source)
    monkeypatch.setattr(leakage, "find_near_identical", lambda splits, root, within: pairs)
    monkeypatch.setattr(leakage, "thumbnail", lambda path, pixels: ("", 0))
    config = load_config("configs/mine.yaml")
    check_leakage(config, {})
    kept = Path(config.output_dir) / "near_identical.json"
    assert read_pairs(kept) == [("a.png", "b.png")]
    page = kept.with_suffix(".html")
    assert f"--keep-together {kept}" in page.read_text() and "move every sample" not in page.read_text()
    sorted_before = Path("data/mine/near_identical.json")
    sorted_before.write_text("")
    check_leakage(config, {})
    assert f"--keep-together {sorted_before} {kept}" in page.read_text(), "else its pairs would be lost"
    Path("data/mine/report.md").write_text("# Kvasir-VQA, prepared")  # another source's splits are edited by hand
    check_leakage(config, {})
    assert "--keep-together" not in page.read_text() and "move every sample" in page.read_text()


def test_refused_rows_are_all_listed_with_their_images_and_dropped_on_request(tmp_path):
    names = own_images(tmp_path, 8)
    (tmp_path / names[7]).write_bytes(b"no image")
    bad = [*rows_about(["gone.png"]), *rows_about([names[7]]), *rows_about([names[0]], answer="")]
    bad += [{"image": names[1], "question": "Q?"}, *rows_about(["../x.png"]), *rows_about([names[2]], candidates=[1])]
    source = write(tmp_path / "s.jsonl", [*rows_about(names[:7]), *bad * 3])
    with pytest.raises(UserError, match=r"18 row\(s\) cannot be used: .*Nothing was written but .*refused_rows.jsonl"):
        prepare(source)
    listed = [json.loads(line) for line in Path("data/mine/refused_rows.jsonl").read_text().splitlines()]
    assert [path.name for path in (tmp_path / "data/mine").iterdir()] == ["refused_rows.jsonl"]
    assert sorted(row["row"] for row in listed) == list(range(8, 26))
    assert {str(row["image"]).strip("[]'") for row in listed} >= {"gone.png", names[7], names[0], names[1], "../x.png"}
    by_split, report = prepare(source, "--drop-refused")
    assert sum(map(len, by_split.values())) == 7
    assert "| rows refused and dropped, listed in refused_rows.jsonl | 18 |" in report
    with pytest.raises(UserError, match=r"18 row\(s\) cannot be used"):
        prepare(write(tmp_path / "t.jsonl", bad * 3), "--drop-refused", out="other")


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"image": "00.png", "frage": "?", "answer": "a"}], [], "no question; a row needs image, question and answer"),
        ([{"image": "00.png", "conversations": []}], [], "conversation is empty"),
        ([{"file": "00.png", "question": "?", "answer": "a"}], [], "name it 'image' .* found file, question, answer"),
        (rows_about(["00.png"]), ["--split", "50/50/50"], "or 0/0/100"),
        (rows_about(["00.png"]), [], "cannot fill 3 splits"),
        (rows_about(["00.png"]), ["--model-name", "org/other"], r"no name of a family .*Qwen3\.5\)"),
        (rows_about(["00.png"]), ["--model-name", "Qwen/Qwen3.5-35B-A3B"], "mixture of experts.* give a dense model"),
        (rows_about(["00.png"]), ["--keep-together", "none.json"], "give --keep-together a near_identical.json"),
    ],
)
def test_a_mistake_is_one_line_with_its_cure(tmp_path, rows, options, message):
    own_images(tmp_path, 1)
    with pytest.raises(UserError, match=message) as error:
        prepare(write(tmp_path / "s.jsonl", rows), *options)
    assert "\n" not in str(error.value)


def test_the_config_fits_family_data_and_a_set_without_training(tmp_path):
    names = own_images(tmp_path, 4, size=(900, 50))
    source = write(tmp_path / "s.jsonl", rows_about(names))
    for model, size in (("Qwen/Qwen3-VL-4B-Instruct", 768), ("Qwen/Qwen2.5-VL-7B-Instruct", 756)):
        prepare(source, "--model-name", model, "--config", f"{size}.yaml")
        assert load_config(f"{size}.yaml").image_size == size
    assert [starting_config.fitting_size(side, 32) for side in (10, 200, 257, 4000)] == [256, 256, 288, 768]
    prepare(source, "--split", "0/0/100", "--config", "test.yaml")
    written = load_config("test.yaml")
    assert (written.data.train, written.data.val, written.data.test) == (None, None, "data/mine/test.json")
    assert starting_config.steps_an_epoch(63) == (8, 1) and starting_config.steps_an_epoch(40_000) == (625, 8)


def test_a_config_that_is_there_stays_and_the_next_commands_are_printed(tmp_path, capsys):
    source = write(tmp_path / "s.jsonl", rows_about(own_images(tmp_path, 6)))
    prepare(source)
    told = capsys.readouterr().out
    assert "torchrun --nproc_per_node=2 train.py --config configs/mine.yaml --check\n" in told
    with open("configs/mine.yaml", "a") as config:
        config.write("# mine\n")
    prepare(source)
    assert "is there already and stays" in capsys.readouterr().out
    assert Path("configs/mine.yaml").read_text().endswith("# mine\n")


def test_answers_that_are_sentences_are_told_from_words_and_the_flag_decides_otherwise(tmp_path):
    names = own_images(tmp_path, 8)
    rows = rows_about(names, answer="There is a small red polyp in the lower left.")
    rows += rows_about(names[:3], "Is it red?", "yes")
    source = write(tmp_path / "s.jsonl", rows)
    by_split, report = prepare(source)
    assert {sample["free_form"] for split in SPLITS for sample in by_split[split]} == {True}
    assert "The answers are sentences (decided from their length)" in report
    by_split, report = prepare(source, "--answers", "short")
    assert {sample["free_form"] for split in SPLITS for sample in by_split[split]} == {False}
    assert "short phrases (as --answers says)" in report


def test_the_same_seed_gives_the_same_files_whatever_the_order_of_the_rows(tmp_path):
    rows = rows_about(own_images(tmp_path, 12)) + rows_about(["00.png"], "More?", "no")
    first, _ = prepare(write(tmp_path / "s.jsonl", rows))
    again, _ = prepare(write(tmp_path / "s.jsonl", rows[::-1]))
    other, _ = prepare(tmp_path / "s.jsonl", "--seed", "1")

    def ids(by_split):
        return {split: {(s["image"], s["question"]) for s in by_split[split]} for split in SPLITS}

    assert ids(first) == ids(again) != ids(other)


def test_an_out_that_is_the_source_is_refused(tmp_path):
    write(tmp_path / "s.jsonl", rows_about(own_images(tmp_path, 4)))
    with pytest.raises(UserError, match="is the source's own folder"):
        prepare(tmp_path, out=tmp_path)


@pytest.mark.parametrize("name", ["train.json", "refused_rows.jsonl", "near_identical.json", "link.json"])
def test_a_source_file_that_would_be_overwritten_is_refused_and_stays(tmp_path, name):
    rows = rows_about(own_images(tmp_path / "mine", 12))
    source = tmp_path / "mine" / ("train.json" if name == "link.json" else name)
    source.write_text(json.dumps(rows) if source.suffix == ".json" else "".join(json.dumps(r) + "\n" for r in rows))
    if name == "link.json":
        Path("link.json").symlink_to(source)
    before = source.read_bytes()
    with pytest.raises(UserError, match=rf"{name} is a file that --out mine would overwrite; give another --out"):
        prepare(name if name == "link.json" else source, "--image-root", "mine", out="mine")
    assert source.read_bytes() == before


def test_paths_that_yaml_reads_as_something_else_stay_text(tmp_path):
    for number, root in enumerate(("no", "true", "null", "0x1f", "1e5", "plain")):
        source = write(tmp_path / "s.jsonl", rows_about(own_images(tmp_path / root, 4)))
        prepare(source, "--image-root", root, "--config", f"{number}.yaml")
        assert load_config(f"{number}.yaml").data.image_root == root


def test_a_config_about_other_data_is_not_the_next_thing_to_train(tmp_path, capsys):
    source = write(tmp_path / "s.jsonl", rows_about(own_images(tmp_path, 6)))
    (tmp_path / "configs").mkdir()
    shutil.copy(REPO_ROOT / "configs/exp2.yaml", "configs/exp2.yaml")
    prepare(source, out="data/exp2")
    told = capsys.readouterr().out
    assert "configs/exp2.yaml is there already, stays as it is, and is about other data" in told
    assert "--config and another name" in told and "torchrun" not in told


def test_help_names_the_forms_and_the_flags():
    code, told, _ = run_script("prepare_data.py", "vqa", "--help")
    for text in ("prepare_data.py vqa --source FILE_OR_FOLDER --out DATA_DIR", "conversations", "messages", ".csv",
                 "--keep-together", "--drop-refused", "0/0/100"):  # fmt: skip
        assert code == 0 and text in told


def readme_commands() -> list[str]:
    """The first commands under "Train on your own images", without their comments."""
    section = (REPO_ROOT / "README.md").read_text(encoding="utf-8").partition("## Train on your own images")[2]
    block = section.partition("```bash\n")[2].partition("```")[0]
    return [line.partition("   #")[0].strip() for line in block.splitlines()]


@pytest.fixture(scope="module")
def fresh_clone(tiny_models, tmp_path_factory):
    """(a copy of the repo's own files, the environment: a cache that holds a tiny model under the README's name)."""
    folder = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(
        ["git", "ls-files", "*.py", "requirements*.txt"], cwd=REPO_ROOT, capture_output=True, text=True
    )
    for name in listed.stdout.split():
        if not name.startswith("tests/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPO_ROOT / name, folder / name)
    model = folder / "cache/hub/models--Qwen--Qwen3-VL-8B-Instruct"
    (model / "refs").mkdir(parents=True)
    (model / "refs/main").write_text("0" * 40)
    shutil.copytree(tiny_models["qwen3_vl"], model / "snapshots" / ("0" * 40))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return folder, {**os.environ, "PATH": path, "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
def test_the_five_commands_of_the_readme_work_as_printed_in_a_fresh_clone(fresh_clone):
    clone, environment = fresh_clone
    write_own_data(clone / "my_data", "csv")
    commands, printed = readme_commands(), []
    assert len(commands) == 5 and commands[0].endswith("pip install -r requirements.txt")
    for command in commands[1:]:
        options = {"cwd": clone, "env": environment, "capture_output": True, "text": True}
        done = subprocess.run(command, shell=True, timeout=280, **options)
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
        printed.append(done.stdout)
    assert "Check passed: nothing was trained." in printed[1]
    assert "the model is in outputs/mine" in printed[2] and "predict_accuracy" in printed[3]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_the_config_written_for_every_form_passes_the_check(tiny_models, tmp_path, form):
    write_own_data(tmp_path / "my_data", form)
    prepare("my_data")
    model = f"model_name={tiny_models['qwen3_vl']}"
    code, told, err = run_script("train.py", "--config", "configs/mine.yaml", "--check", model)
    assert (code, err) == (0, "") and "Check passed: nothing was trained." in told


def test_the_minimal_config_of_the_readme_is_one_and_every_key_of_it_is_needed(tmp_path):
    section = (REPO_ROOT / "README.md").read_text(encoding="utf-8").partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "c.yaml").write_text(section)
    assert load_config("c.yaml").task == "vqa"
    for line in section.splitlines():
        (tmp_path / "c.yaml").write_text(section.replace(line + "\n", ""))
        if not line.startswith("image_size"):  # missed when the family is known
            with pytest.raises(UserError, match="is missing"):
                load_config("c.yaml")
