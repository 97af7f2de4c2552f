"""What a merged model answers, kept beside it, so that a server or another folder can be asked the same.

The images are drawn here, so that nobody's data leave with the model and nobody needs them to ask. They have a size
that the run's own preparation of images leaves as it is; so must whatever serves the model.
"""

import base64
import contextlib
import hashlib
import http.client
import io
import json
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from config import Config
from dataset import SampleEncoder
from errors import UserError
from files import read_json_lines
from templates import CHAT_OPTIONS, split_answer

FILE = "reference_answers.jsonl"
KEYS = {"id", "messages", "prompt_ids", "image_token_id", "image_tokens", "grid", "answer", "logprobs"}
MAX_NEW_TOKENS = 32
# Nats of one answer token. Other kernels and bfloat16 move it by a few hundredths, another image or other weights more.
LOGPROB_TOLERANCE = 0.3
COLOURS = {"red": "#c03030", "green": "#2f8f4e", "blue": "#2f4fc0"}
DRAWN_PIXELS = 2**21  # at most, for a model without a limit of its own
TIMEOUT_SECONDS = 300
CURE = f"merge the adapter again: merge.py writes {FILE}"


# --------------------------------------------------------------------------------------------------------- asked when


def prompts(config: Config, encoder: SampleEncoder) -> Iterator[dict]:
    """The references without their answers: messages as a server takes them, and what training makes of them."""
    family = encoder.family
    width = height = config.image_size
    if config.resize == "native":
        side = int(min(config.max_pixels or DRAWN_PIXELS, family.max_pixels, DRAWN_PIXELS) ** 0.5)
        width = height = max(family.factor, side // family.factor * family.factor)
    with tempfile.TemporaryDirectory() as scratch:
        config = replace(config, data=replace(config.data, image_root=scratch))
        encoder = SampleEncoder(config, family, encoder.tokenizer)
        for number, (colour, fill) in enumerate(COLOURS.items(), 1):
            image = Image.new("RGB", (width, height), "#d9b8a4")
            x, y, radius = width * number / 4, height / 2, width / 9
            ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
            path = Path(scratch, f"{colour}.png")
            image.save(path)
            sample = {"id": f"{colour} disc", "image": path.name, "candidates": list(COLOURS), "answer": "-",
                      "question": "What colour is the disc?", "instruction": f"click the {colour} disc",
                      "point": [x, y]}  # fmt: skip
            images = [encoder.load_image(name) for name in encoder.images_of(sample)]
            messages, _ = encoder.task.prompt(sample, encoder, len(images), images[0].placement if images else None)
            url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
            yield {
                "id": sample["id"],
                "messages": [_with_url(message, url) for message in split_answer(messages)[0]],
                "image_sha256": [hashlib.sha256(path.read_bytes()).hexdigest() for _ in images],
                "prompt_ids": encoder.encode(sample, images, generation=True).input_ids.tolist(),
                "image_token_id": family.image_token_id,
                "image_tokens": [i.grid[0] * i.grid[1] // family.merge_size**2 for i in images],
                "grid": [[1, *image.grid] for image in images],
            }


def _with_url(message: dict, url: str) -> dict:
    if isinstance(message["content"], str):
        return message
    shown = {"type": "image_url", "image_url": {"url": url}}
    return {**message, "content": [shown if part["type"] == "image" else part for part in message["content"]]}


def write(config: Config, encoder: SampleEncoder, model: torch.nn.Module, folder: Path) -> None:
    """The references of a merged folder, answered by `model`, which was loaded from it plainly.

    Raises: `UserError` where the folder by itself shows the model another prompt than training did."""
    lines = []
    ask = folder_asker(folder, model)
    for asked in prompts(config, encoder):
        given = ask(asked)
        if found := prompt_differences(asked, given):
            cure = "train with images of a size that the model's own image processor leaves as it is (--check tells)"
            raise UserError(
                f"the merged folder asks otherwise than training did ({found[0]}); nothing was written"
                + f"; {cure}" * found[0].startswith("pixels:")
            )
        reference = {**asked, "answer": given["answer"], "logprobs": given["logprobs"]}
        lines.append(json.dumps(reference, ensure_ascii=False) + "\n")
    (folder / FILE).write_text("".join(lines), encoding="utf-8")


def read(folder: Path) -> list[dict]:
    """Raises: `UserError` where the folder holds no references, or broken ones."""
    path = Path(folder) / FILE
    references = [reference for _, reference in read_json_lines(path, CURE)]
    if not references or not all(isinstance(line, dict) and line.keys() >= KEYS for line in references):
        raise UserError(f"{path} is no file of reference answers; {CURE}")
    return references


# ------------------------------------------------------------------------------------------------------ whom to ask


def folder_asker(folder: Path, model: torch.nn.Module | None = None) -> Callable[[dict], dict]:
    """A function reference -> prompt_ids, grid, answer and logprobs, of a model folder with its own chat template,
    image processor and generation config, as transformers reads them."""
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        processor = AutoImageProcessor.from_pretrained(folder)
        if model is None:
            model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").to(device).eval()
    except (OSError, ValueError) as error:
        raise UserError(
            f"--verify {folder}: no whole model loads from there ({' '.join(str(error).split())})"
        ) from None
    device = next(model.parameters()).device

    @torch.no_grad()
    def ask(reference: dict) -> dict:
        messages, images = _for_transformers(reference["messages"])
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **CHAT_OPTIONS)
        inputs = dict(processor(images=images, return_tensors="pt")) if images else {}
        grid = inputs["image_grid_thw"].tolist() if images else []
        counts, ids = iter([t * h * w // processor.merge_size**2 for t, h, w in grid]), []
        for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
            ids += [token] * (next(counts, 1) if token == reference["image_token_id"] else 1)
        inputs["input_ids"] = torch.tensor([ids])
        if images:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == reference["image_token_id"]).int()
        output = model.generate(
            **{name: value.to(device) for name, value in inputs.items()},
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64, device=device),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        answer = output.sequences[0, len(ids) :]
        logprobs = [
            round(float(logits[0].float().log_softmax(-1)[token]), 4)
            for logits, token in zip(output.logits, answer, strict=True)
        ]
        said = tokenizer.decode(answer, skip_special_tokens=True).strip()
        return {"prompt_ids": ids, "grid": grid, "answer": said, "logprobs": logprobs}

    return ask


def _for_transformers(messages: list[dict]) -> tuple[list[dict], list[Image.Image]]:
    """(messages with bare image parts, the decoded images)."""
    images, plain = [], []
    for message in messages:
        parts = message["content"]
        if isinstance(parts, list):
            urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
            images += [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB") for url in urls]
            parts = [{"type": "image"} if part["type"] == "image_url" else part for part in parts]
        plain.append({**message, "content": parts})
    return plain, images


class Server:
    """An OpenAI-compatible server. The key, where it wants one, comes from OPENAI_API_KEY."""

    def __init__(self, url: str):
        self.url = url.rstrip("/").removesuffix("/chat/completions").removesuffix("/v1") + "/v1"
        models = self._call("models").get("data") or [{}]
        self.model = models[0].get("id", "default")
        if len(models) > 1:
            print(f"{self.url} serves {len(models)} models; asked is the first, {self.model}")

    def ask(self, messages: list[dict], max_tokens: int = MAX_NEW_TOKENS) -> dict:
        """answer, logprobs (empty where the server tells none) and prompt_tokens (None likewise). Raises:
        `UserError`."""
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": max_tokens}
        probabilities, no_thinking = {"logprobs": True}, {"chat_template_kwargs": {"enable_thinking": False}}
        # Some refuse what OpenAI's own does not know, or to tell probabilities.
        for extras in (probabilities | no_thinking, no_thinking, probabilities):
            with contextlib.suppress(UserError):
                told = self._call("chat/completions", body | extras)
                break
        else:
            told = self._call("chat/completions", body)
        try:
            choice = told["choices"][0]
            tokens = (choice.get("logprobs") or {}).get("content") or []
            return {
                "answer": (choice["message"].get("content") or "").strip(),
                "logprobs": [token["logprob"] for token in tokens],
                "prompt_tokens": (told.get("usage") or {}).get("prompt_tokens"),
            }
        except (KeyError, IndexError, TypeError, AttributeError):
            raise UserError(f"{self.url} gives no chat completion: {str(told)[:200]}") from None

    def _call(self, path: str, body: dict | None = None) -> dict:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(f"{self.url}/{path}", data, headers)
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
                told = json.load(response)
        except urllib.error.HTTPError as error:
            reason = " ".join(error.read(500).decode(errors="replace").split())
            raise UserError(f"{self.url}/{path} answers {error.code}: {reason or error.reason}") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise UserError(f"--verify {self.url}: no answer from an OpenAI-compatible server ({error})") from None
        if not isinstance(told, dict):
            raise UserError(f"{self.url}/{path} gives no object: {str(told)[:200]}")
        return told


# ------------------------------------------------------------------------------------------------- what differs, named


def prompt_differences(reference: dict, asked: dict) -> list[str]:
    """Where a folder's prompt is another one, token by token."""
    told, image = [], reference["image_token_id"]
    text, other = ([token for token in of["prompt_ids"] if token != image] for of in (reference, asked))
    if asked["grid"] != reference["grid"]:
        told.append(f"pixels: the image is resized, its grid of patches is {asked['grid']}, not {reference['grid']}")
    if text != other:
        place = next((n for n, pair in enumerate(zip(text, other, strict=False)) if len(set(pair)) > 1), len(text))
        told.append(
            f"prompt: it differs from token {place} of the text on ({len(other)} tokens instead of {len(text)}): "
            "another chat template, or a system prompt that is dropped or added"
        )
    return told


def served_differences(reference: dict, server: Server, asked: dict, folder: Path) -> list[str]:
    """Where a server's prompt is another one, as its counts of prompt tokens tell: it is asked again without the image,
    and without the system prompt. folder: of the references, whose chat template tells how many a thinking model has.
    """
    if asked["prompt_tokens"] is None:
        return []
    images = reference["image_tokens"]
    marks = 2 * len(images)  # before and behind each image
    text = len(reference["prompt_ids"]) - sum(images) - marks
    without_image = [_text_only(message) for message in reference["messages"]]
    given = server.ask(without_image, max_tokens=1)["prompt_tokens"]
    told = []
    if given is None:
        return told
    if given != text:
        rest = [message for message in without_image if message["role"] != "system"]
        without_system = len(rest) < len(without_image) and server.ask(rest, max_tokens=1)["prompt_tokens"]
        cause = "another chat template, or text that is added or cut"
        if without_system == given:
            cause = "the system prompt is dropped, the count is the same without it"
        elif given == _tokens_of_thinking(without_image, folder):
            cause = "the model is asked to think; serve it with enable_thinking=false for its chat template"
        told.append(f"prompt: {given} text tokens instead of {text}: {cause}")
    shown = asked["prompt_tokens"] - given - marks
    if images and shown <= 0:
        told.append("pixels: the image does not reach the model")
    elif shown != sum(images):
        told.append(f"pixels: the image is resized, it has {shown} tokens instead of {sum(images)}")
    return told


def _tokens_of_thinking(messages: list[dict], folder: Path) -> int:
    """Of a prompt that lets the model think, where its chat template knows of that."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _text_only(message: dict) -> dict:
    if isinstance(message["content"], str):
        return message
    return {**message, "content": "".join(part["text"] for part in message["content"] if part["type"] == "text")}


def answer_differences(reference: dict, asked: dict) -> list[str]:
    told = []
    if asked["answer"] != reference["answer"]:
        both = zip(reference["logprobs"], asked["logprobs"], strict=False)
        first = "".join(f" (first token off by {abs(a - b):.2f} nats)" for a, b in list(both)[:1])
        told.append(f"answer: {asked['answer']!r} instead of {reference['answer']!r}{first}")
    elif (off := _logprobs_off(reference, asked)) > LOGPROB_TOLERANCE:
        told.append(f"answer: the same, but a token's log probability is off by {off:.2f}")
    return told


def _logprobs_off(reference: dict, asked: dict) -> float:
    return max((abs(a - b) for a, b in zip(reference["logprobs"], asked["logprobs"], strict=False)), default=0.0)


def verify(target: str, folder: Path) -> bool:
    """Ask `target`, a server's address or a folder, what the references in `folder` hold, and print what differs.

    Returns: whether all agrees. Raises: `UserError`."""
    references = read(folder)
    server = Server(target) if "://" in target else None
    ask = None if server else folder_asker(Path(target))
    wrong = 0
    for reference in references:
        if server:
            asked = server.ask(reference["messages"])
            found = served_differences(reference, server, asked, folder)
        else:
            asked = ask(reference)
            found = prompt_differences(reference, asked)
        answers = answer_differences(reference, asked)
        if answers and not found and (server is None or asked["prompt_tokens"] is not None):
            answers.append(
                "prompt and image have the right size, so look for other weights (an adapter or its vision part left "
                "out), altered pixels or sampling; a late word alone may be a near tie"
            )
        wrong += bool(found or answers)
        print(f"{reference['id']}: " + ("; ".join([*found, *answers]) or _agreement(reference, asked)), flush=True)
    print(f"{target}: {len(references) - wrong} of {len(references)} references agree", flush=True)
    return wrong == 0


def _agreement(reference: dict, asked: dict) -> str:
    size = f"prompt of {len(reference['prompt_ids'])} tokens, {sum(reference['image_tokens'])} of them the image's"
    if "prompt_ids" not in asked and asked["prompt_tokens"] is None:
        size = "prompt and pixels not told (no usage.prompt_tokens)"
    off = f"log probabilities within {_logprobs_off(reference, asked):.3f}" if asked["logprobs"] else "no logprobs told"
    return f"agrees: {size}, answer {reference['answer']!r}, {off}"
