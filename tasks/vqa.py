"""Task `vqa`: a question about one or more images, or a whole conversation, answered in words."""

from pathlib import Path

from config import Config
from errors import UserError
from images import Placement
from report import free_form, metrics
from report.baseline import majority_answers_for
from samples import read_samples
from templates import SYSTEM_PROMPTS, image_paths, split_answer, to_messages

TEMPLATES = SYSTEM_PROMPTS
HAS_HEAD = False
POINTS = False
BEST_IS_RESULT = False
RECORD_FILE = None
COUNTED = "questions"
UNIT, CLUSTER = "question", "image"
ROW_KEYS = ("id", "question", "answer", "prediction")
TEST_KEYS = ("question", "answer")

correct = metrics.answer_correct


def prompt(sample: dict, encoder, images: int, placement: Placement | None = None) -> tuple[list[dict], None]:
    """The sample's conversation up to its answer."""
    return to_messages(sample, encoder.config.template, encoder.image_shown), None


def row(sample: dict, encoder, output: tuple[str, bool]) -> dict:
    """A line of predictions: id, images, question, answer (gold), prediction, correct, outside_candidates, cut_off (no
    end within the token limit), gold_answers_in_view (of a conversation, whose last answer alone is asked for), and
    every other key of the sample."""
    messages = to_messages(sample, encoder.config.template)
    line = answered(sample, messages, output)
    if in_view := sum(message["role"] == "assistant" for message in messages[:-1]):
        line["gold_answers_in_view"] = in_view
    line["correct"] = correct(line)
    line["outside_candidates"] = metrics.answer_outside_candidates({**sample, **line})
    return with_other_keys(line, sample)


def output_of(prediction, config: Config) -> tuple[str, bool]:
    """Raises: `UserError` where it is no text (a number is one)."""
    if type(prediction) in (int, float):
        prediction = str(prediction)
    if not isinstance(prediction, str):
        raise UserError(f"key 'prediction' is {str(prediction)[:60]!r} but must be a text")
    return prediction.strip(), True


def answered(sample: dict, messages: list[dict], output: tuple[str, bool]) -> dict:
    """What the rows of all tasks that answer in words begin with. messages: up to the gold answer."""
    asked, gold = split_answer(messages)
    text, finished = output
    return {
        "id": sample["id"],
        "images": image_paths(sample),
        "question": sample.get("question") or sample.get("instruction") or text_of(asked[-1]["content"]),
        "answer": gold,
        "prediction": text,
        "cut_off": not finished,
    }


def text_of(content) -> str:
    """The text of a message, without its images."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text").strip()


def with_other_keys(line: dict, sample: dict) -> dict:
    """The line, and every other key of the sample behind it."""
    skipped = line.keys() | {"image", "messages", "conversations"}
    return line | {key: value for key, value in sample.items() if key not in skipped}


def score(rows: list[dict], config: Config) -> dict:
    scores = metrics.score_vqa(rows, majority_answers_for({row["question"] for row in rows}, config))
    scores |= free_form.score_free_form(rows)
    last_turns = sum("gold_answers_in_view" in row for row in rows)
    return scores | ({"last_turns": last_turns} if last_turns else {})


def compared_scores(rows: list[dict]) -> dict:
    return metrics.score_vqa(rows, {}) | free_form.score_free_form(rows)


def parts(row: dict) -> dict:
    return {"stage": row.get("stage"), "question": row.get("question")}


def verdict(row: dict) -> frozenset[str]:
    return metrics.answer_items(row["prediction"])


def asked_and_gold(row: dict) -> tuple[str, str]:
    return row["question"], row["answer"]


def said(row: dict) -> str:
    return row["prediction"]


def selection_score(values: dict[str, float]) -> list[float]:
    # The best is chosen among losses of the same questions; the last evaluation's own is of the whole split.
    return [-values.get("eval_subset_loss", values["eval_loss"])]


def record(family, config: Config) -> dict:
    return {}


def draw(rows: list[dict], config: Config, folder: Path) -> None:
    """Nothing."""


def sample_to_predict(images: list[Path], prompt: str, candidates: list[str], config: Config) -> dict:
    """As the run was trained. Its gold answer is a form to be filled: it never enters the prompt."""
    if not images or not prompt:
        raise UserError("task 'vqa' needs both --image and --prompt")
    if messages := _trained_conversation(len(images), prompt, config):
        if candidates:
            raise UserError(
                "--candidates has no place in the conversations that this run was trained on; write them into --prompt"
            )
        return {"messages": messages}
    if not candidates and config.template != "plain":
        candidates = _trained_candidates(prompt, config)
    return {"question": prompt, "answer": "-", "candidates": candidates}


def _trained_conversation(images: int, prompt: str, config: Config) -> list[dict]:
    """Where the run's training data are whole conversations: one of their form, with the system turn and what stands
    between image and text as in the first of them. Empty where they are questions, or not at hand."""
    try:
        first = next(read_samples(config.data.train)) if config.data.train else {}
    except UserError:
        return []
    if not {"messages", "conversations"} & first.keys():
        return []
    trained = to_messages(first, config.template)
    system = [message for message in trained if message["role"] == "system"][:1]
    user = next(message["content"] for message in trained if message["role"] == "user")
    texts = [part["text"] for part in user if part["type"] == "text"] if isinstance(user, list) else []
    gap = "\n" if texts and texts[0].startswith("\n") else ""
    told = f"the system turn {system[0]['content']!r}" if system else "no system turn"
    print(f"Asked as in {config.data.train}: a conversation with {told}")
    return [
        *system,
        {"role": "user", "content": "<image>" * images + gap + prompt},
        {"role": "assistant", "content": "-"},
    ]


def _trained_candidates(question: str, config: Config) -> list[str]:
    """The candidates that the run's training data gives this question, with a line that says so, or warns."""
    try:
        train = config.data.train
        asked = [s for s in (read_samples(train) if train else ()) if s.get("question") == question]
        candidates = next((sample["candidates"] for sample in asked if sample.get("candidates")), [])
        if asked and not candidates:
            return []  # as it was trained
        where = f"{config.data.train} asks no such question with candidates"
    except UserError as error:
        candidates, where = [], str(error)
    if candidates:
        print(f"Candidates, as in {config.data.train}: {'; '.join(candidates)}")
    else:
        print(f"WARNING: template '{config.template}' is trained with candidates, and none are given: {where}. "
              "Give them with --candidates 'A; B; C'")  # fmt: skip
    return candidates


def describe(row: dict) -> list[str]:
    return [f"Answer: {row['prediction']}" + (" ... (cut off)" if row["cut_off"] else "")]
