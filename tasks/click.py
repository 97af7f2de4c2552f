"""Task `click`: an instruction and a screenshot, answered with a point.

The second half is the one place where points turn from pixels of the original image into what each model family speaks,
and back: training, evaluation, `predict.py` and `prepare_data.py` all come here. Coordinates count from the upper left
corner of the upright image; the right and lower edges belong to it.
"""

import math
import re
from pathlib import Path

from config import Config
from errors import UserError
from family import Family
from images import Placement, image_path
from report import metrics
from tasks import vqa
from templates import SYSTEM_PROMPTS, image_paths, to_messages

TEMPLATES = SYSTEM_PROMPTS
HAS_HEAD = False
POINTS = True
BEST_IS_RESULT = False
RECORD_FILE = "coordinates.json"
COUNTED = "clicks"
UNIT, CLUSTER = "click", "image"
ROW_KEYS = ("id", "point", "predicted_point", "image_size")
TEST_KEYS = ("instruction", "point", "bbox")

correct = verdict = metrics.click_correct  # points are never equal
compared_scores = metrics.score_click
selection_score = vqa.selection_score
# Thousandths, as in the makers' grounding examples. (Their phone agent's system prompt calls the screen 999×999 and
# divides by 999; the two differ by at most a thousandth of the side.)
RELATIVE_UNITS = 1000
COORDINATES = {
    "relative": f"0 to {RELATIVE_UNITS} of the image the model sees",
    "absolute": "pixels of the image the model sees",
}


def prompt(sample: dict, encoder, images: int, placement: Placement | None = None) -> tuple[list[dict], None]:
    """The instruction, and the point as the family says it, which depends on where its image lies. placement: where it
    is known; else the sample's own image_size is trusted."""
    placement = placement or encoder.placement(image_of(sample), stated_size(sample))
    question = as_question(sample, placement, encoder.family)
    return to_messages(question, encoder.config.template, encoder.image_shown), None


def output_of(prediction, config: Config) -> tuple[str | list, bool]:
    """A text, which speaks the coordinates of the config's model, or [x, y] in pixels of the original image. Raises:
    `UserError`."""
    if isinstance(prediction, list):
        return list(_numbers({"prediction": prediction}, "prediction", 2)), True
    return vqa.output_of(prediction, config)


def row(sample: dict, encoder, output: tuple[str | list, bool]) -> dict:
    """A line of predictions as of `vqa`, with predicted_point, in pixels of the original image (None where the answer
    holds none), and image_size. output: as of `output_of`."""
    placement = encoder.placement(image_of(sample))
    messages = to_messages(as_question(sample, placement, encoder.family), encoder.config.template)
    said, finished = output
    line = vqa.answered(sample, messages, (str(said), finished))
    line |= predicted(line["prediction"], placement, encoder.family)
    if not isinstance(said, str):
        line["predicted_point"] = said
    line["correct"] = correct({**sample, **line})
    return vqa.with_other_keys(line, sample)


def score(rows: list[dict], config: Config) -> dict:
    return metrics.score_click(rows)


def parts(row: dict) -> dict:
    return {"size": metrics.target_size(row), **metrics.click_groups(row)}


def asked_and_gold(row: dict) -> tuple[str, str]:
    return row.get("instruction") or row["id"], f"({row['point'][0]:.0f}, {row['point'][1]:.0f})"


def said(row: dict) -> str:
    distance = metrics.click_distance(row)
    return "no point in the answer" if distance is None else f"{distance:.0f} px off"


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
        {**row, "image": image_path(root, row["images"][0]), "caption": row["question"], "name": row["images"][0]}
        for row in plots.worst_misses(rows)
    ]
    wrong = sum(not correct(row) for row in rows)
    score = f"{1 - wrong / len(rows):.1%} of {len(rows):,} clicks are right".replace("%", " %")
    score += f"; {len(shown)} of the {wrong:,} misses, the farthest first" if wrong else ""
    plots.contact_sheet(shown, path, f"{config.experiment}: worst misses", score)
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


# ------------------------------------------------------------------------------------------------------- arithmetic


def units(placement: Placement, family: Family) -> tuple[float, float]:
    """Size (width, height) of the image the model sees, in the family's coordinate units.

    Source: makers' cookbooks; Qwen2-VL and Qwen3-VL speak thousandths, Qwen2.5-VL pixels. Raises: `UserError` for a
    text model."""
    if family.coordinates is None:
        raise UserError(f"task 'click' needs a model that sees images; {family.model_type} is a text model")
    return (RELATIVE_UNITS, RELATIVE_UNITS) if family.coordinates == "relative" else placement.model_size


def to_prompt(point: tuple[float, float], placement: Placement, family: Family) -> tuple[int, int]:
    """A point of the original, in pixels, as the family speaks it; clamped to the image."""
    clamped = [min(max(value, 0), side) for value, side in zip(point, placement.original_size, strict=True)]
    seen = placement.to_model(*clamped)
    x, y = (
        round(value / side * unit)
        for value, side, unit in zip(seen, placement.model_size, units(placement, family), strict=True)
    )
    return x, y


def to_original(prompted: tuple[float, float], placement: Placement, family: Family) -> tuple[float, float]:
    """A prompted point in pixels of the original; clamped to the image."""
    x, y = (
        value / unit * side
        for value, side, unit in zip(prompted, placement.model_size, units(placement, family), strict=True)
    )
    return placement.to_original(x, y)


# --------------------------------------------------------------------------------------------------------- the text


def format_point(point: tuple[float, float], placement: Placement, family: Family) -> str:
    """The answer that is trained: a point of the original, in pixels, as the family speaks it, such as `[512, 384]`."""
    x, y = to_prompt(point, placement, family)
    return f"[{x}, {y}]"


_NUMBER = r"([-+]?\d+(?:\.\d+)?)"
_PAIR = rf"{_NUMBER}\s*,\s*{_NUMBER}"
_QUOTE = r"""["']?"""
# Named forms win over bare brackets, which may belong to a label or a sentence around them.
_NAMED_POINT = re.compile(rf"\b(?:point_2d|points?|coordinates?|position){_QUOTE}\s*[:=]\s*[\[(]+\s*{_PAIR}\s*[\])]")
_NAMED_BOX = re.compile(rf"\bb?box(?:_2d)?{_QUOTE}\s*[:=]\s*[\[(]+\s*{_PAIR}\s*,\s*{_PAIR}\s*[\])]")
_ATTRIBUTES = re.compile(
    rf"\bx1?{_QUOTE}\s*[=:]\s*{_QUOTE}{_NUMBER}{_QUOTE}\s*,?\s*{_QUOTE}y1?{_QUOTE}\s*[=:]\s*{_QUOTE}{_NUMBER}"
)
_TAG = re.compile(rf"<points?>\s*[\[(]?\s*{_NUMBER}(?:\s*,\s*|\s+){_NUMBER}\s*[\])]?\s*</points?>")
_CORNERS = re.compile(rf"\(\s*{_PAIR}\s*\)\s*,?\s*\(\s*{_PAIR}\s*\)")  # Qwen2-VL's box: (x0,y0),(x1,y1)
_BRACKET_BOX = re.compile(rf"[\[(]\s*{_PAIR}\s*,\s*{_PAIR}\s*[\])]")
_BRACKET_POINT = re.compile(rf"[\[(]\s*{_PAIR}\s*[\])]")
# A sentence that holds two numbers and no bracket: an open bracket is an answer that was cut off.
_BARE = re.compile(rf"[^\d\[\](){{}}<>]*?{_NUMBER}(?:\s*,\s*|\s+){_NUMBER}[^\d\[\](){{}}<>]*")


def parse_target(text: str) -> tuple[float, ...] | None:
    """The first point (x, y) or box (x0, y0, x1, y1) of an answer, as spoken; None where there is none.

    Understood: [x, y] and (x, y), alone or in a sentence or call, {"point_2d": [x, y]}, {"x": x, "y": y}, <point>x, y
    </point>, <points x="..." y="...">, a bare `x, y`, and boxes as [x0, y0, x1, y1], (x0,y0),(x1,y1) or "bbox_2d".
    """
    matches = [pattern.search(text) for pattern in (_NAMED_POINT, _NAMED_BOX, _ATTRIBUTES, _TAG)]
    bracketed = [match for pattern in (_CORNERS, _BRACKET_BOX, _BRACKET_POINT) if (match := pattern.search(text))]
    matches += [min(bracketed, key=lambda match: match.start(), default=None), _BARE.fullmatch(text.strip())]
    for match in filter(None, matches):
        numbers = tuple(float(number) for number in match.groups())
        if all(math.isfinite(number) for number in numbers):  # four hundred digits are infinite
            return numbers
    return None


def centre(target: tuple[float, ...]) -> tuple[float, float]:
    """The point itself, or the centre of a box (x0, y0, x1, y1)."""
    return (target[0], target[1]) if len(target) == 2 else ((target[0] + target[2]) / 2, (target[1] + target[3]) / 2)


def parse_point(text: str) -> tuple[float, float] | None:
    """The point of an answer, as prompted (of a box, its centre), or None. See `parse_target`."""
    target = parse_target(text)
    return None if target is None else centre(target)


# ------------------------------------------------------------------------------------------------------ the samples


def image_of(sample: dict) -> str:
    """The one image of a click sample. Raises: `UserError` where it has none or several."""
    paths = image_paths(sample)
    if len(paths) != 1:
        raise UserError(f"a click sample needs one image in key 'image', and this one has {len(paths)}")
    return paths[0]


def stated_size(sample: dict) -> tuple[int, int] | None:
    """(width, height) of the image as the sample states it in `image_size`, or None. Raises: `UserError`."""
    return _numbers(sample, "image_size", 2)


def as_question(sample: dict, placement: Placement, family: Family) -> dict:
    """A click sample as question and answer texts, for `templates.to_messages`.

    Raises: `UserError` that says what is wrong with it; a point outside its image is wrong."""
    image_of(sample)
    instruction = sample.get("instruction")
    if not isinstance(instruction, str) or not instruction.strip():
        raise UserError("key 'instruction' is missing or empty; prepare_data.py click makes such samples")
    point, box = _numbers(sample, "point", 2), None
    if point is None:
        raise UserError("key 'point' is missing; give [x, y] in pixels of the original image")
    if sample.get("bbox") is not None:
        box = _numbers(sample, "bbox", 4)
    size = placement.original_size
    if stated_size(sample) not in (None, tuple(size)):
        raise UserError(f"the image has {size[0]}×{size[1]} pixels, but image_size says {sample['image_size']}")
    if wrong := outside(point, box, size):
        raise UserError(wrong)
    answer = format_point(point, placement, family)
    kept = {key: sample[key] for key in ("id", "image", "images") if key in sample}
    return {**kept, "question": instruction, "answer": answer}


def _numbers(sample: dict, key: str, count: int) -> tuple[float, ...] | None:
    values = sample.get(key)
    return None if values is None else numbers(values, key, count)


def numbers(values: object, key: str, count: int) -> tuple[float, ...]:
    """Raises: `UserError` naming the key where these are not so many finite numbers."""
    right = isinstance(values, (list, tuple)) and len(values) == count
    if not right or not all(type(value) in (int, float) and math.isfinite(value) for value in values):
        raise UserError(f"key '{key}' is {values!r} but must be a list of {count} numbers")
    return tuple(values)


def outside(point, box, size) -> str | None:
    """What is wrong where a point or box (x0, y0, x1, y1) leaves the image or the point leaves its box; else None.

    All in pixels of the original image, of (width, height) `size`."""
    (x, y), (width, height) = point, size
    if not (0 <= x <= width and 0 <= y <= height):
        return f"point [{x:g}, {y:g}] lies outside the image of {width}×{height} pixels; correct or drop it"
    if box is None:
        return None
    x0, y0, x1, y1 = box
    shown = f"bbox [{x0:g}, {y0:g}, {x1:g}, {y1:g}]"
    if not (x0 <= x1 and y0 <= y1):
        return f"{shown} is no [x0, y0, x1, y1]: its corners are swapped, or it is [x, y, width, height]"
    if min(x0, y0) < 0 or x1 > width or y1 > height:
        return f"{shown} leaves the image of {width}×{height} pixels; correct or drop it"
    if not (x0 <= x <= x1 and y0 <= y <= y1):
        return f"point [{x:g}, {y:g}] lies outside its {shown}; correct or drop it"
    return None


def predicted(answer: str, placement: Placement, family: Family) -> dict:
    """What a row of predictions says of an answer: predicted_point, in pixels of the original or None where the answer
    holds no point, and image_size."""
    prompted = parse_point(answer)
    point = None if prompted is None else [round(value, 2) for value in to_original(prompted, placement, family)]
    return {"predicted_point": point, "image_size": list(placement.original_size)}
