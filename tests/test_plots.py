"""The images of results hold what was asked for; whether they look good was looked at."""

import numpy as np
import pytest
from PIL import Image

from report import plots
from report.plots import contact_sheet, loss_curves, reliability_diagram, worst_misses


def share_of(path, colour, tolerance=12):
    """Share of pixels of about this colour."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return float(
        (np.abs(np.asarray(Image.open(path).convert("RGB")).astype(int) - wanted).max(axis=2) <= tolerance).mean()
    )


def test_reliability_diagram_shows_overconfidence_and_not_where_there_is_none(tmp_path):
    probabilities = [[0.1, 0.9], [0.2, 0.8]] * 50
    reliability_diagram(probabilities, [1] * 60 + [0] * 40, tmp_path / "over.png")
    reliability_diagram(probabilities, [1] * 100, tmp_path / "under.png")
    legend = 12 * 12 / (560 * 680)
    assert share_of(tmp_path / "over.png", plots.SALMON) > 3 * legend > share_of(tmp_path / "under.png", plots.SALMON)
    assert share_of(tmp_path / "under.png", plots.LIGHT_BLUE) > 3 * legend


@pytest.mark.parametrize("probabilities", [[[0.5, 0.5]], [[1.0, 0.0]] * 3, [[0.2, 0.3, 0.5]] * 4])
def test_reliability_diagram_draws_degenerate_cases(tmp_path, probabilities):
    reliability_diagram(probabilities, [0] * len(probabilities), tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").size == (560, 680)


def test_loss_curves_draw_what_the_log_holds(tmp_path):
    steps = [{"step": n, "epoch": n / 10, "loss": 3 / n} for n in range(1, 31)]
    evaluations = [
        {"step": n, "epoch": n / 10, "eval_loss": 1.0, "eval_accuracy": 0.6, "test_accuracy": 0.5} for n in (10, 20)
    ]
    loss_curves(steps, tmp_path / "train.png")
    loss_curves(steps + evaluations, tmp_path / "both.png")
    assert Image.open(tmp_path / "both.png").width > Image.open(tmp_path / "train.png").width  # a panel for accuracy
    assert share_of(tmp_path / "both.png", plots.ORANGE) > 0 == share_of(tmp_path / "train.png", plots.ORANGE)


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 1, "loss": 2.5}],
        [{"step": 0, "epoch": 0.0, "eval_accuracy": 1.0}],
        [{"step": n, "loss": 0.0} for n in (1, 2)],
        [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 1e9}],
        [{"epoch": n, "predict_loss": 1.0, "val_predict_accuracy": 0.99 + 0.005 * n} for n in (1, 2)],
    ],
)
def test_loss_curves_draw_short_flat_and_broken_logs(tmp_path, rows):
    loss_curves(rows, tmp_path / "plot.png")
    Image.open(tmp_path / "plot.png").load()


@pytest.mark.parametrize("order", [("eval", "test"), ("test", "eval")])
def test_two_curves_that_lie_on_each_other_are_both_seen(tmp_path, order):
    rows = [{"step": n, "epoch": n, **{f"{split}_loss": 1 / n for split in order}} for n in range(1, 9)]
    loss_curves(rows, tmp_path / "plot.png")
    legend = 30 * 6 / (540 * 460)
    assert min(share_of(tmp_path / "plot.png", colour, 60) for colour in (plots.BLUE, plots.ORANGE)) > 2 * legend


def test_the_chosen_epoch_and_the_experiments_name_are_marked(tmp_path):
    rows = [{"step": n, "epoch": n, "eval_loss": 1.0} for n in range(1, 9)]
    images = []
    for number, marks in enumerate([{}, {"experiment": "EXP2"}, {"chosen_step": 3}, {"chosen_step": 7}]):
        assert loss_curves(rows, tmp_path / f"{number}.png", **marks)
        images.append(np.asarray(Image.open(tmp_path / f"{number}.png").convert("L")).astype(int))
    assert (images[1] != images[0])[:40].any() and not (images[1] != images[0])[40:].any()
    changed = [np.flatnonzero((image != images[0])[130:390].any(axis=0)).mean() for image in images[2:]]
    assert changed == pytest.approx([70 + 430 * 3 / 8, 70 + 430 * 7 / 8], abs=1)


def test_the_confidence_of_two_classes_begins_at_one_half_and_the_legend_covers_no_bar(tmp_path):
    filled = {}
    for classes in (2, 3):
        rest = np.array([[0.45, 0.45, 0.1][:classes]] * 20)
        rest[:, -1] = 1 - rest[:, :-1].sum(axis=1)
        reliability_diagram(rest, [classes - 1 if classes == 2 else 0] * 20, tmp_path / f"{classes}.png")
        pixels = np.asarray(Image.open(tmp_path / f"{classes}.png").convert("RGB")).astype(int)[130:460, 70:530]
        blue = (np.abs(pixels - [0x24, 0x56, 0xA6]).max(axis=2) < 12).any(axis=0)
        filled[classes] = np.flatnonzero(blue).min() / 460
    assert filled[2] == pytest.approx((8 / 15 - 0.5) / 0.5, abs=0.02)
    assert filled[3] == pytest.approx(6 / 15, abs=0.02)
    reliability_diagram([[0.49, 0.51]] * 50, [1] * 50, tmp_path / "high.png")  # a bar up to the top, at the left
    pixels = np.asarray(Image.open(tmp_path / "high.png").convert("RGB")).astype(int)
    assert np.abs(pixels[130, 76] - [0x8F, 0xB4, 0xEA]).max() < 12


def test_nothing_to_draw_is_an_error(tmp_path):
    assert loss_curves([{"step": 1, "epoch": 0.1}], tmp_path / "plot.png") is False
    with pytest.raises(ValueError, match="no samples"):
        reliability_diagram([], [], tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())


def test_ticks_are_round_and_enclose_the_values():
    assert plots._ticks(0, 6) == [0, 2, 4, 6]
    assert plots._ticks(0.312, 0.788) == [0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    for low, high in ((0, 0), (1e-7, 3e-7), (-2.5, 1e5)):
        ticks = plots._ticks(low, high)
        assert ticks[0] <= low and ticks[-1] >= high and len(ticks) >= 2


WORDS = {"caption": "press ok", "prediction": "[150, 450]", "name": "a/shot.png"}


def test_contact_sheet_says_the_run_its_score_and_of_each_miss_what_was_asked_what_was_said_and_the_file(
    tmp_path, monkeypatch
):
    written = []
    draw_text = plots._Canvas.text
    monkeypatch.setattr(plots._Canvas, "text", lambda *a, **k: written.append(a[3]) or draw_text(*a, **k))
    items = [{"image": Image.new("RGB", (90, 90)), "point": (9, 9), "predicted_point": (39, 49), **WORDS}]
    items.append({**items[0], "predicted_point": None, "prediction": " "})
    contact_sheet(items, tmp_path / "sheet.png", "EXP: worst misses", "40 % of 5 clicks are right")
    said = ("said: [150, 450]", "50 px off, 39.3% of the diagonal", "said nothing", "no point in it")
    for text in ("EXP: worst misses", "40 % of 5 clicks are right", *said):
        assert written.count(text) == 1, text
    assert written.count("press ok") == written.count("a/shot.png") == 2


def test_contact_sheet_marks_gold_and_predicted_points_where_they_are(tmp_path):
    Image.new("RGB", (600, 600), "black").save(tmp_path / "shot.png")
    item = {"image": tmp_path / "shot.png", "point": (450, 150), "predicted_point": (150, 450), **WORDS}
    contact_sheet([item], tmp_path / "sheet.png", "title", "score")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)[plots.SHEET_HEAD :][
        :300, 16:316
    ]  # the tile
    red, green = (np.argwhere((sheet[..., c] > 130) & (sheet.sum(axis=2) - sheet[..., c] < 170)) for c in (0, 1))
    assert red.mean(axis=0) == pytest.approx([225, 75], abs=2)  # (y, x), at half size
    assert green.mean(axis=0) == pytest.approx([75, 225], abs=2)


def test_contact_sheet_takes_unparsable_answers_any_script_and_no_items_at_all(tmp_path):
    image = Image.new("RGB", (40, 900), "white")
    item = {"image": image, "point": (5, 5), "predicted_point": None, "bbox": (0, 0, 9, 9), **WORDS}
    item["caption"] = "按钮 " * 90
    contact_sheet([item] * 5, tmp_path / "sheet.png", "title", "score")
    contact_sheet([], tmp_path / "none.png", "按钮 " * 90, "score")
    assert Image.open(tmp_path / "sheet.png").height > Image.open(tmp_path / "none.png").height


def test_worst_misses_are_wrong_far_and_last_the_unparsable():
    rows = [
        {"id": n, "point": (0, 0), "predicted_point": point, "image_size": (100, 100)}
        for n, point in enumerate([(1, 1), (50, 0), None, (90, 90), (0, 20)])
    ]
    assert [row["id"] for row in worst_misses(rows)] == [3, 1, 4, 2]
    assert [row["id"] for row in worst_misses(rows, 2)] == [3, 1]
