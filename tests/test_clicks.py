"""Points between pixels of the original image and what each family speaks."""

import json
import random
from dataclasses import replace

import pytest
from conftest import shared_data

import tasks
from config import Config, Data
from errors import UserError
from family import COORDINATES, Family
from images import letterbox_placement, native_placement
from tasks import click

FACTORS = {"qwen2_vl": (14, 2), "qwen2_5_vl": (14, 2), "qwen3_vl": (16, 2), "qwen3_5": (16, 2)}


def family(model_type):
    patch, merge = FACTORS[model_type]
    factor = patch * merge
    return Family(
        model_type, COORDINATES[model_type], patch, merge, 2, min_pixels=4 * factor**2, max_pixels=16384 * factor**2
    )


def placement(size, model_type, resize, limit):
    """limit: letterbox: the side in image tokens; native: the most image tokens."""
    one = family(model_type)
    if resize == "letterbox":
        return letterbox_placement(*size, limit * one.factor)
    return native_placement(*size, one.factor, one.min_pixels, limit * one.factor**2)


def config(**changes):
    values = {"experiment": "t", "model_name": "m", "task": "click", "data": Data("t.json"), "output_dir": "o"}
    return Config(**{**values, "results_dir": "r", "learning_rate": 1e-4, "image_size": 768, **changes})


# ------------------------------------------------------------------------------------------------- published numbers


@pytest.fixture(scope="module")
def published():
    return json.loads(shared_data("expectations/published_numbers.json").read_text(encoding="utf-8"))


def test_the_published_box_of_the_428x640_image_is_reproduced_in_both_conventions(published):
    facts = next(fact for fact in published if "qwen2_vl_relative_0_1000" in fact)
    height, width = facts["qwen2_5_vl_absolute_on_resized_428x640_to"]["resized_hw"]

    def spoken(model_type):  # both corners of the box
        corners = ((146, 137), (615, 415))
        return [number for corner in corners for number in click.to_prompt(corner, placed, family(model_type))]

    for model_type in ("qwen2_vl", "qwen3_vl", "qwen3_5"):
        placed = placement((640, 428), model_type, "native", 16384)
        assert spoken(model_type) == facts["qwen2_vl_relative_0_1000"]
    placed = placement((640, 428), "qwen2_5_vl", "native", 16384)
    assert placed.model_size == (width, height)
    assert spoken("qwen2_5_vl") == facts["qwen2_5_vl_absolute_on_resized_428x640_to"]["bbox"]


def test_the_calendar_screenshots_boxes_are_spoken_as_published():
    for target in json.loads(shared_data("gui/calendar_boxes.json").read_text(encoding="utf-8")):
        x, y, width, height = target["bbox_xywh_px"]
        point = click.centre((x, y, x + width, y + height))
        assert list(point) == target["center_px"]
        placed = placement(target["size_wh"], "qwen3_vl", "native", 16384)
        assert list(click.to_prompt(point, placed, family("qwen3_vl"))) == target["center_qwen3vl_0_1000"]
        if shares := target["seeclick_readme_point_norm01"]:  # what another model answered to this instruction
            spoken = [share * click.RELATIVE_UNITS for share in shares]
            x, y = click.to_original(spoken, placed, family("qwen3_vl"))
            left, top, width, height = target["bbox_xywh_px"]
            assert left <= x <= left + width and top <= y <= top + height


def test_published_answers_lie_at_their_published_pixels(published):
    phone, scene = (next(fact for fact in published if name in fact["what"]) for name in ("mobile_en", "spatio_case2"))
    placed = placement((1440, 3120), "qwen3_vl", "native", 16384)
    x, y = click.to_original(click.parse_point("[447,81]"), placed, family("qwen3_vl"))
    assert [round(x), round(y)] == phone["pixel"]
    placed = placement((480, 640), "qwen3_vl", "native", 16384)
    point = click.parse_point('```json\n[{"point_2d": [925, 618], "label": "the cup 3, 4"}]\n```')
    assert list(click.to_original(point, placed, family("qwen3_vl"))) == pytest.approx(scene["pixel"])


# -------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("resize", ["letterbox", "native"])
@pytest.mark.parametrize("model_type", list(FACTORS))
def test_original_to_model_to_original_is_within_one_unit_of_the_coarser_grid(model_type, resize):
    generator = random.Random(f"{model_type} {resize}")
    one = family(model_type)
    for _ in range(10_000):
        ratio = 20 ** generator.uniform(-1, 1)  # aspect ratios up to 1:20 and 20:1
        area = 10 ** generator.uniform(3.5, 7.5)
        size = (max(1, round((area * ratio) ** 0.5)), max(1, round((area / ratio) ** 0.5)))
        limit = generator.randint(4, 60) if resize == "letterbox" else generator.randint(16, 16384)
        placed = placement(size, model_type, resize, limit)
        whole = generator.random() < 0.5
        point = tuple(generator.randint(0, side) if whole else generator.uniform(0, side) for side in size)
        spoken = click.parse_point(click.format_point(point, placed, one))
        back = click.to_original(spoken, placed, one)
        for axis in (0, 1):
            unit = placed.model_size[axis] / click.units(placed, one)[axis]  # in pixels the model sees
            unit *= size[axis] / placed.content_size[axis]  # in pixels of the original
            assert 0 <= back[axis] <= size[axis]
            assert abs(back[axis] - point[axis]) <= max(unit, 1.0) * 0.5000001, (size, point, placed)


def test_letterbox_shifts_the_point_by_the_border():
    placed = letterbox_placement(720, 1280, 768)  # content 432×768 at (168, 0)
    assert click.to_prompt((360, 640), placed, family("qwen3_vl")) == (500, 500)
    assert click.to_prompt((0, 0), placed, family("qwen3_vl")) == (round(168 / 768 * 1000), 0)
    placed = letterbox_placement(720, 1280, 756)
    assert click.to_prompt((0, 1280), placed, family("qwen2_5_vl")) == (165, 756)


@pytest.mark.parametrize("resize", ["letterbox", "native"])
def test_a_prediction_outside_the_image_is_clamped_to_it(resize):
    for model_type in FACTORS:
        placed = placement((300, 100), model_type, resize, 20)
        for spoken in ((-50, -50), (99_999, 99_999), (0, 0)):
            x, y = click.to_original(spoken, placed, family(model_type))
            assert 0 <= x <= 300 and 0 <= y <= 100


# ----------------------------------------------------------------------------------------------------------- parsing


@pytest.mark.parametrize(
    ("text", "point"),
    [
        ("[512, 384]", (512, 384)),
        ("(512,384)", (512, 384)),
        (" [ 512 , 384 ] .", (512, 384)),
        ("[[512, 384]]", (512, 384)),
        ("512, 384", (512, 384)),
        ("512 384", (512, 384)),
        ("512.5, 384.25", (512.5, 384.25)),
        ("Click left-hand at 512, 384.", (512, 384)),
        ("[-3, 384]", (-3, 384)),
        ("The button is at (512, 384), below the 2 others.", (512, 384)),
        ('{"point_2d": [512, 384]}', (512, 384)),
        ('```json\n[{"label": "tab [1, 2]", "point_2d": [512, 384]}]\n```', (512, 384)),
        ('{"name": "computer", "arguments": {"action": "left_click", "coordinate": [512, 384]}}', (512, 384)),
        ("{'x': 512, 'y': 384}", (512, 384)),
        ("click(512, 384)", (512, 384)),
        ("click(x=512, y=384)", (512, 384)),
        ("click(start_box='(512,384)')", (512, 384)),
        ("click(point='<point>512 384</point>')", (512, 384)),
        ("<point>512, 384</point>", (512, 384)),
        ("<point>[512, 384]</point>", (512, 384)),
        ('<point x="512" y="384" alt="login">login</point>', (512, 384)),
        ('<points x1="512" y1="384" x2="7" y2="9" alt="a">a</points>', (512, 384)),
        ("<points x=512 y=384>", (512, 384)),
        ("<|box_start|>(512,384)<|box_end|>", (512, 384)),
        ("[500, 380, 524, 388]", (512, 384)),
        ("(500,380),(524,388)", (512, 384)),
        ("<|box_start|>(500,380),(524,388)<|box_end|>", (512, 384)),
        ('{"bbox_2d": [500, 380, 524, 388], "label": "5"}', (512, 384)),
        ("[512, 384] or [1, 2]", (512, 384)),
        ("[512, 384] in [1, 2, 3, 4], (5,6),(7,8)", (512, 384)),
        ("[500, 380, 524, 388], not [1, 2]", (512, 384)),
        ("", None),
        ("I cannot find it.", None),
        ("[512]", None),
        ("512", None),
        ("[512, 38", None),  # cut off in the middle of a number
        ("[1, 2, 3]", None),
        ("[a, b]", None),
        ("Numbers: 4, 2, 6.", None),
        ("[nan, 3]", None),
        (f"[{'9' * 400}, 3]", None),
    ],
)
def test_answers_are_parsed_leniently_and_what_holds_no_point_gives_none(text, point):
    assert click.parse_point(text) == point


def test_an_unparsable_answer_is_a_row_without_a_point():
    placed = letterbox_placement(720, 1280, 128)
    assert click.predicted("no idea", placed, family("qwen3_vl")) == {
        "predicted_point": None,
        "image_size": [720, 1280],
    }


# ----------------------------------------------------------------------------------------------------------- samples


def sample(**changes):
    return {"id": "1", "image": "a.png", "instruction": "tap on the card", "point": [10, 20], **changes}


def test_a_click_sample_becomes_a_question_with_the_spoken_point_as_its_answer():
    placed = native_placement(200, 400, 32, 4096, 16777216)
    asked = click.as_question(sample(bbox=[0, 0, 50, 50], question="other"), placed, family("qwen3_vl"))
    assert asked == {"id": "1", "image": "a.png", "question": "tap on the card", "answer": "[50, 50]"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instruction": " "}, "'instruction' is missing"),
        ({"point": None}, "'point' is missing"),
        ({"point": [1, 2, 3]}, "list of 2 numbers"),
        ({"point": [True, 2]}, "list of 2 numbers"),
        ({"point": [float("nan"), 2]}, "list of 2 numbers"),
        ({"point": [201, 20]}, "outside the image of 200×400"),
        ({"point": [10, -1]}, "outside the image of 200×400"),
        ({"bbox": [0, 0, 50]}, "list of 4 numbers"),
        ({"bbox": [0, 0, 50, 401]}, "leaves the image"),
        ({"bbox": [100, 100, 50, 50]}, r"\[x, y, width, height\]"),
        ({"bbox": [100, 100, 150, 150]}, "outside its bbox"),
        ({"image_size": [400, 200]}, "image_size says"),
        ({"image": ["a.png", "b.png"]}, "has 2"),
        ({"image": None}, "has 0"),
    ],
)
def test_a_bad_click_sample_is_an_error_that_says_what_is_wrong(changes, message):
    placed = native_placement(200, 400, 32, 4096, 16777216)
    with pytest.raises(UserError, match=message):
        click.as_question(sample(**changes), placed, family("qwen3_vl"))


def test_a_text_model_cannot_click():
    with pytest.raises(UserError, match="text model"):
        click.as_question(sample(), letterbox_placement(200, 400, 64), Family("qwen2", None))


# -------------------------------------------------------------------------------------------------------- convention


def write_convention(folder, one, values):
    for name, content in tasks.records(one, values).items():
        (folder / name).write_text(json.dumps(content))


def test_the_convention_is_kept_for_clicks_only_and_names_what_the_numbers_mean():
    one = family("qwen2_5_vl")
    assert tasks.records(one, config(task="vqa")) == {}
    kept = tasks.records(one, config(image_size=None, resize="native"))["coordinates.json"]
    assert kept == {
        "coordinates": "pixels of the image the model sees",
        "resize": "native",
        "max_pixels": one.max_pixels,
        "template": "plain",
    }


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"image_size": 512}, "image_size 768, here 512"),
        ({"resize": "native", "image_size": None}, "resize 'letterbox', here 'native'"),
        ({"template": "ultra_condensed"}, "template 'plain', here 'ultra_condensed'"),
    ],
)
def test_other_settings_than_the_trained_ones_are_refused_with_both_named(tmp_path, changes, named):
    one = family("qwen3_vl")
    write_convention(tmp_path, one, config())
    tasks.check_record(tmp_path, one, config())
    with pytest.raises(UserError, match=named):
        tasks.check_record(tmp_path, one, config(**changes))


def test_a_model_that_speaks_other_coordinates_is_refused(tmp_path):
    write_convention(tmp_path, family("qwen3_vl"), config())
    with pytest.raises(UserError, match=r"0 to 1000 .* here 'pixels"):
        tasks.check_record(tmp_path, family("qwen2_5_vl"), config())


def test_the_native_limit_is_compared_as_it_works_out_not_as_it_is_written(tmp_path):
    one = family("qwen3_vl")
    native = {"resize": "native", "image_size": None}
    write_convention(tmp_path, one, config(**native))
    tasks.check_record(tmp_path, one, config(**native, max_pixels=one.max_pixels))
    with pytest.raises(UserError, match="max_pixels"):
        tasks.check_record(tmp_path, replace(one, max_pixels=1024), config(**native))
