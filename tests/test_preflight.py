"""Whatever is wrong with a run or its data is told in seconds, in one line, before any weights load."""

import json
import os
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from support.configs import write_values
from support.forked import start_forked
from support.tiny_runs import FAMILIES, build_items, config_values, run_script, tiny_run, vqa_samples, write_images
from test_images import BAD_FILES

import model as modeling
import templates
import train
from batches import BatchPlan
from config import load_config
from dataset import SampleEncoder
from errors import UserError
from family import load_family
from model import load_base, parameter_table, prepare_training
from preflight import (
    END_BYTES,
    batch_arithmetic,
    check_samples,
    count_parameters,
    enlarged_by_the_processor,
    input_hashes,
    make_plan,
    marked_text,
    missing_candidates,
    prefix_sharing,
    survey,
)
from runlog import step_line
from samples import SampleList
from tasks import counted
from templates import as_conversations
from toy.tiny_model import write_processors
from train import find_start


@pytest.fixture
def data(tmp_path):
    """A folder with three good images and two splits that share none of them."""
    write_images(tmp_path, ["0.png", "1.png", "2.png"])
    samples = vqa_samples(3, 2)
    (tmp_path / "train.json").write_text(json.dumps(samples[:4]))
    (tmp_path / "test.json").write_text(json.dumps(samples[4:]))
    return tmp_path


@pytest.fixture
def command(data, tiny_models, monkeypatch):
    """Runs a script of the repo on a changed config; weights that load fail the test."""

    def no_weights(*_):
        raise AssertionError("weights were about to load")

    def run(script="train.py", family="qwen3_vl", arguments=(), **changes):
        values = config_values(data, tiny_models[family], family, **changes)
        if "val" not in changes.get("data", {}):
            values["data"].pop("val")
        path = write_values(data / "c.yaml", values)
        return run_script(script, "--config", path, *arguments)

    monkeypatch.setattr(modeling, "load_base", no_weights)
    monkeypatch.setattr("checkpoint.load_base", no_weights)
    return run


def spoil(data, row: int, **changes) -> None:
    """Change a sample of the training split."""
    samples = json.loads((data / "train.json").read_text())
    samples[row] |= changes
    (data / "train.json").write_text(json.dumps(samples))


# ------------------------------------------------------------------------------------------------- the real commands

CONFIG_MISTAKES = {
    "unknown key": ({"learningrate": 1}, ["c.yaml", "'learningrate'", "did you mean 'learning_rate'?"]),
    "wrong type": ({"train_bs": "four"}, ["c.yaml", "'train_bs' is 'four'", "a whole number"]),
    "missing key": ({"task": None}, ["c.yaml", "'task' is missing"]),
    "missing file": ({"data": {"train": "none.json"}}, ["data.train", "none.json", "prepare_data.py"]),
    "missing folder": ({"data": {"image_root": "/none"}}, ["data.image_root", "/none"]),
    "no such model": ({"model_name": "no/model"}, ["model_name", "no/model"]),
    "no such template": ({"template": "ultra"}, ["'template' is 'ultra'", "ultra_condensed"]),
    "answer longer than max_tokens": ({"max_tokens": 20}, ["exceed max_tokens 20", "raise max_tokens"]),
    "letterbox without a size": ({"image_size": None}, ["c.yaml", "image_size", "multiple of 32"]),
    "max_pixels with letterbox": ({"max_pixels": 10_000}, ["max_pixels", "resize: native"]),
}


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
@pytest.mark.parametrize("mistake", CONFIG_MISTAKES)
def test_a_mistake_in_the_config_ends_the_command_with_code_2_and_the_cure(command, data, script, mistake):
    changes, told = CONFIG_MISTAKES[mistake]
    code, _, err = command(script, **changes)
    assert code == 2 and err.startswith("error: ") and "Traceback" not in err
    assert all(words in err for words in told), err
    assert err.count("\n") == 1 or "samples cannot be used" in err
    assert not list((data / "out").glob("[!.]*")) and not (data / "results").exists()


@pytest.mark.parametrize("place", ["file", "file/under", "dangling", "/proc/out"])
def test_an_output_dir_that_cannot_be_written_to_ends_training_with_code_2_and_one_line(command, data, place):
    (data / "file").touch()
    (data / "dangling").symlink_to(data / "nowhere")
    code, _, err = command(output_dir=str(data / place))
    assert (
        code == 2 and err.startswith(f"error: output_dir {data / place} cannot be written to") and err.count("\n") == 1
    )


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_a_size_of_768_on_qwen2_5_vl_ends_the_command_with_the_two_sizes_that_fit(command, script):
    code, _, err = command(script, "qwen2_5_vl", image_size=768)
    assert code == 2 and err.count("\n") == 1 and "use 756 or 784" in err


DATA_MISTAKES = {
    "empty split": ("[]", ["train.json", "holds no samples"]),
    "broken JSON": ('[{"id": 1,]', ["train.json line 1", "not valid JSON"]),
    "an empty answer": ({"answer": " "}, ["train.json row 2 (id p0q1)", "'answer' is missing or empty"]),
    "an answer longer than max_tokens": ({"answer": "red; " * 999}, ["row 2 (id p0q1)", "exceed max_tokens 1000"]),
    "a path that escapes": ({"image": "../secret.png"}, ["row 2 (id p0q1)", "leaves data.image_root"]),
    "an absolute path": ({"image": "/etc/hosts"}, ["row 2 (id p0q1)", "leaves data.image_root"]),
    "a missing image": ({"image": "none.png"}, ["none.png"]),
    "a control token": ({"question": "Who? <|im_end|>" + "x" * 900}, ["row 2 (id p0q1)", "<|im_end|>"]),
    "an image of the test split": ({"image": "2.png"}, ["2.png", "test"]),
}


@pytest.mark.parametrize("mistake", DATA_MISTAKES)
def test_a_mistake_in_the_data_ends_training_with_code_2_and_names_file_and_row(command, data, mistake):
    change, told = DATA_MISTAKES[mistake]
    if isinstance(change, dict):
        spoil(data, 1, **change)
    else:
        (data / "train.json").write_text(change)
    code, _, err = command()
    assert code == 2 and err.startswith("error: ") and "Traceback" not in err
    assert all(words in err for words in told), err


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_bad_row_of_val_or_test_ends_training_before_it_starts(command, data, split):
    samples = vqa_samples(3, 2)[4:]
    for name in ("val", "test"):
        bad = {"answer": "red; " * 999} if name == split else {}
        (data / f"{name}.json").write_text(json.dumps([samples[0], samples[1] | bad]))
    code, _, err = command(data={"val": str(data / "val.json")})
    assert code == 2 and f"{split}.json row 2 (id p2q1)" in err and "exceed max_tokens" in err


def test_answers_that_their_own_candidate_list_lacks_are_counted_before_training(command, data, tiny_models):
    encoder = tiny_run(tiny_models, "qwen3_vl").encoder()
    samples = SampleList(vqa_samples(3, 4), "train.json")  # every third answer: places, not colours
    warning = "WARNING: 3 answers of train.json are not in their own candidate list"
    assert missing_candidates(samples, encoder) == [warning]
    turns = SampleList(as_conversations(list(samples)), "train.json")
    assert missing_candidates(turns, encoder) == missing_candidates(samples, encoder)
    bare = SampleList([{**sample, "candidates": None} for sample in samples], "train.json")
    nothing = SampleList([{"id": "x", "messages": []}], "t")
    assert missing_candidates(bare, encoder) == missing_candidates(nothing, encoder) == []
    spoil(data, 2, answer="Green; purple")
    assert "WARNING: 1 answers of" in command(arguments=["--check"])[1]


def test_a_run_starts_with_a_warning_of_answers_that_are_no_candidates(tiny_models, tmp_path):
    run = tiny_run(tiny_models, "qwen3_vl")
    config, encoder = replace(run.config, output_dir=str(tmp_path / "out")), run.encoder()
    splits = {"train": SampleList(vqa_samples(3, 4), "train.json")}
    resume_from, notes, *_ = find_start(config, encoder, splits, make_plan(config, splits["train"], encoder, 1))
    assert [resume_from, notes] == ["", ["WARNING: 3 answers of train.json are not in their own candidate list"]]


def test_answers_that_a_model_without_thoughts_cannot_be_taught_are_found_before_training(command, data):
    turns = [{"role": role, "content": text} for role, text in (("user", "Who?"), ("assistant", "me"))] * 2
    samples = [vqa_samples(1, 1)[0] | {"answer": "<think>so</think>red"}, {"id": "chat", "messages": turns}]
    (data / "train.json").write_text(json.dumps([*vqa_samples(1, 2)[1:], *samples]))
    code, _, err = command(family="qwen3_5")
    assert code == 2 and "2 samples cannot be used" in err and "row 1 (" not in err
    assert "row 2 (id p0q0): an answer holds <think>" in err and "row 3 (id chat): the model's chat template" in err


def test_many_bad_samples_are_counted_and_the_first_ten_listed(command, data):
    samples = [{**vqa_samples(1, 1)[0], "id": str(i), "answer": ""} for i in range(25)]
    (data / "train.json").write_text(json.dumps(samples))
    code, _, err = command()
    assert code == 2 and "25 samples cannot be used" in err and "and 15 more" in err
    assert [f"row {row} (" in err for row in (1, 10, 11)] == [True, True, False]


def test_as_a_process_of_its_own_it_exits_with_2_and_one_line_in_seconds(data, tiny_models):
    """The same without the shortcuts of these tests."""
    write_values(data / "c.yaml", config_values(data, tiny_models["qwen2_5_vl"], image_size=768))
    (data / "val.json").write_text("[]")
    ended = start_forked("train.py", "--config", data / "c.yaml")
    printed, _ = ended.communicate(timeout=60)
    assert ended.returncode == 2 and printed.count("\n") == 1 and "756 or 784" in printed


# ------------------------------------------------------------------------------------------------------------ --check


def test_check_shows_a_sample_with_its_label_mask_counts_parameters_and_steps_and_trains_nothing(command, data):
    code, out, err = command(arguments=["--check", "num_train_epochs=2.5"])
    assert (code, err) == (0, "")
    assert "train: 4 samples in" in out and "test: 2 samples in" in out and "Every image decodes." in out
    assert "[16 image tokens]" in out and "⟦red<|im_end|>⟧" in out and out.count("⟦") == 2
    assert "Image 0.png: 60×45 → 128×128 (content 128×96 at (0, 16))" in out
    assert "Batch: train_bs 2 × grad_accum 2 × 1 ranks = 4 questions a step" in out
    assert "Steps: 4 questions / 4 = 1 an epoch, 2.5 epochs = 3 steps over 10 questions" in out
    assert out.endswith("Check passed: nothing was trained.\n")
    assert not list((data / "out").glob("*.safetensors")) and not (data / "results").exists()


def test_check_warns_of_images_that_the_published_image_processor_would_enlarge(command, data, tiny_models):
    """By Qwen3-VL's own bound; the tiny models leave images of 4,096 pixels as they are."""
    folder = shutil.copytree(tiny_models["qwen3_vl"], data / "published bounds")
    write_processors(folder, "qwen3_vl", 65_536, 16_777_216)
    code, out, _ = command(arguments=["--check"], model_name=str(folder), image_size=224)
    (found,) = [line for line in out.splitlines() if "image processor enlarges" in line]
    assert code == 0 and "image_size 224 shows images of 50,176 pixels" in found
    assert found.endswith("set image_size: 256 or more")

    def warned(**changes):
        values = {"resize": "native", "image_size": None} if "max_pixels" in changes else {}
        config = load_config(write_values(data / "c.yaml", config_values(data, folder) | values | changes))
        return "".join(enlarged_by_the_processor(config, load_family(str(folder))))

    assert not warned(image_size=256) and not warned(max_pixels=65_536)
    assert warned(max_pixels=40_000).endswith("set max_pixels: 65536 or more")
    assert "shows images of at most 40,000 pixels" in warned(max_pixels=40_000)
    assert "shows images of 36,864 pixels" in warned(image_size=192), "a letterbox makes just as many"
    assert not warned(image_size=192, task="cls", num_labels=2, template="paper_decision"), "classifiers are not merged"


def test_check_refuses_an_output_folder_that_cannot_be_made(command, data):
    (data / "taken").write_text("a file")
    code, _, err = command(arguments=["--check", f"output_dir={data / 'taken' / 'out'}"])
    assert code == 2 and err.count("\n") == 1 and "output_dir" in err and "is no folder" in err


def test_check_refuses_a_rate_of_nothing(command):
    code, _, err = command(arguments=["--check", "--tflops", "0"])
    assert code == 2 and err.count("\n") == 1 and "--tflops 0" in err


def test_under_torchrun_one_rank_checks_for_all(command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert command(arguments=["--check"]) == (0, "", "")
    monkeypatch.setenv("RANK", "0")
    assert "train_bs 2 × grad_accum 2 × 2 ranks = 8 questions a step" in command(arguments=["--check"])[1]


def test_check_finds_every_bad_image_and_path_and_lists_each_with_file_and_row(command, data):
    samples = []
    for name, content in BAD_FILES.items():
        (data / name).write_bytes(content)
        samples.append({**vqa_samples(1, 1)[0], "id": name, "image": name})
    Image.fromarray(np.zeros((1, 4000, 3), dtype=np.uint8)).save(data / "strip.png")
    for name in ("missing.png", "../escapes.png", "/etc/hosts", "strip.png"):
        samples.append({**vqa_samples(1, 1)[0], "id": name, "image": name})
    samples.append({**vqa_samples(1, 1)[0], "id": "placeholder", "messages": [{"role": "user", "content": "<image>"}]})
    (data / "train.json").write_text(json.dumps([vqa_samples(1, 1)[0], *samples]))
    for changes, strip_fits in (({}, True), ({"resize": "native", "image_size": None, "max_pixels": 50_000}, False)):
        code, out, err = command(arguments=["--check"], **changes)
        assert code == 2 and "Traceback" not in err and "Check passed" not in out
        for row, sample in enumerate(samples, 2):
            found = f"train.json row {row} (id {sample['id']}): " in err
            assert found == (sample["id"] != "strip.png" or not strip_fits), (sample["id"], err)
        assert "row 1 (" not in err and f"error: {len(samples) - strip_fits} samples cannot be used" in err


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("changes", [{}, {"vision_frozen": False}, {"finetuning": "full"}])
def test_parameters_are_counted_without_weights_as_with_them(tiny_models, name, changes):
    config = replace(tiny_run(tiny_models, name).config, **changes)
    expected = parameter_table(prepare_training(load_base(config.model_name, torch.float32), config))
    assert count_parameters(config) == expected


# ---------------------------------------------------------------------------------------------------------- its parts


@pytest.mark.parametrize("name", FAMILIES)
def test_the_marked_text_puts_every_supervised_token_between_the_brackets_and_no_other(tiny_models, name):
    run = tiny_run(tiny_models, name)
    turns = [{"role": role, "content": text} for role, text in (("user", "<image>Who?"), ("assistant", "me"))] * 2
    chat = {"id": "c", "images": ["0.png", "1.png"], "messages": turns}
    for sample, count in ((vqa_samples(1, 1)[0], 1), (chat, 2))[: 1 if run.family.is_recurrent else 2]:
        (item,), _ = build_items(run.encoder(), [sample])
        text = marked_text(item, run.encoder())
        answer = "red" if count == 1 else "me"
        assert text.count("⟦") == text.count("⟧") == text.count(f"⟦{answer}<|im_end|>⟧") == count
        assert text.count("[16 image tokens]") == count and "<|image_pad|>" not in text


@pytest.mark.parametrize("resize", ["letterbox", "native"])
def test_the_quick_check_of_lengths_agrees_with_counting_every_token(tiny_models, tmp_path, resize):
    """It tokenises only samples whose bytes might not fit, and trusts an image's header."""
    run = tiny_run(tiny_models, "qwen3_vl")
    sizes = [(60, 45), (300, 200), (90, 500)]
    for number, size in enumerate(sizes):
        write_images(tmp_path, [f"{number}.png"], size=size)
    changes = {} if resize == "letterbox" else {"image_size": None, "max_pixels": 120_000}
    encoder = run.encoder(resize=resize, data=replace(run.config.data, image_root=str(tmp_path)), **changes)
    samples = [{**s, "question": s["question"] * (1 + 3 * i)} for i, s in enumerate(vqa_samples(3, 3))]
    samples += [{**s, "image": None, "images": ["0.png", "1.png"]} for s in samples[:2]]
    lengths = [len(item.input_ids) for item in build_items(encoder, samples)[0]]
    for limit in sorted({*lengths, *(length - 1 for length in lengths)}):
        encoder.config = replace(encoder.config, max_tokens=limit)
        for sample, length in zip(samples, lengths, strict=True):
            if length <= limit:
                check_samples(SampleList([sample], "s"), encoder)
            else:
                with pytest.raises(UserError, match=f"{length} tokens .* exceed max_tokens {limit}"):
                    check_samples(SampleList([sample], "s"), encoder)


def test_samples_whose_images_are_smaller_than_the_limit_allows_are_not_tokenised(tiny_models, monkeypatch):
    """With native resizing a limit of many pixels says little: the headers of the images say more."""
    run = tiny_run(tiny_models, "qwen3_vl")
    encoder = run.encoder(resize="native", image_size=None, max_pixels=4_000_000)
    tokenised, headers = [], []
    monkeypatch.setattr(SampleEncoder, "encode", lambda self, sample, images: tokenised.append(sample))
    size_only = SampleEncoder.size_only
    monkeypatch.setattr(SampleEncoder, "size_only", lambda self, path: headers.append(path) or size_only(self, path))
    check_samples(SampleList(vqa_samples(3, 9), "s"), encoder)
    assert not tokenised and sorted(headers) == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize("resize", ["letterbox", "native"])
def test_the_longest_sample_is_found_among_texts_and_images_of_all_sizes(tiny_models, tmp_path, resize):
    run = tiny_run(tiny_models, "qwen3_vl")
    for number, size in enumerate([(400, 300), (90, 90), (200, 200)]):
        write_images(tmp_path, [f"{number}.png"], size=size)
    changes = {} if resize == "letterbox" else {"image_size": None, "max_pixels": 1_000_000}
    changes |= {"max_tokens": 4000, "data": replace(run.config.data, image_root=str(tmp_path))}
    encoder = run.encoder(resize=resize, **changes)
    samples = vqa_samples(3, 3)
    lists = [
        samples,
        samples[::-1],
        [s | {"question": s["question"] * (60 if s["id"] == "p2q1" else 1)} for s in samples],
    ]
    lists.append([*samples, {**samples[0], "image": ["0.png", "2.png", "1.png"]}, samples[1]])
    for given in lists:
        lengths = [len(item.input_ids) for item in build_items(encoder, given)[0]]
        longest = survey(SampleList(given, "s"), encoder)["longest"]
        assert lengths[longest] > 0.95 * max(lengths), "tokens of texts are estimated from their bytes"


def test_twenty_thousand_samples_are_checked_in_seconds(tiny_models):
    run = tiny_run(tiny_models, "qwen3_vl")
    samples = SampleList([{**vqa_samples(1, 1)[0], "id": str(i)} for i in range(20_000)], "s")
    started = time.process_time()
    check_samples(samples, run.encoder(max_tokens=4096))
    assert time.process_time() - started < 6


def test_a_text_model_refuses_images(tiny_models):
    run = tiny_run(tiny_models, "qwen3_vl")
    encoder = SampleEncoder(run.config, load_family(str(tiny_models["qwen2"])), run.tokenizer)
    with pytest.raises(UserError, match="has images but model_name is a text model"):
        check_samples(SampleList(vqa_samples(1, 1), "s"), encoder)


def test_a_text_model_needs_no_image_size(command, data):
    for split in ("train", "test"):
        sample = {"id": split, "question": "Is it accepted?", "answer": "accept"}
        (data / f"{split}.json").write_text(json.dumps([sample]))
    code, out, err = command(family="qwen2", image_size=None, arguments=["--check"])
    assert (code, err) == (0, "") and "⟦accept<|im_end|>⟧" in out and "Check passed" in out


def test_the_plan_of_exp2_is_printed_as_the_arithmetic_of_its_batches(tiny_models, tmp_path):
    values = config_values(tmp_path, tiny_models["qwen3_vl"], train_bs=4, grad_accum=8, num_train_epochs=3)
    config = load_config(write_values(tmp_path / "c.yaml", values))
    plan = BatchPlan(41_079, config.train_bs * config.grad_accum * 2, config.num_train_epochs, config.order, 42)
    assert batch_arithmetic(config, plan, 2) == [
        "Batch: train_bs 4 × grad_accum 8 × 2 ranks = 64 questions a step",
        "Steps: 41,079 questions / 64 = 642 an epoch, 3 epochs = 1,926 steps over 123,237 questions",
    ]


def test_a_warmup_that_the_run_does_not_reach_the_end_of_is_said(tiny_models):
    run = tiny_run(tiny_models, "qwen3_vl")
    plan = BatchPlan(40, 4, 1, "sequential", 0)
    said = [len(batch_arithmetic(replace(run.config, warmup_steps=steps), plan, 1)) == 3 for steps in (0, 9, 10, 500)]
    assert said == [False, False, True, True]
    *_, line = batch_arithmetic(replace(run.config, warmup_steps=500), plan, 1)
    assert line.startswith("WARNING: warmup_steps is 500 and the run has 10 steps")


@pytest.mark.parametrize(("task", "rate"), [("vqa", "2.0 QA/s"), ("click", "2.0 clicks/s"), ("cls", "2.0 papers/s")])
def test_a_log_line_counts_what_the_task_counts(tiny_models, task, rate):
    config = replace(tiny_run(tiny_models, "qwen3_vl").config, task=task)
    values = dict.fromkeys(("epoch", "loss", "grad_norm", "learning_rate", "seconds_per_step", "data_share"), 1.0)
    line = step_line({**values, "step": 1, "qa_per_second": 2, "memory_gb": 1}, 10, 60, counted(config))
    assert f" | {rate} | data " in line


def test_the_plan_takes_batch_order_and_seed_from_the_config(tiny_models):
    run = tiny_run(tiny_models, "qwen3_vl")
    samples = SampleList(vqa_samples(3, 4)[::-1], "s")
    config = replace(run.config, order="images", seed=3, train_bs=3, grad_accum=2, num_train_epochs=1.5)
    plan = make_plan(config, samples, run.encoder(), world_size=2)
    assert (plan.batch, plan.total_steps, plan.total_questions) == (12, 2, 18)
    images = [samples[int(row)]["image"] for row in plan.epoch_order(0)]
    assert images == [name for name in dict.fromkeys(images) for _ in range(4)]


def test_the_log_says_behind_how_many_prefixes_a_step_lies_however_it_is_cut(tiny_models):
    run = tiny_run(tiny_models, "qwen3_vl")
    samples = SampleList(vqa_samples(3, 8), "s")

    def line(**changes):
        config = replace(run.config, **{"order": "sequential", "train_bs": 2, "grad_accum": 4, **changes})
        encoder = run.encoder(**changes)
        return prefix_sharing(config, make_plan(config, samples, encoder, 1), samples, encoder)

    assert batch_arithmetic(replace(run.config, template="sequential_cot"), BatchPlan(9, 3, 1, "random", 0), 1)[1] == (
        "Steps: 9 conversations / 3 = 3 an epoch, 1 epochs = 3 steps over 9 conversations"
    )
    said = "Sharing: a step's 8 questions lie behind {} image prefixes"
    assert line() == line(train_bs=8, grad_accum=1) == line(num_train_epochs=0.3) == [said.format("1.0")]
    assert line(share_prefix=False) == line(image="none") == line(train_bs=1, grad_accum=1) == []


# --------------------------------------------------------------------------------------- what a resume must see again


@pytest.fixture
def hashes(tiny_models, tmp_path):
    """hashes(samples, **changes) of samples whose images lie in `tmp_path`."""
    run = tiny_run(tiny_models, "qwen3_vl")
    write_images(tmp_path, ["0.png", "1.png", "2.png"])

    def hashes(samples=None, folder=tmp_path, **changes):
        encoder = run.encoder(data=replace(run.config.data, image_root=str(folder)), **changes)
        return input_hashes(SampleList(samples or vqa_samples(3, 2), "s"), encoder)

    return hashes


def test_the_hash_of_the_images_survives_a_copy_and_new_times_and_no_other_bytes(hashes, tmp_path):
    before = hashes()
    copy = shutil.copytree(tmp_path, tmp_path / "copy", copy_function=shutil.copyfile)
    os.utime(copy / "1.png", (1, 1))
    write_images(copy, ["of no sample.png"])
    assert hashes(folder=copy) == before
    content = {name: (copy / name).read_bytes() for name in ("0.png", "1.png", "2.png")}
    last_byte = content["1.png"][:-1] + b"?"
    for other in ({"1.png": content["1.png"] + b"?"}, {"1.png": last_byte}, {"0.png": content["1.png"]}):
        for name, changed in (content | other).items():
            (copy / name).write_bytes(changed)
        now = hashes(folder=copy)
        assert now["images"] != before["images"] and now["prompt"] == before["prompt"]
    assert hashes(folder=copy, image="none") == hashes(image="none"), "no image is shown"
    (copy / "2.png").unlink()
    with pytest.raises(UserError, match=r"2\.png: No such file"):
        hashes(folder=copy)


def test_an_image_that_is_turned_in_its_header_alone_is_another_one(hashes, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8))
    found = []
    for orientation in (1, 3):
        exif = Image.Exif()
        exif[0x0112] = orientation
        noise.save(tmp_path / "0.jpg", exif=exif)
        assert (tmp_path / "0.jpg").stat().st_size > 3 * END_BYTES
        found.append(hashes([{**vqa_samples(1, 1)[0], "image": "0.jpg"}])["images"])
    assert len(set(found)) == 2


def test_the_hash_of_the_prompt_is_that_of_token_ids_and_labels_of_samples_throughout_the_file(hashes, monkeypatch):
    samples = [{**vqa_samples(1, 1)[0], "id": str(i)} for i in range(300)]
    before = hashes(samples)["prompt"]
    assert hashes(samples)["prompt"] == before
    for row in range(0, 300, 70):
        changed = [dict(sample) for sample in samples]
        for sample in changed[row : row + 10]:
            sample["answer"] = "blue"  # tokens are labels
        assert hashes(changed)["prompt"] != before
    assert hashes(samples, template="plain")["prompt"] != before
    monkeypatch.setitem(templates.SYSTEM_PROMPTS, "ultra_condensed", "Answer.")
    assert hashes(samples)["prompt"] != before


@pytest.mark.parametrize("order", ["random", "sequential"])
def test_a_resume_refuses_to_go_on_in_an_order_that_is_drawn_otherwise(data, tiny_models, monkeypatch, order):
    """Under a numpy that draws otherwise, or from a checkpoint that does not say what was drawn."""
    keys = {"num_train_epochs": 1, "data": {"val": None, "test": None}, "order": order, "seed": 5}
    path = str(write_values(data / "c.yaml", config_values(data, tiny_models["qwen3_vl"], **keys)))
    train.main(["--config", path])
    state = data / "out" / "checkpoint-1" / "trainer_state.json"
    recorded = json.loads(state.read_text())
    without = {**recorded, "input_hashes": {k: v for k, v in recorded["input_hashes"].items() if k != "order"}}
    other = np.random.RandomState
    cases = (recorded, other, True), (recorded, lambda seed: other([*seed, 1]), False), (without, other, False)
    for now, draws, is_same in cases:
        state.write_text(json.dumps(now))
        with monkeypatch.context() as patch:
            patch.setattr(np.random, "RandomState", draws)
            if is_same or order == "sequential":
                train.main(["--config", path])
            else:
                with pytest.raises(UserError, match=r"^the order that is drawn for order 'random' .*changed"):
                    train.main(["--config", path])


def test_a_resume_refuses_replaced_images_and_a_changed_prompt_until_they_are_set_back(
    data, tiny_models, monkeypatch, capsys
):
    values = config_values(data, tiny_models["qwen3_vl"], num_train_epochs=1, data={"val": None, "test": None})
    path = str(write_values(data / "c.yaml", values))

    def refused() -> str:
        with pytest.raises(UserError) as caught:
            train.main(["--config", path])
        assert "\n" not in str(caught.value) and "set this back, or choose a new output_dir" in str(caught.value)
        return str(caught.value)

    train.main(["--config", path])
    before = (data / "1.png").read_bytes()
    (data / "1.png").write_bytes((data / "2.png").read_bytes())
    assert refused().startswith(f"image files of data.train in {data} changed since {data}/out/checkpoint-1 was saved")
    (data / "1.png").write_bytes(before)
    with monkeypatch.context() as patch:
        patch.setitem(templates.SYSTEM_PROMPTS, "ultra_condensed", "Answer.")
        assert refused().startswith(
            "the prompt (templates.py, or the model's tokenizer or chat template) changed since"
        )
        state = data / "out" / "checkpoint-1" / "trainer_state.json"
        recorded = json.loads(state.read_text())
        state.write_text(json.dumps({key: recorded[key] for key in recorded if key != "input_hashes"}))
        train.main(["--config", path])  # an older checkpoint
        state.write_text(json.dumps(recorded))
    capsys.readouterr()
    train.main(["--config", path])
    assert "already complete" in capsys.readouterr().out
