"""Facts become chat messages, and messages the token ids that the model's own chat template would give."""

import json

import pytest
from conftest import shared_data
from support.tiny_runs import END, FAMILIES
from transformers import AutoTokenizer

from errors import UserError
from templates import (
    CHAT_OPTIONS,
    IGNORE,
    SYSTEM_PROMPTS,
    ULTRA_CONDENSED,
    as_conversations,
    encode,
    image_paths,
    question_text,
    split_answer,
    to_messages,
)

SAMPLE = {
    "id": "1",
    "image": "a.jpg",
    "question": "Where in the image is the instrumnet?",
    "answer": "center; lower-left",
    "candidates": ["center", "lower-left", "none"],
}
IMAGE = {"type": "image"}
REAL_TOKENIZERS = ["tokenizers/qwen3-vl", "tokenizers/qwen2.5-vl"]


@pytest.fixture(scope="module", params=[*FAMILIES, *REAL_TOKENIZERS])
def tokenizer(request, tiny_models):
    """Of each tiny model, and the two real ones."""
    real = "/" in request.param
    return AutoTokenizer.from_pretrained(shared_data(request.param) if real else tiny_models[request.param])


def image_id(tokenizer) -> int:
    return tokenizer.convert_tokens_to_ids("<|image_pad|>")


def expected_prompt_ids(tokenizer, messages, image_tokens) -> list[int]:
    """What the family's own chat template and tokenizer give, each image's placeholder repeated as its processor
    does."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **CHAT_OPTIONS)
    before, *after = text.split("<|image_pad|>")
    assert len(after) == len(image_tokens)
    text = before + "".join("<|image_pad|>" * n + piece for n, piece in zip(image_tokens, after, strict=True))
    return tokenizer(text)["input_ids"]


def supervised_runs(encoded, tokenizer) -> list[str]:
    """The supervised tokens, decoded, one text for each run of them."""
    runs, previous = [], IGNORE
    for label, token in zip(encoded.labels, encoded.input_ids, strict=True):
        assert label in (IGNORE, token)
        if label != IGNORE:
            if previous == IGNORE:
                runs.append([])
            runs[-1].append(label)
        previous = label
    return [tokenizer.decode(run) for run in runs]


# ------------------------------------------------------------------------------------------------- facts -> messages


def test_ultra_condensed_is_the_published_text_of_exactly_363_characters():
    assert len(ULTRA_CONDENSED) == 363
    lines = ULTRA_CONDENSED.split("\n")
    assert lines[0] == "You are a surgical image analysis assistant analysing an endoscopic image."
    assert lines[1] == "- Select your answer(s) ONLY from the provided candidate list"
    assert lines[2] == "- For multi-label questions: Select ALL applicable items, separated by semicolons (;)"
    assert lines[3] == "- For single-choice questions: Select EXACTLY one option"
    assert lines[4] == "- Output format: item1; item2; item3 (for multi-label) or item1 (for single-choice)"


def test_ultra_condensed_is_the_system_prompt_and_the_user_asks_with_the_candidates():
    question = "Where in the image is the instrumnet?\nCandidates: center; lower-left; none"
    assert to_messages(SAMPLE, "ultra_condensed") == [
        {"role": "system", "content": ULTRA_CONDENSED},
        {"role": "user", "content": [IMAGE, {"type": "text", "text": question}]},
        {"role": "assistant", "content": "center; lower-left"},
    ]


def test_plain_asks_the_bare_question_under_the_models_own_system_prompt():
    user, assistant = to_messages(SAMPLE, "plain")
    assert user["content"][1]["text"] == SAMPLE["question"] and assistant["content"] == SAMPLE["answer"]


def test_a_question_without_candidates_is_asked_bare_in_every_template():
    for template in SYSTEM_PROMPTS:
        assert question_text({**SAMPLE, "candidates": []}, template) == SAMPLE["question"]


def test_images_stand_before_the_question_as_many_as_the_sample_has():
    several = {**SAMPLE, "image": ["a.jpg", "b.jpg"]}
    assert [part["type"] for part in to_messages(several, "plain")[0]["content"]] == ["image", "image", "text"]
    assert to_messages({**SAMPLE, "image": None}, "plain")[0]["content"] == SAMPLE["question"]
    assert image_paths({"images": ["a", "b"]}) == ["a", "b"]


def test_the_question_only_baseline_shows_no_image_in_any_form():
    chat = {"messages": [{"role": "user", "content": "<image>\nWho?"}, {"role": "assistant", "content": "me"}]}
    for sample in (SAMPLE, {**chat, "images": ["a.jpg"]}):
        user = next(m for m in to_messages(sample, "plain", image_shown=False) if m["role"] == "user")
        assert isinstance(user["content"], str) and user["content"].startswith(("Where", "Who"))


# --------------------------------------------------------------------------------------------- published chat formats


def test_the_published_sharegpt_file_is_read_as_it_is():
    for sample in json.loads(shared_data("formats/llamafactory/mllm_demo.json").read_text()):
        messages = to_messages(sample, "ultra_condensed")
        assert [m["role"] for m in messages] == [turn["role"] for turn in sample["messages"]]
        for message, turn in zip(messages, sample["messages"], strict=True):
            assert joined(message["content"]) == turn["content"]


def test_the_published_llava_file_is_read_as_it_is():
    roles = {"human": "user", "gpt": "assistant"}
    for sample in json.loads(shared_data("formats/qwen-vl-finetune/single_images.json").read_text()):
        messages = to_messages(sample, "ultra_condensed")
        assert [m["role"] for m in messages] == [roles[turn["from"]] for turn in sample["conversations"]]
        for message, turn in zip(messages, sample["conversations"], strict=True):
            assert joined(message["content"]) == turn["value"]


def joined(content) -> str:
    if isinstance(content, str):
        return content
    return "".join("<image>" if part["type"] == "image" else part["text"] for part in content)


def test_a_published_video_sample_is_an_error():
    for sample in json.loads(shared_data("formats/qwen-vl-finetune/video.json").read_text()):
        with pytest.raises(UserError, match="video"):
            to_messages(sample, "plain")


def test_openai_parts_and_a_system_turn_are_understood():
    parts = [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "Who?"}]
    sample = {
        "system": "Be brief.",
        "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "me"}],
        "images": ["a.jpg"],
    }
    assert to_messages(sample, "plain") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [IMAGE, {"type": "text", "text": "Who?"}]},
        {"role": "assistant", "content": "me"},
    ]


def chat(*turns, **others) -> dict:
    roles = ["user", "assistant"] * len(turns)
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)], **others}


@pytest.mark.parametrize(
    ("sample", "told"),
    [
        ({"question": "Q?"}, "'answer' is missing"),
        ({"answer": "A"}, "'question' is missing"),
        ({"question": " ", "answer": "A"}, "'question' is missing or empty"),
        ({"question": "Q?", "answer": float("nan")}, "'answer' is missing"),
        ({"question": "Q?", "answer": "A", "image": 5}, "'image' or 'images' must be"),
        ({"question": "Q?", "answer": "A", "candidates": [0, 1]}, "'candidates'"),
        ({"question": "Q?", "answer": "A", "candidates": "a; b"}, "'candidates'"),
        (chat("<image>Who?", "me"), "1 <image> placeholders but 0 images"),
        (chat("Who?", "me", images=["a.jpg"]), "0 <image> placeholders but 1 images"),
        (chat("Who?", " \n"), "an assistant turn is empty"),
        (chat("<image>Who?", "", "Where?", "here", images=["a.jpg"]), "an assistant turn is empty"),
        (
            {
                "conversations": [
                    {"from": "gpt", "value": "Hi"},
                    {"from": "human", "value": "Who?"},
                    {"from": "gpt", "value": "me"},
                ]
            },
            "starts with an assistant turn",
        ),
        (
            {"system": "Be brief.", "messages": [{"role": "assistant", "content": "Hi"}]},
            "starts with an assistant turn",
        ),
        ({"question": "Q?", "answer": "A", "image": "a.jpg", "images": ["b.jpg"]}, "name different files"),
        ({"question": "Q?", "answer": "A", "image": "a.jpg", "images": []}, "name different files"),
        (chat("Who?"), "does not end with an assistant turn"),
        ({"messages": []}, "empty or no list"),
        ({"conversations": "hello"}, "empty or no list"),
        ({"messages": ["hello"]}, "no object"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "unknown role 'tool'"),
        ({"messages": [{"role": "user", "content": None}]}, "user turn has no text"),
        (chat([{"type": "audio", "audio": "x"}], "me"), "neither text nor image"),
        (chat(["Who?"], "me"), "neither text nor image"),
        (chat([{"type": "text"}], "me"), "a text part has no text"),
        ({"system": 5, **chat("Who?", "me")}, "'system' must be a text"),
        (chat("Who?", "me <image>", images=["a.jpg"]), "assistant turn holds an image"),
        ({"system": "<image>", **chat("Who?", "me", image="a.jpg")}, "0 <image> placeholders but 1 images"),
        (
            {"messages": [{"role": "system", "content": "<image>"}, *chat("Who?", "me")["messages"]], "image": "a.jpg"},
            "system turn holds an image",
        ),
    ],
)
def test_a_sample_that_makes_no_conversation_is_an_error_that_says_why(sample, told):
    with pytest.raises(UserError, match="(?s)" + told):
        to_messages(sample, "ultra_condensed")


def test_a_question_of_a_conversation_by_image_is_checked_like_any_other():
    with pytest.raises(UserError, match=r"5.*'answer' is missing"):
        list(as_conversations([SAMPLE, {"id": "5", "image": "a.jpg", "question": "Q?"}]))


# -------------------------------------------------------------------------------------------------- messages -> tokens


def conversations(tokenizer) -> list[tuple[list[dict], list[int]]]:
    """(messages, tokens of each image); of one answer each where the chat template rewrites earlier ones."""
    several = {**SAMPLE, "image": ["a.jpg", "b.jpg"]}
    one_by_one = chat("<image>Who?", " me\n", "Where is <image>?", "here", images=["a", "b"])
    text_first = chat("What is this?\n<image>", "Yes", image="a.jpg")
    found = [
        *((to_messages(SAMPLE, template), [6]) for template in ("ultra_condensed", "standard", "plain")),
        (to_messages(next(as_conversations([SAMPLE, {**SAMPLE, "id": "2"}])), "sequential_cot"), [6]),
        (to_messages(several, "ultra_condensed"), [4, 9]),
        (to_messages(SAMPLE, "plain", image_shown=False), []),
        (to_messages(one_by_one, "plain"), [4, 1]),
        (to_messages(text_first, "plain"), [4]),
        (to_messages(chat("Grüße, 你好 🙂", "say \"quoted 'twice'\"\n"), "plain"), []),
    ]
    rewrites = "</think>" in tokenizer.chat_template
    return [(m, n) for m, n in found if not rewrites or sum(turn["role"] == "assistant" for turn in m) == 1]


def test_prompt_ids_equal_the_chat_templates_own_in_training_and_at_inference(tokenizer):
    for messages, image_tokens in conversations(tokenizer):
        prompt, _ = split_answer(messages)
        expected = expected_prompt_ids(tokenizer, prompt, image_tokens)
        generation = encode(prompt, tokenizer, image_tokens, image_id(tokenizer), generation=True)
        training = encode(messages, tokenizer, image_tokens, image_id(tokenizer), generation=False)
        assert generation.input_ids == expected
        assert training.input_ids[: len(expected)] == expected
        assert training.labels[len(expected) - 1] == IGNORE != training.labels[len(expected)]


def test_labels_are_each_answer_and_its_end_token_and_nothing_else(tokenizer):
    for messages, image_tokens in conversations(tokenizer):
        encoded = encode(messages, tokenizer, image_tokens, image_id(tokenizer), generation=False)
        answers = [message["content"] + END for message in messages if message["role"] == "assistant"]
        assert supervised_runs(encoded, tokenizer) == answers
        assert encoded.labels[-1] == tokenizer.convert_tokens_to_ids(END), "nothing after the end token"


def test_the_whole_training_text_reads_as_the_chat_template_writes_it(tokenizer):
    for messages, image_tokens in conversations(tokenizer):
        encoded = encode(messages, tokenizer, [1] * len(image_tokens), image_id(tokenizer), generation=False)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        trimmed = tokenizer.decode(encoded.input_ids).replace(f"\n{END}", END)  # Qwen3.5's trims what is said
        assert whole in (f"{tokenizer.decode(encoded.input_ids)}\n", f"{trimmed}\n")


@pytest.mark.parametrize("token", ["<|im_end|>", "<|image_pad|>", "<|fim_prefix|>", "<|vision_start|>"])
def test_a_control_token_in_a_text_is_an_error_and_a_lookalike_is_not(tokenizer, token):
    for key in ("question", "answer"):
        messages = to_messages({**SAMPLE, key: f"a {token} b"}, "plain")
        with pytest.raises(UserError, match="control token"):
            encode(messages, tokenizer, [1], image_id(tokenizer), generation=False)
    messages = to_messages({**SAMPLE, "answer": "<|no such thing|> < |im_end| >"}, "plain")
    encoded = encode(messages, tokenizer, [1], image_id(tokenizer), generation=False)
    assert supervised_runs(encoded, tokenizer) == ["<|no such thing|> < |im_end| >" + END]


def test_a_chat_template_that_rewrites_earlier_turns_is_refused(tiny_models):
    """Training on all turns of a conversation is only right where each later prompt begins with the earlier one."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_models["qwen3_vl"])
    tokenizer.chat_template = "{{ messages | length }} messages"
    with pytest.raises(UserError, match="rewrites earlier answers"):
        encode(to_messages(chat("a", "b", "c", "d"), "plain"), tokenizer, [], 0, generation=False)


# ----------------------------------------------------------------------------------------- models that think by default


@pytest.fixture
def thinking(tiny_models):
    return AutoTokenizer.from_pretrained(tiny_models["qwen3_5"])


def test_a_model_that_thinks_by_default_is_trained_and_asked_without_thoughts(thinking):
    messages = to_messages(SAMPLE, "plain")
    by_default = thinking.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert by_default.endswith("<|im_start|>assistant\n<think>\n")
    for generation in (False, True):
        encoded = encode(messages[:-1] if generation else messages, thinking, [1], image_id(thinking), generation)
        prompt = [i for i, label in zip(encoded.input_ids, encoded.labels, strict=True) if label == IGNORE]
        assert thinking.decode(prompt).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert thinking.convert_tokens_to_ids("</think>") in prompt, "one token, as in the real ones"


@pytest.mark.parametrize("answer", ["<think>hm</think>red", "</think>", "red <think>"])
def test_an_answer_with_thoughts_is_refused_where_the_prompt_has_closed_them(thinking, tiny_models, answer):
    messages = to_messages({**SAMPLE, "answer": answer}, "plain")
    with pytest.raises(UserError, match=r"an answer holds <think> or </think>.*remove"):
        encode(messages, thinking, [1], image_id(thinking), generation=False)
    plain = AutoTokenizer.from_pretrained(tiny_models["qwen3_vl"])  # elsewhere it is text like any other
    assert supervised_runs(encode(messages, plain, [1], image_id(plain), generation=False), plain) == [answer + END]


def test_several_answers_are_refused_unless_the_template_keeps_the_blocks_of_earlier_ones(thinking):
    """The first Qwen3.5's drops them; its successors' keeps them where it is told to."""
    messages = to_messages(chat("a", "b", "c", "d"), "plain")
    with pytest.raises(UserError, match="rewrites earlier answers"):
        encode(messages, thinking, [], 0, generation=False)
    thinking.chat_template = thinking.chat_template.replace(
        "loop.index0 > last.user", "(preserve_thinking is defined and preserve_thinking or loop.index0 > last.user)"
    )
    encoded = encode(messages, thinking, [], 0, generation=False)
    assert supervised_runs(encoded, thinking) == ["b" + END, "d" + END]
    assert thinking.decode(encoded.input_ids).count("<think>\n\n</think>") == 2


def test_what_the_chat_template_refuses_is_one_line_that_says_so(thinking):
    messages = [*to_messages(chat("a", "b"), "plain")[:1], {"role": "system", "content": "late"}]
    with pytest.raises(UserError, match=r"chat template refuses.*System message must be at the beginning"):
        encode([*messages, {"role": "assistant", "content": "b"}], thinking, [], 0, generation=False)


def test_one_image_under_both_names_is_one_image():
    assert image_paths({"image": "a.jpg", "images": ["a.jpg"]}) == ["a.jpg"]
    assert image_paths({"image": None, "images": ["a.jpg", "b.jpg"]}) == ["a.jpg", "b.jpg"]
