"""The samples of a split: read one at a time, and from a cache that other processes and later starts map."""

import json
import resource
import time
from dataclasses import replace

import numpy as np
import pytest
from support.tiny_runs import tiny_run, vqa_samples

from errors import UserError
from samples import load_samples, load_split
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


def test_a_hundred_thousand_rows_load_in_seconds_and_stay_small(tmp_path):
    path = written(tmp_path, [{**vqa_samples(1, 1)[0], "id": str(i)} for i in range(100_000)])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    loaded = load_samples(path)
    last = loaded[99_999]["id"]
    assert time.process_time() - started < 15
    assert last == "99999" and len(loaded) == 100_000
    assert loaded._bytes.nbytes < 1.1 * path.stat().st_size, "one block of bytes, shared by forked workers"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000, "kilobytes"


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
