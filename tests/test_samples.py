"""The samples of a split: read one at a time, and from a cache that other processes and later starts map."""

import hashlib
import json
import os
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.tiny_runs import tiny_run, vqa_samples

import samples as sample_files
from errors import UserError
from preflight import survey
from samples import CACHE_FOLDER, SampleList, load_samples, load_split
from templates import as_conversations


def written(tmp_path, content, name="train.json"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_samples_come_back_as_they_were_written(tmp_path, suffix):
    nasty = ["say \"quoted 'twice'\"", "NaN", "line\nbreak", "a\u2028b\u2029c\x85d\x0be", "🙂 ünï", "", "\\"]
    samples = [{"id": str(i), "question": text, "value": float("nan")} for i, text in enumerate(nasty)]
    lines = "\n".join(json.dumps(sample, ensure_ascii=False) for sample in samples)
    path = written(tmp_path, lines if suffix == "jsonl" else f"[{lines}]".replace("\n{", ",\n{"), f"t.{suffix}")
    loaded = load_samples(path)
    assert [sample["question"] for sample in loaded] == nasty and len(loaded) == len(nasty)
    assert np.isnan(loaded[3]["value"])


def test_a_sample_without_an_id_is_called_by_its_row_and_ids_are_texts(tmp_path):
    loaded = load_samples(written(tmp_path, [{"id": 7}, {}, {"id": "c"}]))
    assert [sample["id"] for sample in loaded] == ["7", "2", "c"]
    assert loaded.name(1) == f"{tmp_path}/train.json row 2 (id 2)"


def test_max_samples_takes_the_first_ones(tmp_path):
    path = written(tmp_path, [{"id": i} for i in range(5)])
    assert [sample["id"] for sample in load_samples(path, 3)] == ["0", "1", "2"]
    assert len(load_samples(path, 50)) == 5


@pytest.mark.parametrize(
    ("content", "name", "told"),
    [
        ("[]", "t.json", "holds no samples"),
        ("", "t.jsonl", "holds no samples"),
        ("\n \n", "t.jsonl", "holds no samples"),
        ("", "t.json", "line 1: not valid JSON"),
        ('[{"id": 1},\n{"id": }]', "t.json", "line 2: not valid JSON"),
        ('{"id": 1}\n\n{"id" 2}\n', "t.jsonl", "line 3: not valid JSON"),
        ("9" * 5000, "t.json", "line 1: not valid JSON"),
        ('{"id": 1}\n' + "[" * 100_000, "t.jsonl", "line 2: not valid JSON"),
        ('[{"id": 1, "point": [1e999, 0]}]', "t.json", "line 1: not valid JSON"),
        ('{"id": 1}', "t.json", "expected a list of samples, found dict"),
        ('[{"id": 1}, [2]]', "t.json", "row 2: expected an object, found list"),
        ('[{"id": 1}, {"question": "half an emoji \\ud83d"}]', "t.json", "row 2"),
    ],
)
def test_a_file_that_holds_no_samples_is_an_error_with_file_and_row(tmp_path, content, name, told):
    with pytest.raises(UserError) as caught:
        load_samples(written(tmp_path, content, name))
    assert told in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_binary_or_unreadable_file_is_an_error(tmp_path):
    (tmp_path / "b.json").write_bytes(b"\xff\xd8\xff\xe0 an image")
    for name, told in (("none.json", "No such file"), ("b.json", "line 1: not UTF-8 text"), (".", "Is a directory")):
        with pytest.raises(UserError, match=f"{told}.*; correct it, or run prepare_data.py"):
            load_samples(tmp_path / name)


def test_many_rows_are_held_as_one_block_of_bytes_and_never_all_as_objects(tmp_path):
    path = written(tmp_path, [{**vqa_samples(1, 1)[0], "id": str(i)} for i in range(20_000)])
    tracemalloc.start()
    try:
        loaded = load_samples(path)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert loaded[19_999]["id"] == "19999" and len(loaded) == 20_000
    assert loaded._bytes.nbytes < 1.1 * path.stat().st_size, "one block of bytes, shared by forked workers"
    assert held < 1.5 * path.stat().st_size and peak < 4 * path.stat().st_size


def test_a_conversation_by_image_holds_its_questions_in_the_order_of_the_stages():
    conversations = list(as_conversations(list(reversed(vqa_samples(2, 4)))))
    assert len(conversations) == 2
    for conversation in conversations:
        assert [turn["stage"] for turn in conversation["turns"]] == [1, 1, 2, 3]


def test_max_samples_cuts_training_and_neither_val_nor_test(tiny_models, tmp_path):
    config = tiny_run(tiny_models, "qwen3_vl").config
    path = written(tmp_path, [{"id": i} for i in range(5)])
    config = replace(config, max_samples=2, data=replace(config.data, train=path, val=path, test=path))
    assert [len(load_split(config, split)) for split in ("train", "val", "test")] == [2, 5, 5]


def test_an_id_that_repeats_is_refused_in_val_and_test_and_allowed_in_training(tiny_models, tmp_path):
    config = tiny_run(tiny_models, "qwen3_vl").config
    path = written(tmp_path, [{"id": "a"}, {"id": 7}, {"id": "7"}, {"id": "b"}])
    config = replace(config, data=replace(config.data, train=path, val=path, test=path))
    assert len(load_split(config, "train")) == 4  # published training files name several samples after one image
    for split in ("val", "test"):
        with pytest.raises(UserError, match=r"train\.json: 1 id\(s\) repeat: 7; make them distinct"):
            load_split(config, split)


# --------------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def large(tiny_models, tmp_path, monkeypatch):
    """A config whose training split is large enough for a cache; (config, the split's file)."""
    monkeypatch.setattr(sample_files, "IN_MEMORY_BYTES", 0)
    (tmp_path / "data").mkdir()
    path = written(tmp_path / "data", [*vqa_samples(3, 4), {"id": "t", "question": "Why? 🙂", "answer": "so"}])
    run = tiny_run(tiny_models, "qwen3_vl")
    data = replace(run.config.data, train=str(path), val=None, test=None)
    return replace(run.config, data=data, output_dir=str(tmp_path / "out")), path


@pytest.fixture
def never_read(monkeypatch):
    """A function after whose call reading a file's samples fails the test."""
    refused = lambda *_: pytest.fail("the samples were read again")  # noqa: E731
    return lambda: monkeypatch.setattr(sample_files, "read_samples", refused)


def cache_folders(path):
    return sorted(folder.name for folder in (path.parent / CACHE_FOLDER).iterdir())


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("changes", [{}, {"max_samples": 6}, {"template": "sequential_cot"}], ids=str)
def test_a_cached_split_holds_what_one_in_memory_does_in_the_same_order(large, monkeypatch, suffix, changes):
    config, path = large
    if suffix == "jsonl":
        lines = "\n".join(json.dumps(sample) for sample in json.loads(path.read_text()))
        path = written(path.parent, lines, "train.jsonl")
    config = replace(config, **changes, data=replace(config.data, train=str(path)))
    built, found = load_split(config, "train"), load_split(config, "train")
    monkeypatch.undo()
    in_memory = load_split(config, "train")
    assert len(in_memory) == {"max_samples": 6, "template": 4}.get(next(iter(changes), None), 13)
    for cached in (built, found):
        assert list(cached) == list(in_memory) and cached.sha256 == in_memory.sha256
        assert cached.name(3) == in_memory.name(3) and cached.repeated_ids() == in_memory.repeated_ids()
        assert cached.image_keys.tolist() == in_memory.image_keys.tolist()
        assert list(cached.one_of_each_image()) == list(in_memory.one_of_each_image())
    assert load_samples(path, config.max_samples).sha256 == sha256_of_lines(path, config.max_samples)


def sha256_of_lines(path, most) -> str:
    """As the checkpoints of earlier versions record it: of the samples as JSON, one after the other."""
    digest = hashlib.sha256()
    for sample in list(sample_files.read_samples(path))[:most]:
        digest.update(json.dumps(sample, ensure_ascii=False).encode())
    return digest.hexdigest()


def test_a_small_split_leaves_nothing_beside_its_file(large, monkeypatch):
    config, path = large
    monkeypatch.setattr(sample_files, "IN_MEMORY_BYTES", path.stat().st_size + 1)
    load_split(config, "train")
    assert [entry.name for entry in path.parent.iterdir()] == ["train.json"] and not Path(config.output_dir).exists()


def test_the_next_start_neither_reads_nor_checks_a_cached_split(large, tiny_models, never_read, monkeypatch, capsys):
    config, _ = large
    encoder = tiny_run(tiny_models, "qwen3_vl").encoder()
    found = survey(load_split(config, "train"), encoder)
    assert found == survey(SampleList(list(load_split(config, "train")), "s"), encoder) and not found["problems"]
    never_read()
    looked_at = []
    monkeypatch.setattr(encoder, "images_of", lambda sample: looked_at.append(sample["id"]) or ())
    assert survey(load_split(config, "train"), encoder) == found and not looked_at
    encoder.config = replace(encoder.config, max_tokens=encoder.config.max_tokens - 1)
    survey(load_split(config, "train"), encoder)
    assert len(looked_at) == 13, "under other settings"
    looked_at.clear()
    monkeypatch.setattr("preflight._code_sha256", lambda: "an edit")
    survey(load_split(config, "train"), encoder)
    assert len(looked_at) == 13, "by other code"


def test_what_was_wrong_with_a_cached_split_is_looked_for_again(large, tiny_models):
    config, _ = large
    encoder = tiny_run(tiny_models, "qwen3_vl").encoder(max_tokens=1)
    assert len(survey(load_split(config, "train"), encoder)["problems"]) == 13
    assert not list(Path(config.data.train).parent.rglob("survey-*"))


def test_a_changed_file_is_read_again_and_one_of_another_time_alone_is_not(large, never_read):
    config, path = large
    before = load_split(config, "train")
    text, status = path.read_text(), path.stat()
    path.write_text(text.replace("red", "tan"))  # as many bytes
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert load_split(config, "train")[0]["answer"] == "tan" and before[0]["answer"] == "red"
    path.write_text(text)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 2))
    never_read()
    assert list(load_split(config, "train")) == list(before)
    assert len(cache_folders(path)) == 2, "a run may still use the one before"


@pytest.mark.parametrize("fault", ["another version", "no index", "half an index", "cut short", "no rows"])
def test_a_cache_that_cannot_be_used_is_made_anew(large, fault):
    config, path = large
    expected = list(load_split(config, "train"))
    (name,) = cache_folders(path)
    folder = path.parent / CACHE_FOLDER / name
    index, lines = folder / "index.json", folder / "samples.jsonl"
    if fault == "another version":
        index.write_text(json.dumps({**json.loads(index.read_text()), "version": 0, "sha256": "old"}))
    elif fault == "no index":
        index.unlink()
    elif fault == "half an index":
        index.write_text(index.read_text()[:20])
    elif fault == "cut short":
        lines.write_bytes(lines.read_bytes()[:-10])
    else:
        (folder / "rows.npy").unlink()
    again = load_split(config, "train")
    assert list(again) == expected and again.sha256 == load_samples(path).sha256
    assert cache_folders(path) == [name]


def test_a_build_that_fails_leaves_nothing_and_names_the_row(large):
    config, path = large
    written(path.parent, [*vqa_samples(1, 2), [3]])
    with pytest.raises(UserError, match=r"train\.json row 3: expected an object, found list"):
        load_split(config, "train")
    assert cache_folders(path) == []


def test_two_jobs_that_build_the_same_cache_at_once_do_no_harm(large, monkeypatch):
    config, path = large
    write, others = sample_files._write_folder, []

    def write_while_another_job_does(*arguments):
        monkeypatch.setattr(sample_files, "_write_folder", write)
        write(*arguments)
        others.append(load_split(config, "train"))

    monkeypatch.setattr(sample_files, "_write_folder", write_while_another_job_does)
    mine = load_split(config, "train")
    assert list(mine) == list(others[0]) == list(load_samples(path)) and len(cache_folders(path)) == 1


def test_where_the_data_cannot_be_written_the_cache_is_under_the_output_folder(large, tiny_models, never_read):
    config, path = large
    (path.parent / CACHE_FOLDER).write_text("no folder")
    expected = list(load_split(config, "train"))
    survey(load_split(config, "train"), tiny_run(tiny_models, "qwen3_vl").encoder())
    never_read()
    assert list(load_split(config, "train")) == expected
    (folder,) = (Path(config.output_dir) / CACHE_FOLDER).iterdir()
    assert len(list(folder.glob("survey-*.json"))) == 1


def test_a_file_that_changes_while_it_is_read_is_refused(large, monkeypatch):
    config, path = large
    lines = sample_files._write_lines
    monkeypatch.setattr(sample_files, "_write_lines", lambda *a: (path.write_text("[{}]"), lines(*a))[1])
    with pytest.raises(UserError, match=r"train\.json was changed while it was read"):
        load_split(config, "train")
    assert cache_folders(path) == []
