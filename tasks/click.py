"""Task `click`: an instruction and a screenshot, answered with a point. `clicks.py` beside it has the coordinates."""

from pathlib import Path

from config import Config
from errors import UserError
from family import Family
from images import Placement, image_path
from report import metrics
from tasks import clicks, vqa
from tasks.clicks import COORDINATES, as_question, image_of, stated_size
from templates import SYSTEM_PROMPTS, to_messages

TEMPLATES = SYSTEM_PROMPTS
HAS_HEAD = False
POINTS = True
BEST_IS_RESULT = False
RECORD_FILE = "coordinates.json"

selection_score = vqa.selection_score


def prompt(sample: dict, encoder, images: int, placement: Placement | None = None) -> tuple[list[dict], None]:
    """The instruction, and the point as the family says it, which depends on where its image lies. placement: where it
    is known; else the sample's own image_size is trusted."""
    placement = placement or encoder.placement(image_of(sample), stated_size(sample))
    question = as_question(sample, placement, encoder.family)
    return to_messages(question, encoder.config.template, encoder.image_shown), None


def row(sample: dict, encoder, output: tuple[str, bool]) -> dict:
    """A line of predictions as of `vqa`, with predicted_point, in pixels of the original image (None where the answer
    holds none), and image_size."""
    placement = encoder.placement(image_of(sample))
    messages = to_messages(as_question(sample, placement, encoder.family), encoder.config.template)
    line = vqa.answered(sample, messages, output)
    line |= clicks.predicted(line["prediction"], placement, encoder.family)
    line["correct"] = metrics.click_correct({**sample, **line})
    return vqa.with_other_keys(line, sample)


def score(rows: list[dict], config: Config) -> dict:
    return metrics.score_click(rows)


def record(family: Family, config: Config) -> dict:
    """What a checkpoint's numbers mean: an adapter is worth nothing under another convention, so it is kept with it."""
    limit = (
        {"image_size": config.image_size}
        if config.resize == "letterbox"
        else {"max_pixels": config.max_pixels or family.max_pixels}
    )
    coordinates = COORDINATES.get(family.coordinates, "none")
    return {"coordinates": coordinates, "resize": config.resize, **limit, "template": config.template}


def draw(rows: list[dict], config: Config, folder: Path) -> None:
    """A contact sheet of the clicks farthest off their target, with gold and predicted point."""
    from report import plots

    root, path = config.data.image_root, folder / "worst_misses.png"
    shown = [
        {**row, "image": image_path(root, row["images"][0]), "caption": row["question"]}
        for row in plots.worst_misses(rows)
    ]
    plots.contact_sheet(shown, path)
    print(f"The worst misses are drawn in {path}")


def sample_to_predict(images: list[Path], prompt: str, candidates: list[str], config: Config) -> dict:
    if not images or not prompt:
        raise UserError("task 'click' needs both --image and --prompt")
    return {"instruction": prompt, "point": [0, 0]}


def describe(row: dict) -> list[str]:
    told = vqa.describe(row)
    if row["predicted_point"] is None:
        return [*told, "Point: none, the answer holds no point"]
    width, height = row["image_size"]
    # The last pixel for a point on the far edge.
    x, y = (min(int(value), side - 1) for value, side in zip(row["predicted_point"], (width, height), strict=True))
    return [*told, f"Point: {x}, {y} in pixels of the image ({width}×{height})"]
