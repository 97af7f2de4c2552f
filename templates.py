"""Sample -> chat messages -> token ids and label mask.

A sample holds facts; a template decides how they are said. The model's own chat template lays the messages out, so the
prompt of training and the prompt of inference are the same tokens.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from errors import UserError

IGNORE = -100  # label of a token that is not supervised (PyTorch's cross-entropy default)

ULTRA_CONDENSED = (
    "You are a surgical image analysis assistant analysing an endoscopic image.\n"
    "- Select your answer(s) ONLY from the provided candidate list\n"
    "- For multi-label questions: Select ALL applicable items, separated by semicolons (;)\n"
    "- For single-choice questions: Select EXACTLY one option\n"
    "- Output format: item1; item2; item3 (for multi-label) or item1 (for single-choice)"
)

STANDARD = (
    "You are an expert in gastrointestinal endoscopy. Look at the image and answer the question about it. "
    "Choose your answer from the candidates that are given with the question. If several of them are true, name all of "
    "them, separated by semicolons (;). Reply with the chosen candidates only, without an explanation."
)
SEQUENTIAL_COT = f"{ULTRA_CONDENSED}\n- The questions follow one another: build on your earlier answers about the image"

# template -> system prompt; None: the chat template's own default
SYSTEM_PROMPTS = {
    "ultra_condensed": ULTRA_CONDENSED,
    "standard": STANDARD,
    "plain": None,
    "candidates": None,  # the question and its candidates, for sets of any subject
    "sequential_cot": SEQUENTIAL_COT,  # one conversation per image, see `as_conversations`
}
CONVERSATION_TEMPLATE = "sequential_cot"

# What the model's own chat template is told, in training and inference alike; a template that knows neither ignores
# them. Answers here are short facts: models that think by default get their empty block of thoughts, and keep it before
# earlier answers, as they were asked.
CHAT_OPTIONS = {"enable_thinking": False, "preserve_thinking": True}


def question_text(sample: dict, template: str) -> str:
    """What the user's turn says after the image. `plain` asks the bare question; the others list the candidates."""
    question = sample["question"]
    if template == "plain" or not sample.get("candidates"):
        return question
    return f"{question}\nCandidates: {'; '.join(sample['candidates'])}"


def to_messages(sample: dict, template: str, image_shown: bool = True) -> list[dict]:
    """Chat messages of a sample in any of the forms of the README, the gold answer as the last assistant turn.

    Returns [{"role", "content"}] where content is a text, or a list of {"type": "image"} and {"type": "text", "text"}
    parts. Raises: `UserError` that says what is wrong with the sample (the caller adds its name).
    """
    if "turns" in sample:
        return _question_by_question(sample, template, image_shown)
    if "messages" in sample or "conversations" in sample:
        messages = _conversation(sample)
        images = count_images(sample)
        placeholders = sum(
            part["type"] == "image" for m in messages if isinstance(m["content"], list) for part in m["content"]
        )
        if placeholders != images:
            raise UserError(f"{placeholders} <image> placeholders but {images} images; make them equal")
        if not image_shown:
            messages = [{**m, "content": _drop_images(m["content"])} for m in messages]
        return messages
    _check_question(sample)
    messages = []
    if SYSTEM_PROMPTS[template] is not None:
        messages.append({"role": "system", "content": SYSTEM_PROMPTS[template]})
    images = count_images(sample) if image_shown else 0
    messages.append({"role": "user", "content": with_images(images, question_text(sample, template))})
    messages.append({"role": "assistant", "content": sample["answer"]})
    return messages


def _check_question(sample: dict) -> None:
    for key in ("question", "answer"):
        if not isinstance(sample.get(key), str) or not sample[key].strip():
            raise UserError(f"key '{key}' is missing or empty; every sample needs a question and an answer")
    candidates = sample.get("candidates") or []
    if not isinstance(candidates, list) or not all(isinstance(candidate, str) for candidate in candidates):
        raise UserError("key 'candidates' must be a list of texts")


def as_conversations(samples: Sequence[dict]) -> Iterator[dict]:
    """One sample per image, whose `turns` are the image's questions in stage order (file order inside a stage).
    Raises: `UserError` naming the sample."""
    by_image: dict[tuple, list[int]] = {}  # rows: the samples themselves may fill the memory
    for row, sample in enumerate(samples):
        try:
            _check_question(sample)
        except UserError as error:
            raise UserError(f"sample {sample['id']}: {error}") from None
        by_image.setdefault(tuple(image_paths(sample)) or (sample["id"],), []).append(row)
    for rows in by_image.values():
        turns = sorted((samples[row] for row in rows), key=lambda turn: turn.get("stage") or 0)
        first = {key: turns[0][key] for key in ("image", "images", "group") if key in turns[0]}
        yield {"id": f"conversation of {turns[0]['id']}", **first, "turns": turns}


def _question_by_question(sample: dict, template: str, image_shown: bool) -> list[dict]:
    """A conversation through all questions of an image: every earlier answer stands in view of the later question."""
    messages = [{"role": "system", "content": SYSTEM_PROMPTS[template]}]
    images = count_images(sample) if image_shown else 0
    for turn in sample["turns"]:
        messages.append({"role": "user", "content": with_images(images, question_text(turn, template))})
        messages.append({"role": "assistant", "content": turn["answer"]})
        images = 0  # shown once, with the first question
    return messages


def count_images(sample: dict) -> int:
    return len(image_paths(sample))


def image_paths(sample: dict) -> list[str]:
    """Image paths of a sample, from `image` (a path or a list) or `images`."""
    given = [sample[key] for key in ("images", "image") if sample.get(key) is not None]
    given = [[paths] if isinstance(paths, str) else paths for paths in given]
    if not all(isinstance(paths, list) and all(isinstance(path, str) for path in paths) for paths in given):
        raise UserError("key 'image' or 'images' must be a path or a list of paths")
    if len(given) == 2 and given[0] != given[1]:
        raise UserError("keys 'image' and 'images' name different files; keep one of the two")
    return given[0] if given else []


def with_images(images: int, text: str):
    """The content of a turn that shows so many images before its text."""
    if not images:
        return text
    return [{"type": "image"}] * images + [{"type": "text", "text": text}]


def _drop_images(content):
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text").lstrip("\n")


_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


def _conversation(sample: dict) -> list[dict]:
    """Messages of a ShareGPT/OpenAI (`messages`) or LLaVA (`conversations`) sample, as they are."""
    if sample.get("video") or sample.get("videos"):
        raise UserError("the sample has a video; only images are supported, drop it")
    turns = sample.get("messages") or sample.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise UserError("the conversation is empty or no list; give it user and assistant turns")
    messages = []
    if sample.get("system"):
        if not isinstance(sample["system"], str):
            raise UserError("key 'system' must be a text")
        messages.append({"role": "system", "content": sample["system"]})
    for turn in turns:
        if not isinstance(turn, dict):
            raise UserError("a turn of the conversation is no object with a role and a content")
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role not in _ROLES:
            raise UserError(f"unknown role {role!r}; use user, assistant or system (LLaVA: human, gpt)")
        if isinstance(content, list):
            if not all(isinstance(part, dict) and part.get("type") in ("image", "text") for part in content):
                raise UserError("a message part is neither text nor image; only these two are supported")
            parts = [{"type": "image"} if part["type"] == "image" else part for part in content]
            if not all(isinstance(part.get("text"), str) for part in parts if part["type"] == "text"):
                raise UserError("a text part has no text")
        elif isinstance(content, str):
            pieces = re.split(r"(<image>)", content) if "<image>" in content else [content]
            parts = [
                {"type": "image"} if piece == "<image>" else {"type": "text", "text": piece}
                for piece in pieces
                if piece
            ]
        else:
            raise UserError(f"a {role} turn has no text")
        plain_text = all(part["type"] == "text" for part in parts)
        if not plain_text and _ROLES[role] != "user":  # the chat templates would drop it or show it to the loss
            raise UserError(f"a {role} turn holds an image; only user turns may")
        messages.append(
            {"role": _ROLES[role], "content": "".join(part["text"] for part in parts) if plain_text else parts}
        )
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if roles[:1] == ["assistant"]:
        raise UserError("the conversation starts with an assistant turn; put the user's turn before it")
    if any(message["role"] == "assistant" and not message["content"].strip() for message in messages):
        raise UserError("an assistant turn is empty; fill it, or drop the sample")
    if messages[-1]["role"] != "assistant":
        raise UserError("the conversation does not end with an assistant turn; nothing to learn from it")
    return messages


def split_answer(messages: list[dict]) -> tuple[list[dict], str]:
    """The prompt (all but the last assistant turn) and the gold answer. At inference only the prompt goes on."""
    return messages[:-1], messages[-1]["content"]


@dataclass
class Encoded:
    """Token ids of one sample, with the labels in place (not shifted): `IGNORE` where nothing is supervised."""

    input_ids: list[int]
    labels: list[int]


def encode(messages: list[dict], tokenizer, image_tokens: list[int], image_token_id: int, generation: bool) -> Encoded:
    """Tokenise a conversation with the model's own chat template.

    image_tokens: tokens of each image, in order. Each assistant turn's text and its end token are supervised and
    tokenised on their own, so that the tokens before them are exactly the inference prompt. generation: the messages
    end with a user turn, and the prompt for the answer is added.
    Raises: `UserError` where a text holds a control token such as <|im_end|>, an answer thoughts in a model that has a
    block for them, or the chat template does not take the conversation.
    """
    refuse_answers(messages, tokenizer)
    control = _control_tokens(tokenizer)
    for message in messages:
        content = message["content"]
        for text in [content] if isinstance(content, str) else [p["text"] for p in content if p["type"] == "text"]:
            if "<|" in text and (found := next((token for token in control if token in text), None)):
                raise UserError(f"the {message['role']} text holds the control token {found}; remove it")

    def ids_of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    end_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    encoded = Encoded([], [])
    rendered = ""  # the text that is already tokenised

    def append(ids: list[int], supervised: bool) -> None:
        encoded.input_ids += ids
        encoded.labels += ids if supervised else [IGNORE] * len(ids)

    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = prompt_text(tokenizer, messages[:turn], rendered)
        append(ids_of(prompt[len(rendered) :]), supervised=False)
        append([*ids_of(message["content"]), end_id], supervised=True)
        rendered = prompt + message["content"] + "<|im_end|>"
    if generation:
        prompt = prompt_text(tokenizer, messages, rendered)
        append(ids_of(prompt[len(rendered) :]), supervised=False)
    return _expand_images(encoded, image_tokens, image_token_id)


_PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]


def refuse_answers(messages: list[dict], tokenizer) -> None:
    """What can be told of a conversation's answers without tokenising them. Raises: `UserError`, see `encode`."""
    if not hasattr(tokenizer, "_thinks"):  # asked of the template once
        tokenizer._thinks = prompt_text(tokenizer, _PROBE[:1]).rstrip().endswith("</think>")
    if not tokenizer._thinks:
        return
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if any("<think>" in answer or "</think>" in answer for answer in answers):
        raise UserError("an answer holds <think> or </think>, but this model answers without thoughts: remove it")
    if len(answers) > 1:
        prompt_text(tokenizer, _PROBE, prompt_text(tokenizer, _PROBE[:1]) + _PROBE[1]["content"] + "<|im_end|>")


def prompt_text(tokenizer, messages: list[dict], rendered: str = "") -> str:
    """What the model's own chat template makes of the messages, up to where the answer begins.

    rendered: what it made of the messages before. It must only ever append, or the training prefix would not be the
    inference prompt. Raises: `UserError` where it does not, or refuses the messages."""
    from jinja2 import TemplateError

    try:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **CHAT_OPTIONS)
    except TemplateError as error:
        raise UserError(f"the model's chat template refuses the conversation: {error}") from None
    if not prompt.startswith(rendered):
        raise UserError(
            "the model's chat template rewrites earlier answers (Qwen3.5's drops their block of thoughts), so that no "
            "training prefix would be the inference prompt; give every question a sample of its own"
        )
    return prompt


def cut_text(encoded: Encoded, text: str, too_many: int, tokenizer) -> Encoded:
    """Without the last `too_many` tokens of a document's text, which ends the last turn before the generation prompt.

    Raises: `UserError` where that would leave nothing of it."""
    if too_many >= len(tokenizer(text.strip(), add_special_tokens=False)["input_ids"]):
        raise UserError("the pages and the instruction alone fill max_tokens; raise it, or show fewer or smaller pages")
    ids = encoded.input_ids
    end = len(ids) - 1 - ids[::-1].index(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    return Encoded(*(values[: end - too_many] + values[end:] for values in (ids, encoded.labels)))


def _control_tokens(tokenizer) -> list[str]:
    # `all_special_tokens` misses added tokens such as <|fim_prefix|>, and building the list is slow: keep it.
    if not hasattr(tokenizer, "_control_tokens"):
        tokenizer._control_tokens = [str(token) for token in tokenizer.get_added_vocab() if str(token).startswith("<|")]
    return tokenizer._control_tokens


def _expand_images(encoded: Encoded, image_tokens: list[int], image_token_id: int) -> Encoded:
    """Each image placeholder becomes as many image tokens as the image has."""
    counts = iter(image_tokens)
    ids, labels = [], []
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        repeat = next(counts) if token == image_token_id else 1
        ids += [token] * repeat
        labels += [label] * repeat
    assert next(counts, None) is None, "fewer image placeholders than images"
    return Encoded(ids, labels)
