"""The whole story on real images, by the commands a user types: prepare, check, train to memorise, evaluate."""

import csv
import json

import pytest
import torch
import yaml
from conftest import shared_data
from peft import PeftModel
from support.forked import start_forked
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from images import letterbox, open_image
from templates import split_answer, to_messages

RATE, EPOCHS = 4e-3, 60


def command(*arguments, folder) -> str:
    """What `python SCRIPT ...` prints; its exit code is 0."""
    ended = start_forked(*arguments, folder=folder)
    printed, _ = ended.communicate(timeout=180)
    assert ended.returncode == 0, printed
    return printed


@pytest.fixture(scope="module")
def story(tiny_models, tmp_path_factory):
    """(folder, printed by each command) after prepare_data.py, train.py and evaluate.py."""
    raw, folder = shared_data("kvasir/kvasir-vqa"), tmp_path_factory.mktemp("story")
    printed = {"prepare": command("prepare_data.py", "kvasir", "--source", raw, "--out", "data", folder=folder)}
    # Three images would be split; to memorise, everything is trained on and asked again.
    samples = [s for split in ("train", "val", "test") for s in json.loads((folder / f"data/{split}.json").read_text())]
    (folder / "all.json").write_text(json.dumps(samples))
    config = {
        "experiment": "THE STORY",
        "model_name": str(tiny_models.build("qwen3_vl", teachable=True)),
        "task": "vqa",
        "template": "ultra_condensed",
        "data": {**dict.fromkeys(("train", "val", "test"), "all.json"), "image_root": str(raw)},
        "output_dir": "out",
        "results_dir": "results",
        "lora": {"r": 64, "alpha": 128, "dropout": 0.0},
        "learning_rate": RATE,
        "warmup_steps": 5,
        "image_size": 96,
        "train_bs": 9,
        "grad_accum": 2,
        "num_train_epochs": EPOCHS,
        "order": "random",
        "logging_steps": 10,
        "save_steps": 1000,
        "dataloader_num_workers": 1,
    }
    (folder / "story.yaml").write_text(yaml.safe_dump(config))
    for script in ("train.py", "evaluate.py"):
        printed[script] = command(script, "--config", "story.yaml", folder=folder)
    return folder, printed


def test_at_least_90_percent_of_all_19_real_answers_are_memorised(story):
    folder, _ = story
    lines = (folder / "results/generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    predictions = {(row["images"][0], row["question"]): row for row in map(json.loads, lines)}
    with open(shared_data("kvasir/kvasir-vqa") / "metadata.csv", newline="", encoding="utf-8") as table:
        asked = list(csv.DictReader(table))
    assert len(asked) == 19 and len(predictions) == 18, "one of the rows is there twice"
    right = 0
    for row in asked:
        line = predictions[f"images/{row['img_id']}.jpg", row["question"]]
        assert line["answer"] == row["answer"]
        right += {item.strip() for item in line["prediction"].split(";")} == {
            item.strip() for item in row["answer"].split(";")
        }
    assert right / len(asked) >= 0.9


def test_the_scores_say_the_same_and_the_answers_end_by_themselves(story):
    folder, printed = story
    scores = json.loads((folder / "results/predict_results.json").read_text())
    assert scores["predict_accuracy"] >= 0.9 and scores["predict_samples"] == 18 and scores["cut_off"] == 0
    assert f"{100 * scores['predict_accuracy']:.1f} %" in printed["evaluate.py"]


def test_the_log_reads_as_one_story_with_the_lines_that_people_grep_for(story):
    folder, printed = story
    log = printed["train.py"]
    for line in (
        "✓ Letterbox mode enabled: 96×96",
        "THE STORY",
        "Batch: train_bs 9 × grad_accum 2 × 1 ranks = 18 questions a step",
    ):
        assert line in log
    steps = [line for line in log.splitlines() if line.startswith("step ")]
    rows = [json.loads(line) for line in (folder / "out/log.jsonl").read_text().splitlines()]
    assert len(steps) == len(rows) == EPOCHS // 10
    assert [row["step"] for row in rows] == list(range(10, EPOCHS + 1, 10))
    assert rows[-1]["epoch"] == EPOCHS and rows[-1]["loss"] < rows[0]["loss"]
    for key in ("grad_norm", "learning_rate", "seconds_per_step", "qa_per_second", "tokens_per_second", "data_share"):
        assert rows[-1][key] >= 0
    last = f"step {EPOCHS}/{EPOCHS} | epoch {EPOCHS:.2f} | loss {rows[-1]['loss']:.4f} | grad_norm "
    assert steps[-1].startswith(last)
    assert log.rstrip().endswith("the model is in out")


def test_the_adapter_loads_with_plain_peft_and_gives_the_same_answers(story, tiny_models):
    folder, _ = story
    base = AutoModelForImageTextToText.from_pretrained(tiny_models.build("qwen3_vl", teachable=True))
    model = PeftModel.from_pretrained(base, folder / "out")
    tokenizer = AutoTokenizer.from_pretrained(folder / "out")
    processor = AutoImageProcessor.from_pretrained(folder / "out", backend="pil")
    lines = (folder / "results/generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    for line in list(map(json.loads, lines))[::6]:
        messages, _ = split_answer(to_messages({**line, "image": line["images"]}, "ultra_condensed"))
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        image, _ = letterbox(open_image(shared_data("kvasir/kvasir-vqa") / line["images"][0]), 96)
        ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * 9), return_tensors="pt")["input_ids"]
        answer = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            **processor(images=[image], return_tensors="pt"),
            do_sample=False,
            max_new_tokens=40,
        )
        assert tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True).strip() == line["prediction"]
