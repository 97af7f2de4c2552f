"""Drawn endoscopy images with questions, in the published layout of Kvasir-VQA."""

import csv
import math
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from PIL import Image, ImageDraw, ImageFilter

from files import folder_beside

Color = tuple[int, int, int]
T = TypeVar("T")

WIDTH, HEIGHT = 224, 204  # pixels; not square, so that the letterbox has something to do
PROCEDURES = {  # name -> tissue in the light, tissue in the depth of the lumen
    "colonoscopy": ((226, 138, 124), (110, 40, 40)),
    "gastroscopy": ((222, 164, 104), (120, 66, 30)),
    "capsule endoscopy": ((182, 168, 108), (70, 62, 30)),
}
COLORS = {
    "red": (176, 18, 28),
    "white": (246, 240, 226),
    "yellow": (238, 200, 48),
    "green": (88, 140, 60),
    "blue": (52, 92, 176),
    "purple": (122, 48, 132),
}
PLACES = {  # name -> column and row, counted from the centre
    "upper-left": (-1, -1),
    "upper-center": (0, -1),
    "upper-right": (1, -1),
    "center-left": (-1, 0),
    "center": (0, 0),
    "center-right": (1, 0),
    "lower-left": (-1, 1),
    "lower-center": (0, 1),
    "lower-right": (1, 1),
}
PROCEDURE = "What type of procedure is the image taken from?"
NUMBER = "How many polyps are in the image?"
COLOR = "What color is the abnormality? If more than one separate with ;"
PLACE = "Where in the image is the abnormality?"


def shade(color: Color, factor: float) -> Color:
    """The colour, lighter (factor above 1) or darker."""
    return tuple(min(255, round(channel * factor)) for channel in color)


def draw_image(procedure: str, polyps: list[tuple[str, str]], rng: random.Random) -> Image.Image:
    """A drawn view through an endoscope: RGB, 224×204 pixels. polyps: (place, colour) of each."""
    lit, dark = PROCEDURES[procedure]
    lumen_x, lumen_y = WIDTH / 2 + rng.uniform(-60, 60), HEIGHT / 2 + rng.uniform(-50, 50)
    image = Image.new("RGB", (WIDTH, HEIGHT), lit)
    canvas = ImageDraw.Draw(image)
    folds = rng.randint(7, 11)
    for fold in range(folds):  # wavy rings from the wall into the lumen
        depth = fold / (folds - 1)
        radius = WIDTH * (0.62 - 0.57 * depth)
        phases = [rng.uniform(0, math.tau) for _ in range(3)]
        outline = []
        for step in range(60):
            angle = math.tau * step / 60
            waves = zip((0.05, 0.035, 0.02), (3, 5, 9), phases, strict=True)
            reach = radius * (1 + sum(height * math.sin(count * angle + phase) for height, count, phase in waves))
            outline.append((lumen_x + reach * math.cos(angle), lumen_y + 0.92 * reach * math.sin(angle)))
        tone = tuple(near + (far - near) * depth**1.6 for near, far in zip(lit, dark, strict=True))
        canvas.polygon(outline, fill=shade(tone, 1.05 if fold % 2 == 0 else 0.95))
    image = image.filter(ImageFilter.GaussianBlur(2.2))
    canvas = ImageDraw.Draw(image)
    for _ in range(7):  # vessels
        x, y, angle = rng.uniform(0, WIDTH), rng.uniform(0, HEIGHT), rng.uniform(0, math.tau)
        vessel = [(x, y)]
        for _ in range(14):
            angle += rng.uniform(-0.5, 0.5)
            x, y = x + 3.5 * math.cos(angle), y + 3.5 * math.sin(angle)
            vessel.append((x, y))
        canvas.line(vessel, fill=shade(lit, 0.8))
    for place, color in polyps:
        draw_polyp(image, PLACES[place], COLORS[color], shade(dark, 0.6), rng)
    for _ in range(rng.randint(4, 9)):  # wet highlights
        angle, reach, size = rng.uniform(0, math.tau), rng.uniform(0.2, 0.5) * WIDTH, rng.uniform(0.8, 1.8)
        x, y = lumen_x + reach * math.cos(angle), lumen_y + reach * math.sin(angle)
        canvas.ellipse((x - 1.6 * size, y - 0.8 * size, x + 1.6 * size, y + 0.8 * size), fill=shade(lit, 1.25))
    field = Image.new("L", (WIDTH, HEIGHT), 0)  # the field of view: round, or with cut corners, as the scope has it
    overhang = (WIDTH - HEIGHT) / 2
    corner = rng.choice((0.3, 0.4, 0.5)) * WIDTH
    ImageDraw.Draw(field).rounded_rectangle((0, -overhang, WIDTH - 1, HEIGHT + overhang), corner, fill=255)
    field = field.filter(ImageFilter.GaussianBlur(1.2))
    return Image.composite(image.filter(ImageFilter.GaussianBlur(0.6)), Image.new("RGB", image.size, (8, 6, 8)), field)


def draw_polyp(image: Image.Image, place: tuple[int, int], color: Color, shadow: Color, rng: random.Random) -> None:
    """A shaded ball with its shadow and a highlight, drawn into `image`."""
    column, row = place
    x = WIDTH * (0.5 + 0.275 * column + rng.uniform(-0.02, 0.02))
    y = HEIGHT * (0.5 + 0.265 * row + rng.uniform(-0.02, 0.02))
    wide = WIDTH * rng.uniform(0.095, 0.12)
    high = wide * rng.uniform(0.8, 1.1)
    mask = Image.new("L", image.size, 0)
    ImageDraw.Draw(mask).ellipse((x - 0.95 * wide, y - 0.8 * high, x + 1.25 * wide, y + 1.3 * high), fill=120)
    image.paste(shadow, mask=mask.filter(ImageFilter.GaussianBlur(5)))
    canvas = ImageDraw.Draw(image)
    for ring in range(8):  # from the rim to the side that faces the light, at the upper left
        size, shift = 1 - ring / 8, 0.3 * ring / 8
        box = (
            x - (size + shift) * wide,
            y - (size + shift) * high,
            x + (size - shift) * wide,
            y + (size - shift) * high,
        )
        canvas.ellipse(box, fill=shade(color, 0.72 + 0.06 * ring))
    x, y = x - 0.4 * wide, y - 0.45 * high
    canvas.ellipse((x - 0.12 * wide, y - 0.09 * high, x + 0.12 * wide, y + 0.09 * high), fill=(255, 252, 245))


def dealt(items: Iterable[T], rng: random.Random) -> Iterator[T]:
    """The items endlessly, in shuffled rounds: each comes equally often, so guessing the most frequent gains little."""
    while True:
        yield from rng.sample(list(items), len(items))


def write_endoscopy_set(folder: str | Path, images: int = 1000, seed: int = 0) -> Path:
    """Write a drawn set to `folder` (must not exist): images/<img_id>.jpg and metadata.csv as Kvasir-VQA has them.

    Every image has one to three polyps and four questions: procedure, number, colour, place. Several colours or
    places are joined by "; " in alphabetical order. The same arguments give the same bytes under the same Pillow.
    Raises: `ValueError` where the folder exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists; delete it or choose another folder")
    rng = random.Random(seed)
    procedures, numbers, colors = dealt(PROCEDURES, rng), dealt((1, 2, 3), rng), dealt(COLORS, rng)
    with folder_beside(folder) as partial:
        (partial / "images").mkdir()
        with open(partial / "metadata.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["source", "question", "answer", "img_id"])
            for image in range(images):
                img_id, procedure, number, color = f"drawn{image:05d}", next(procedures), next(numbers), next(colors)
                places = rng.sample(list(PLACES), number)
                polyps = [(place, color) for place in places]
                if number > 1 and rng.random() < 0.35:
                    polyps[-1] = (places[-1], rng.choice([other for other in COLORS if other != color]))
                drawing = draw_image(procedure, polyps, rng)
                drawing.save(partial / "images" / f"{img_id}.jpg", quality=90)
                answers = {
                    PROCEDURE: procedure,
                    NUMBER: str(number),
                    COLOR: "; ".join(sorted({color for _, color in polyps})),
                    PLACE: "; ".join(sorted(places)),
                }
                table.writerows(["Drawn", question, answer, img_id] for question, answer in answers.items())
    return folder
