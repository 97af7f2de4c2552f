"""Task `vqa`: a question about one or more images, or a whole conversation, answered in words."""

from pathlib import Path

from config import Config
from errors import UserError
from images import Placement
from report import metrics
from templates import SYSTEM_PROMPTS, image_paths, split_answer, to_messages

TEMPLATES = SYSTEM_PROMPTS
HAS_HEAD = False
POINTS = False
BEST_IS_RESULT = False
RECORD_FILE = None


def prompt(sample: dict, encoder, images: int, placement: Placement | None = None) -> tuple[list[dict], None]:
    """The sample's conversation up to its answer."""
    return to_messages(sample, encoder.config.template, encoder.image_shown), None


def row(sample: dict, encoder, output: tuple[str, bool]) -> dict:
    """A line of predictions: id, images, question, answer (gold), prediction, correct, outside_candidates, cut_off (no
    end within the token limit), and every other key of the sample."""
    line = answered(sample, to_messages(sample, encoder.config.template), output)
    line["correct"] = metrics.answer_correct(line)
    line["outside_candidates"] = metrics.answer_outside_candidates({**sample, **line})
    return with_other_keys(line, sample)


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
    from report.baseline import majority_answers_for  # it imports torch

    return metrics.score_vqa(rows, majority_answers_for({row["question"] for row in rows}, config))


def selection_score(values: dict[str, float]) -> list[float]:
    # The best is chosen among losses of the same questions; the last evaluation's own is of the whole split.
    return [-values.get("eval_subset_loss", values["eval_loss"])]


def record(family, config: Config) -> dict:
    return {}


def draw(rows: list[dict], config: Config, folder: Path) -> None:
    """Nothing."""


def sample_to_predict(images: list[Path], prompt: str, candidates: list[str]) -> dict:
    """Its gold answer is a form to be filled: it never enters the prompt."""
    if not images or not prompt:
        raise UserError("task 'vqa' needs both --image and --prompt")
    return {"question": prompt, "answer": "-", "candidates": candidates}


def describe(row: dict) -> list[str]:
    return [f"Answer: {row['prediction']}" + (" ... (cut off)" if row["cut_off"] else "")]
