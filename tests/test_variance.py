"""Intervals and tests by formula, against SciPy and the same numbers worked out by hand."""

import numpy as np
import pytest
from scipy import stats

from report.variance import Estimate, wilson


def independent(right, samples):
    """An accuracy of samples that each have an image of their own."""
    return Estimate.of([np.array([[1] * right + [0] * (samples - right)])], np.ones(samples, dtype=int))


def test_wilsons_interval_of_independent_samples_is_scipys():
    for right, samples in ((700, 1000), (500, 1000), (90, 1000)):
        scipys = stats.binomtest(right, samples).proportion_ci(method="wilson")
        assert independent(right, samples).wilson() == pytest.approx(list(scipys), abs=2e-4)
    for right in (0, 30):  # nothing varies: as many samples as there are images
        scipys = stats.binomtest(right, 30).proportion_ci(method="wilson")
        assert independent(right, 30).wilson() == pytest.approx(list(scipys), abs=1e-12)


def test_an_image_whose_questions_agree_counts_as_one_sample():
    generator = np.random.default_rng(1)
    right = generator.random(200) < 0.7
    once = Estimate.of([right[None].astype(int)], np.ones(200, dtype=int)).wilson()
    nine_times = Estimate.of([9 * right[None].astype(int)], np.full(200, 9)).wilson()
    assert nine_times == pytest.approx(once, abs=1e-3)
    assert Estimate.of([generator.binomial(9, 0.7, (1, 200))], np.full(200, 9)).wilson()[0] > once[0] + 0.02


def test_the_effective_sample_size_is_never_above_the_number_of_samples():
    assert wilson(0.5, 1e-9, 99, 900) == pytest.approx(wilson(0.5, 0.25 / 900 / 2, 99, 900))


def test_images_without_any_question_of_a_part_change_nothing():
    hits, asked = np.array([[3, 0, 5, 2]]), np.array([4, 0, 6, 6])
    assert Estimate.of([hits], asked) == Estimate.of([hits[:, [0, 2, 3]]], asked[[0, 2, 3]])


def test_one_image_has_no_interval():
    alone = Estimate.of([np.array([[3]])], np.array([4]))
    assert alone.value == 0.75 and alone.wilson() is None and alone.interval() is None and alone.p_value() == 1.0
