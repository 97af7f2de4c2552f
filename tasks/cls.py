"""Task `cls`: a document, as text or as images of its pages, is given one of `num_labels` classes."""

import math
from pathlib import Path

from config import Config
from errors import UserError
from images import Placement
from report import metrics
from tasks.vqa import with_other_keys
from templates import image_paths, with_images

# template -> what the user's turn asks of a document, after its pages and before its text
TEMPLATES = {
    "plain": "Classify this document.",
    "paper_decision": "This paper was submitted to a scientific conference. Judge whether it was accepted or rejected.",
}
HAS_HEAD = True
POINTS = False
BEST_IS_RESULT = True
RECORD_FILE = None
COUNTED = "papers"
UNIT, CLUSTER = "sample", "sample"
ROW_KEYS = ("id", "probabilities", "predicted_label", "true_label")
TEST_KEYS = ("true_label",)  # one paper may be text here and pages there

compared_scores = metrics.score_cls


def prompt(sample: dict, encoder, images: int, placement: Placement | None = None) -> tuple[list[dict], int]:
    """The user's turn that shows a document, and its class. images: how many pages are shown."""
    if encoder.image_shown and not images:
        raise UserError(
            f"the sample has no images but model_name is a vision model ({encoder.family.model_type}); classify texts "
            "with a text model, give the sample 'images' (prepare_data.py papers --pages), or set image: none"
        )
    label = class_label(sample, encoder.config.num_labels)
    return document_messages(sample, encoder.config.template, images), label


def class_label(sample: dict, num_labels: int) -> int:
    """Raises: `UserError` where the sample's label is none of 0 ... num_labels - 1."""
    label = sample.get("label")
    if type(label) is not int or not 0 <= label < num_labels:
        raise UserError(
            f"key 'label' is {label!r}, but num_labels {num_labels} allows the numbers 0 to {num_labels - 1}"
        )
    return label


def document_messages(sample: dict, template: str, images: int) -> list[dict]:
    """The user's turn: the pages, the instruction, the text. The text stands last, so that what is cut from a long one
    is its end. Raises: `UserError` where there is neither text nor page."""
    text = sample.get("text")
    if text is None and not images:
        raise UserError("the sample has neither 'text' nor 'images'; give it something to classify")
    if text is not None and (not isinstance(text, str) or not text.strip()):
        raise UserError("key 'text' is empty or no text; fill it, or drop the sample")
    said = TEMPLATES[template] if text is None else f"{TEMPLATES[template]}\n\n{text.strip()}"
    return [{"role": "user", "content": with_images(images, said)}]


def output_of(prediction, config: Config) -> tuple[list[float], int]:
    """A list of probabilities, one for each label. Raises: `UserError`."""
    numbers = prediction if isinstance(prediction, list) else []
    right = len(numbers) == config.num_labels and all(
        type(number) in (int, float) and 0 <= number <= 1 for number in numbers
    )
    if not right or abs(sum(numbers) - 1) > 1e-3:
        raise UserError(
            f"key 'prediction' is {str(prediction)[:60]!r} but must be a list of {config.num_labels} "
            "probabilities, one for each label (where only the label is known: 1 for it, 0 for the others)"
        )
    return [math.log(max(number, 1e-12)) for number in numbers], 0


def row(sample: dict, encoder, output: tuple[list[float], int]) -> dict:
    """A line of predictions: id, images, logits, probabilities, predicted_label, true_label, correct, cut_tokens (of
    its text, at the end), and every other key of the sample."""
    logits, cut_tokens = output
    shares = [math.exp(logit - max(logits)) for logit in logits]
    predicted = logits.index(max(logits))
    line = {
        "id": sample["id"],
        "images": image_paths(sample),
        "logits": logits,
        "probabilities": [share / sum(shares) for share in shares],
        "predicted_label": predicted,
        "true_label": sample["label"],
        "correct": predicted == sample["label"],
        "cut_tokens": cut_tokens,
    }
    return with_other_keys(line, sample)


def score(rows: list[dict], config: Config) -> dict:
    return metrics.score_cls(rows) | {"cut_texts": sum(row["cut_tokens"] > 0 for row in rows)}


def correct(row: dict) -> bool:
    return row["predicted_label"] == row["true_label"]


def parts(row: dict) -> dict:
    return {}


def verdict(row: dict) -> int:
    return row["predicted_label"]


def asked_and_gold(row: dict) -> tuple[str, str]:
    return row.get("title") or row.get("text") or row["id"], f"label {row['true_label']}"


def said(row: dict) -> str:
    return f"label {row['predicted_label']} (p {row['probabilities'][row['predicted_label']]:.2f})"


def selection_score(values: dict[str, float]) -> list[float]:
    return [values["eval_accuracy"], -values["eval_loss"]]


def record(family, config: Config) -> dict:
    return {}


def draw(rows: list[dict], config: Config, folder: Path) -> None:
    """The reliability diagram of the predictions."""
    from report import plots

    probabilities, labels = [row["probabilities"] for row in rows], [row["true_label"] for row in rows]
    plots.reliability_diagram(probabilities, labels, folder / "reliability.png")
    print(f"Drawn: {folder / 'reliability.png'}")


def sample_to_predict(images: list[Path], prompt: str, candidates: list[str], config: Config) -> dict:
    return {**({"text": prompt} if prompt else {}), "label": 0}


def describe(row: dict) -> list[str]:
    shown = ", ".join(f"{label}: {share:.1%}" for label, share in enumerate(row["probabilities"]))
    return [f"Label: {row['predicted_label']}", f"Probabilities: {shown}"]
