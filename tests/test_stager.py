"""stager.py: the stage of each real question, and a language model's scores."""

import csv
import json

import pytest
from conftest import shared_data
from test_prepare_data import prepare, small_raw

import prepare_data
from errors import UserError
from prepare import stager

# The 19 question strings of Kvasir-VQA, spelling included, with the stage a reader would expect.
REAL_QUESTIONS = {
    "What type of procedure is the image taken from?": 1,
    "Is there a green/black box artefact?": 1,
    "Is there text?": 1,
    "Is this finding easy to detect?": 1,
    "Does this image contain any finding?": 2,
    "Are there any abnormalities in the image? Check all that are present.": 2,
    "Are there any anatomical landmarks in the image? Check all that are present.": 2,
    "Are there any instruments in the image? Check all that are present.": 2,
    "How many findings are present?": 2,
    "How many instrumnets are in the image?": 2,
    "How many polyps are in the image?": 2,
    "What color is the abnormality? If more than one separate with ;": 2,
    "What color is the anatomical landmark? If more than one separate with ;": 2,
    "What is the size of the polyp?": 2,
    "What type of polyp is present?": 2,
    "Where in the image is the abnormality?": 2,
    "Where in the image is the anatomical landmark?": 2,
    "Where in the image is the instrument?": 2,
    "Have all polyps been removed?": 3,
}


@pytest.mark.parametrize(("question", "stage"), REAL_QUESTIONS.items())
def test_the_rules_put_each_real_question_where_a_reader_expects_it(question, stage):
    assert stager.stage_by_rules(question) == stage


def test_the_rules_know_every_question_of_the_real_rows():
    found = set()
    for name in ("kvasir/kvasir_vqa_3000.csv", "kvasir/kvasir-vqa/metadata.csv"):
        with open(shared_data(name), encoding="utf-8", newline="") as file:
            found |= {row["question"] for row in csv.DictReader(file)}
    assert len(found) == 17 and found <= set(REAL_QUESTIONS)


@pytest.mark.parametrize(
    ("question", "stage"),
    [
        ("What is the image quality?", 1),
        ("Which kind of examination is this?", 1),
        ("Is any text visible in the image?", 1),
        ("WHAT COLOUR IS THE LESION?", 2),
        ("What abnormality is visible in the image?", 2),
        ("Which tool is used?", 2),
        ("What is the most likely diagnosis?", 3),
        ("Which treatment would you recommend?", 3),
        ("Where was the polyp removed?", 3),
        ("Quo vadis?", None),
    ],
)
def test_the_rules_carry_over_to_questions_of_the_same_kinds(question, stage):
    assert stager.stage_by_rules(question) == stage


def test_stages_are_written_one_question_a_line_by_stage(tmp_path):
    text = stager.stages_text({"b?": 2, "a?": {"stage": 3, "margin": 0.5}, 'c "quoted" ü?': 1})
    assert text.splitlines() == [
        "{",
        '  "c \\"quoted\\" ü?": 1,',
        '  "b?": 2,',
        '  "a?": {"stage": 3, "margin": 0.5}',
        "}",
    ]
    (tmp_path / "stages.json").write_text(text, encoding="utf-8")
    assert stager.stage_numbers(stager.load_stages(tmp_path / "stages.json")) == {'c "quoted" ü?': 1, "b?": 2, "a?": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ('{"a?": ' + "9" * 5000 + "}", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "must be an object"),
        ('{"a?": 4}', "1, 2 or 3 for: a?"),
        ('{"a?": true}', "a?"),
    ],
)
def test_a_broken_stages_file_is_an_error_that_names_it(tmp_path, text, message):
    (tmp_path / "stages.json").write_text(text)
    with pytest.raises(UserError, match=r"stages\.json.*") as error:
        stager.assign_stages(["Is there text?"], "rules", tmp_path / "stages.json")
    assert message in str(error.value)


def entry_of(scores, **more):
    return {"stage": int(max(scores, key=scores.get)), "margin": 1.0, "scores": scores, "model": "m", **more}


def test_a_person_decided_an_entry_when_its_stage_is_not_its_stagers():
    question = "Is there text?"
    scores = {"1": -3.0, "2": -1.0, "3": -2.0}
    assert not stager.decided_by_hand(question, 1) and stager.decided_by_hand(question, 2)
    assert not stager.decided_by_hand(question, entry_of(scores, review=True))
    assert stager.decided_by_hand(question, entry_of(scores, review=False)), "a settled review"
    assert stager.decided_by_hand(question, entry_of(scores) | {"stage": 1})
    assert stager.decided_by_hand("Quo vadis?", 2), "no rule says so"


def test_the_model_stager_scores_all_real_questions_once_and_gives_the_same_again(tiny_models, tmp_path):
    name = str(tiny_models["qwen2"])
    path = tmp_path / "stages.json"
    entries, by_hand = stager.assign_stages(REAL_QUESTIONS, name, path)
    assert set(entries) == set(REAL_QUESTIONS) and not by_hand
    for entry in entries.values():
        first, second = sorted(entry["scores"].values(), reverse=True)[:2]
        assert set(entry["scores"]) == {"1", "2", "3"} and entry["model"] == name
        assert entry["scores"][str(entry["stage"])] == first
        assert entry["margin"] == pytest.approx(first - second, abs=2e-4)
        assert entry.get("review", False) == (entry["margin"] < stager.REVIEW_MARGIN)
    shuffled = sorted(REAL_QUESTIONS, key=len)
    assert stager.assign_stages(shuffled, name, path)[0] == entries, "a question's scores do not depend on the others"


def test_the_scores_are_the_models_own_log_probabilities(tiny_models):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_models["qwen2"])
    model = AutoModelForCausalLM.from_pretrained(tiny_models["qwen2"], dtype=torch.float32).eval()
    scores = stager.label_scores("Is there text?", tokenizer, model)
    message = [{"role": "user", "content": stager.PROMPT.format(question="Is there text?")}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        next_token = torch.log_softmax(model(input_ids=ids["input_ids"]).logits[0, -1], dim=-1)
    for stage in ("1", "2", "3"):
        (token,) = tokenizer.encode(stage, add_special_tokens=False)
        assert scores[stage] == pytest.approx(next_token[token].item(), abs=1e-5)


def test_the_model_is_not_loaded_when_its_answers_are_on_file_and_hand_edits_survive_it(
    tiny_models, tmp_path, monkeypatch
):
    name, raw, data = str(tiny_models["qwen2"]), small_raw(tmp_path / "raw"), tmp_path / "data"
    prepare(raw, data, "--stager", name)
    stages = json.loads((data / "stages.json").read_text())
    edited, settled, _ = stages
    stages[edited]["stage"] = stages[edited]["stage"] % 3 + 1
    stages[settled]["review"] = False
    (data / "stages.json").write_text(json.dumps(stages))
    monkeypatch.setattr(stager, "_load", lambda name: pytest.fail("the model was loaded again"))
    by_split = prepare(raw, data, "--stager", name)
    assert json.loads((data / "stages.json").read_text()) == stages
    assert {s["stage"] for s in by_split["train"] if s["question"] == edited} == {stages[edited]["stage"]}
    prepare(raw, data)  # the rules: they decide what no person did
    after = json.loads((data / "stages.json").read_text())
    assert after[edited] == stages[edited] and after[settled] == stages[settled]
    assert [entry for entry in after.values() if isinstance(entry, int)] == [
        stager.stage_by_rules(question) for question in after if question not in (edited, settled)
    ]


def test_a_narrow_margin_is_marked_for_a_human(monkeypatch):
    scores = {"clear?": {"1": -5.0, "2": -0.1, "3": -4.0}, "close?": {"1": -1.0, "2": -1.2, "3": -4.0}}
    monkeypatch.setattr(stager, "_load", lambda name: (None, None))
    monkeypatch.setattr(stager, "label_scores", lambda question, tokenizer, model: scores[question])
    entries = stager.stages_by_model(list(scores), "m")
    assert entries["clear?"] == {"stage": 2, "margin": 3.9, "scores": scores["clear?"], "model": "m"}
    assert entries["close?"]["stage"] == 1 and entries["close?"]["review"] is True


def test_a_stager_that_is_no_language_model_is_a_user_error(tiny_models, tmp_path):
    for name in (str(tmp_path / "nowhere"), str(tiny_models["qwen3_vl"])):
        with pytest.raises(UserError, match="no causal language model") as error:
            prepare_data.main(
                [
                    "kvasir",
                    "--source",
                    str(small_raw(tmp_path / "raw")),
                    "--out",
                    str(tmp_path / "data"),
                    "--stager",
                    name,
                ]
            )
        assert "\n" not in str(error.value) and not (tmp_path / "data").exists()
