"""Three images of results, drawn with Pillow: reliability diagram, loss curves, contact sheet of missed clicks.

Matplotlib would be a run-time dependency for three PNGs. Everything is drawn three times too large and scaled down,
because Pillow's lines have no soft edges.
"""

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from files import written_beside
from images import open_image
from report.metrics import CALIBRATION_BINS, calibration_bins, click_correct, click_distance

OVERSIZE = 3
INK, QUIET, GRID, PAPER = "#1c2024", "#5b626b", "#e3e3de", "#ffffff"
BLUE, LIGHT_BLUE, ORANGE, SALMON = "#2456a6", "#8fb4ea", "#c4620a", "#f2b8a0"
GREEN, RED = "#10a35a", "#e0352b"
TILE_WIDTH, TILE_HEIGHT, CAPTION_HEIGHT, TILE_COLUMNS = 300, 300, 98, 4  # pixels of the contact sheet
SHEET_HEAD = 110
# The font that Pillow brings along has ASCII only; for other captions, whichever of these the machine has.
WIDE_FONTS = ("NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc")


class _Canvas:
    """A white image whose coordinates are final pixels."""

    def __init__(self, width: int, height: int):
        self.size = (width, height)
        self.image = Image.new("RGB", (width * OVERSIZE, height * OVERSIZE), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float = 1.0) -> None:
        scaled = [(x * OVERSIZE, y * OVERSIZE) for x, y in points]
        self.draw.line(scaled, fill=colour, width=max(1, round(width * OVERSIZE)), joint="curve")

    def dashes(self, start: tuple[float, float], end: tuple[float, float], colour: str, dash: float = 5.0) -> None:
        count = max(1, round(math.dist(start, end) / (2 * dash)))
        for n in range(count):
            ends = [n / count, (n + 0.5) / count]
            self.line([tuple(a + (b - a) * t for a, b in zip(start, end, strict=True)) for t in ends], colour, 1.2)

    def box(self, left: float, top: float, right: float, bottom: float, fill=None, outline=None, width=1.0) -> None:
        corners = [value * OVERSIZE for value in (left, top, right, bottom)]
        self.draw.rectangle(corners, fill=fill, outline=outline, width=round(width * OVERSIZE))

    def ring(self, x: float, y: float, radius: float, colour: str, width: float, fill=None) -> None:
        corners = [value * OVERSIZE for value in (x - radius, y - radius, x + radius, y + radius)]
        self.draw.ellipse(corners, outline=colour, width=round(width * OVERSIZE), fill=fill)

    def cross(self, x: float, y: float, arm: float, colour: str, width: float) -> None:
        self.line([(x - arm, y - arm), (x + arm, y + arm)], colour, width)
        self.line([(x - arm, y + arm), (x + arm, y - arm)], colour, width)

    def text(self, x: float, y: float, text: str, size: int = 13, anchor: str = "la", colour: str = INK) -> None:
        font, text = _font(size * OVERSIZE, text)
        self.draw.text((x * OVERSIZE, y * OVERSIZE), text, fill=colour, font=font, anchor=anchor)

    def paste(self, image: Image.Image, left: float, top: float, width: float, height: float) -> None:
        size = (max(1, round(width * OVERSIZE)), max(1, round(height * OVERSIZE)))
        self.image.paste(image.resize(size, Image.Resampling.LANCZOS), (round(left * OVERSIZE), round(top * OVERSIZE)))

    def save(self, path) -> None:
        """Write it, scaled down to its final size."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(path) as (temporary,):
            self.image.resize(self.size, Image.Resampling.LANCZOS).save(temporary, "PNG", optimize=True)


def _font(pixels: int, text: str):
    """A font, and the text as far as that font can show it."""
    for name in () if text.isascii() else WIDE_FONTS:
        try:
            return ImageFont.truetype(name, pixels), text
        except OSError:
            continue
    return ImageFont.load_default(pixels), re.sub(r"[^\x00-\x7f]+", "[...]", text)


class _Axes:
    """A plot area on a canvas, given by its edges in pixels, with data ranges on x and y."""

    def __init__(self, canvas: _Canvas, edges: tuple[int, int, int, int], x_range, y_range):
        self.canvas, self.edges, self.x_range, self.y_range = canvas, edges, x_range, y_range

    def at(self, x: float, y: float) -> tuple[float, float]:
        left, top, right, bottom = self.edges
        (x0, x1), (y0, y1) = self.x_range, self.y_range
        return left + (x - x0) / (x1 - x0) * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top)

    def frame(self, x_ticks: Iterable[float], y_ticks: Iterable[float], x_label: str, title: str) -> None:
        """Grid, tick labels, the x axis' name below and the title above (which also names what y shows)."""
        left, top, right, bottom = self.edges
        for tick in y_ticks:
            y = self.at(self.x_range[0], tick)[1]
            self.canvas.line([(left, y), (right, y)], GRID)
            self.canvas.text(left - 8, y, _number(tick), 12, "rm", QUIET)
        for tick in x_ticks:
            x = self.at(tick, self.y_range[0])[0]
            self.canvas.line([(x, bottom), (x, bottom + 5)], QUIET)
            self.canvas.text(x, bottom + 9, _number(tick), 12, "ma", QUIET)
        self.canvas.line([(left, bottom), (right, bottom)], QUIET)
        self.canvas.text((left + right) / 2, bottom + 28, x_label, 13, "ma", QUIET)
        self.canvas.text(left, top - 12, title, 15, "ls")


def _number(value: float) -> str:
    return f"{value:.6g}".replace("-0", "0") if abs(value) < 1e-12 else f"{value:.6g}"


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, that enclose low ... high."""
    largest = max(abs(low), abs(high))
    raw = (high - low if high - low > 1e-6 * largest else largest or 1) / about  # a flat line gets an axis too
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]


# --- reliability diagram ----------------------------------------------------------------------------------------------


def reliability_diagram(probabilities, labels, path) -> None:
    """Accuracy against confidence in the 15 bins of predict_ece, with how many samples each bin holds, as PNG.

    probabilities: (samples, num_labels), rows sum to 1. labels: (samples,) true labels. The confidence is the largest
    probability. The line in each bin is its mean confidence: what a calibrated model's accuracy would be.
    """
    probabilities, labels = np.asarray(probabilities, dtype=float), np.asarray(labels)
    if len(labels) == 0:
        raise ValueError("no samples to draw")
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = calibration_bins(confidence)
    counts = np.bincount(bins, minlength=CALIBRATION_BINS)
    filled = np.flatnonzero(counts)
    accuracy = np.bincount(bins, correct, CALIBRATION_BINS)[filled] / counts[filled]
    mean_confidence = np.bincount(bins, confidence, CALIBRATION_BINS)[filled] / counts[filled]
    error = float((counts[filled] * np.abs(accuracy - mean_confidence)).sum() / len(labels))

    canvas = _Canvas(560, 680)
    start = 0.5 if probabilities.shape[1] == 2 else 0.0  # the larger of two probabilities is never below
    axes = _Axes(canvas, (70, 118, 530, 470), (start, 1), (0, 1))
    tenths = [0, 0.2, 0.4, 0.6, 0.8, 1]
    x_ticks = [0.5, 0.6, 0.7, 0.8, 0.9, 1] if start else tenths
    axes.frame(x_ticks, tenths, "confidence (largest probability)", "Accuracy by confidence")
    canvas.text(
        70, 14, f"{len(labels)} samples, calibration error {error:.3f} ({CALIBRATION_BINS} bins)", 13, "la", QUIET
    )
    for number, height, middle in zip(filled, accuracy, mean_confidence, strict=True):
        low, high = max(start, number / CALIBRATION_BINS), (number + 1) / CALIBRATION_BINS
        left, right = axes.at(low, 0)[0] + 1, axes.at(high, 0)[0] - 1
        base, top, line = axes.at(0, 0)[1], axes.at(0, height)[1], axes.at(0, middle)[1]
        canvas.box(left, max(top, line), right, base, fill=BLUE)
        canvas.box(left, min(top, line), right, max(top, line), fill=SALMON if height < middle else LIGHT_BLUE)
        canvas.line([(left, line), (right, line)], INK, 2)
    canvas.dashes(axes.at(start, start), axes.at(1, 1), INK)
    legend = ((BLUE, "accuracy"), (SALMON, "missing: overconfident"), (LIGHT_BLUE, "extra accuracy: underconfident"))
    for number, (colour, text) in enumerate(legend):  # above the plot, where it covers nothing
        x, y = 70 + 230 * (number % 2), 48 + 20 * (number // 2)
        canvas.box(x, y - 6, x + 12, y + 6, fill=colour)
        canvas.text(x + 20, y, text, 12, "lm")
    canvas.line([(299, 68), (313, 68)], INK, 2)
    canvas.text(320, 68, "mean confidence", 12, "lm")

    most = _ticks(0, counts.max(), 2)
    histogram = _Axes(canvas, (70, 550, 530, 634), (start, 1), (0, most[-1]))
    histogram.frame(x_ticks, most, "", "Samples")
    for number in filled:
        left, top = histogram.at(max(start, number / CALIBRATION_BINS), counts[number])
        right, base = histogram.at((number + 1) / CALIBRATION_BINS, 0)
        canvas.box(left + 1, top, right - 1, base, fill=QUIET)
    canvas.save(path)


# --- loss curves ------------------------------------------------------------------------------------------------------


def loss_curves(log_rows: Sequence[dict], path, experiment: str = "", chosen_step: int | None = None) -> bool:
    """Training and evaluation loss and, where recorded, accuracy per evaluation, over epochs, as PNG.

    experiment: the heading. chosen_step: of the weights that are the result, marked where the log has it.
    log_rows: the lines of log.jsonl or entries of all_results.json: step and epoch (where absent, step is the x axis)
    with any of loss (training), eval_loss, val_loss, test_loss, and the same with accuracy or predict_accuracy.
    """
    x_key = "epoch" if all("epoch" in row for row in log_rows) else "step"
    losses: dict[str, list[tuple[float, float]]] = {}
    accuracies: dict[str, list[tuple[float, float]]] = {}
    for row in log_rows:
        for key, value in row.items():
            match = re.fullmatch(r"(?:(eval|val|test)_)?(?:predict_)?(loss|accuracy)", key)
            if match and isinstance(value, int | float) and math.isfinite(value):
                split = {None: "train", "eval": "validation", "val": "validation"}.get(match[1], match[1])
                curves = losses if match[2] == "loss" else accuracies
                curves.setdefault(split, []).append((row[x_key], value))
    if not losses and not accuracies:
        return False
    panels = [(title, curves) for title, curves in (("Loss", losses), ("Accuracy", accuracies)) if curves]
    canvas = _Canvas(40 + 500 * len(panels), 460)
    chosen = next((row[x_key] for row in log_rows if row.get("step") == chosen_step), None)
    canvas.text(70, 16, experiment, 16)
    if chosen is not None:
        canvas.text(
            70, 44, f"dashed: {x_key} {_number(round(chosen, 2))}, whose weights are the result", 13, "la", QUIET
        )
    all_x = [x for _, curves in panels for points in curves.values() for x, _ in points]
    x_ticks = _ticks(0, max(all_x), 6)
    x_end = max(all_x) or x_ticks[-1]
    for number, (title, curves) in enumerate(panels):
        values = [y for points in curves.values() for _, y in points]
        y_ticks = _ticks(min(values), max(values))
        if title == "Accuracy":  # padding may not promise more than 100 %
            y_ticks = [tick for tick in y_ticks if 0 <= tick <= 1]
            y_ticks = y_ticks if len(y_ticks) > 1 else [0, 0.5, 1]
        left = 70 + 500 * number
        axes = _Axes(canvas, (left, 120, left + 430, 400), (0, x_end), (y_ticks[0], y_ticks[-1]))
        axes.frame([tick for tick in x_ticks if tick <= x_end * 1.001], y_ticks, x_key, title)
        if chosen is not None:
            canvas.dashes(axes.at(chosen, y_ticks[0]), axes.at(chosen, y_ticks[-1]), INK)
        _curves(axes, curves, left + 430)
    canvas.save(path)
    return True


# split -> colour, line width, radius and fill of its rings. Where two curves lie on each other both are seen: the thin
# line of test runs inside validation's broad one, and so do its rings. One is filled, one hollow: not by colour alone.
CURVES = {
    "train": ("#9aa5b1", 1.5, 4, "#9aa5b1"),
    "validation": (BLUE, 4.5, 6, BLUE),
    "test": (ORANGE, 1.5, 3.5, PAPER),
}


def _curves(axes: _Axes, curves: dict[str, list[tuple[float, float]]], right: float) -> None:
    legend_x, y = right - sum(40 + 7 * len(split) for split in curves) + 12, axes.edges[1] - 16
    for split in (split for split in CURVES if split in curves):
        colour, width, radius, fill = CURVES[split]
        placed = [axes.at(*point) for point in sorted(curves[split])]
        if len(placed) > 1:
            axes.canvas.line(placed, colour, width)
        if split != "train" or len(placed) == 1:
            for point in placed:
                axes.canvas.ring(*point, radius, colour, 2, fill=fill)
        axes.canvas.line([(legend_x, y), (legend_x + 16, y)], colour, width)
        if split != "train":
            axes.canvas.ring(legend_x + 8, y, radius, colour, 2, fill=fill)
        axes.canvas.text(legend_x + 22, y, split, 12, "lm")
        legend_x += 40 + 7 * len(split)


# --- contact sheet ----------------------------------------------------------------------------------------------------


def worst_misses(rows: Sequence[dict], count: int = 12) -> list[dict]:
    """The wrong rows (as for metrics.score_click) farthest off as a share of the diagonal; unparsable ones last."""
    wrong = [row for row in rows if not click_correct(row)]

    def off(row: dict) -> float:
        distance = click_distance(row)
        return -1.0 if distance is None else distance / math.hypot(*row["image_size"])

    return sorted(wrong, key=off, reverse=True)[:count]


def contact_sheet(items: Sequence[dict], path, title: str, score: str) -> None:
    """Tiles of clicks with gold point (green ring, the box where known) and predicted point (red cross), as PNG.

    items: image (path or PIL image), point, predicted_point (or None), bbox (optional), in pixels of that image, and
    what stands below the tile: caption (what was asked), prediction (what the model said) and name (the file's).
    """
    rows = max(1, math.ceil(len(items) / TILE_COLUMNS))
    columns = max(2, min(TILE_COLUMNS, len(items)))
    pitch_x, pitch_y = TILE_WIDTH + 16, TILE_HEIGHT + CAPTION_HEIGHT + 16
    canvas = _Canvas(16 + columns * pitch_x, SHEET_HEAD + rows * pitch_y)
    for row, (text, size) in enumerate(((title, 18), (score, 14))):
        canvas.text(16, 14 + 28 * row, *_wrap(text, size, columns * pitch_x - 16, most=1), size)
    canvas.ring(30, 82, 9, GREEN, 2)
    canvas.text(48, 82, "gold point and box", 14, "lm")
    canvas.cross(210, 82, 7, RED, 3)
    canvas.text(226, 82, "predicted point", 14, "lm")
    if not items:
        canvas.text(16, SHEET_HEAD + 34, "No click missed its target.", 16)
    for number, item in enumerate(items):
        left, top = 16 + number % TILE_COLUMNS * pitch_x, SHEET_HEAD + number // TILE_COLUMNS * pitch_y
        image = item["image"] if isinstance(item["image"], Image.Image) else open_image(item["image"])
        scale = min(TILE_WIDTH / image.width, TILE_HEIGHT / image.height)
        width, height = image.width * scale, image.height * scale
        x0, y0 = left + (TILE_WIDTH - width) / 2, top + (TILE_HEIGHT - height) / 2
        canvas.box(left, top, left + TILE_WIDTH, top + TILE_HEIGHT, fill="#efefeb")
        canvas.paste(image, x0, y0, width, height)

        def place(x, y, x0=x0, y0=y0, scale=scale):
            return x0 + x * scale, y0 + y * scale

        if item.get("bbox") is not None:
            corners = (*place(*item["bbox"][:2]), *place(*item["bbox"][2:]))
            canvas.box(*corners, outline=PAPER, width=3)
            canvas.box(*corners, outline=GREEN, width=1.5)
        gold = place(*item["point"])
        canvas.ring(*gold, 14, PAPER, 4)  # wide and thin: what is to be clicked stays in view
        canvas.ring(*gold, 13, GREEN, 2)
        if item["predicted_point"] is None:
            verdict = "no point in it"
        else:
            predicted = place(*item["predicted_point"])
            canvas.cross(*predicted, 8, PAPER, 6)
            canvas.cross(*predicted, 7, RED, 3)
            distance = math.dist(item["point"], item["predicted_point"])
            verdict = f"{distance:.0f} px off, {100 * distance / math.hypot(*image.size):.1f}% of the diagonal"
        lines = [(text, INK) for text in _wrap(item["caption"], 13, TILE_WIDTH, most=2)]
        said = f"said: {item['prediction']}" if item["prediction"].strip() else "said nothing"
        for text in (said, verdict, item["name"]):
            lines += [(text, QUIET) for text in _wrap(text, 13, TILE_WIDTH, most=1)]
        for row, (text, colour) in enumerate(lines):
            canvas.text(left, top + TILE_HEIGHT + 6 + 17 * row, text, 13, "la", colour)
    canvas.save(path)


def _wrap(text: str, size: int, width: float, most: int) -> list[str]:
    """Lines no wider than width pixels, at most so many, the last one cut with dots."""
    (font, text), lines = _font(size, text), [""]
    for word in re.findall(r"[^\x00-\x7f]|[!-~]+", text):  # other scripts may break anywhere
        joined = (
            f"{lines[-1]} {word}" if lines[-1] and (word.isascii() or lines[-1][-1].isascii()) else lines[-1] + word
        )
        if font.getlength(joined) <= width or not lines[-1]:
            lines[-1] = joined
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1] + " ..."]
    while lines[-1] and font.getlength(lines[-1]) > width:
        lines[-1] = lines[-1].removesuffix(" ...")[:-1].rstrip() + " ..." if len(lines[-1]) > 5 else ""
    return lines
