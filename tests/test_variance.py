"""Intervals and tests by formula, against SciPy and the same numbers worked out by hand."""

import numpy as np
import pytest
from scipy import stats

from report.variance import Estimate, Plan, wilson


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


@pytest.mark.parametrize(("images", "accuracy"), [(10, 0.9), (100, 0.99), (100, 0.9), (100, 0.5)])
def test_the_interval_of_an_accuracy_covers_it_where_a_percentile_bootstrap_does_not(images, accuracy):
    """Images of nine questions that agree with correlation 0.3; all cells: bench/simulations.py."""
    generator = np.random.default_rng(images)
    asked, covered = np.full(images, 9), []
    of_image = generator.beta(accuracy * 7 / 3, (1 - accuracy) * 7 / 3, (1000, images))
    for hits in generator.binomial(9, of_image):
        low, high = Estimate.of([hits[None]], asked).wilson()
        covered.append(low <= accuracy <= high)
    assert 0.93 < np.mean(covered) < (0.97 if (images, accuracy) in ((100, 0.5), (100, 0.9)) else 0.995)


def test_one_image_has_no_interval():
    alone = Estimate.of([np.array([[3]])], np.array([4]))
    assert alone.value == 0.75 and alone.wilson() is None and alone.interval() is None and alone.p_value() == 1.0


# ------------------------------------------------------------------------------------------------ seeds and images


def by_hand(first, second):
    """(difference, variance, degrees of freedom) of two balanced layouts (runs, images) of image means, from the sums
    of squares of an analysis of variance: seed + image − interaction."""
    images = first.shape[1]
    paired = [float(a - b) for a, b in zip(first.mean(axis=0), second.mean(axis=0), strict=True)]
    mean = sum(paired) / images
    of_images = sum((one - mean) ** 2 for one in paired) / (images - 1) / images
    of_seeds = of_both = 0.0
    seeds = len(first) + len(second) - 2
    for layout in (first, second):
        runs, grand = len(layout), layout.mean()
        of_run, of_image = layout.mean(axis=1), layout.mean(axis=0)
        seed = images * sum((one - grand) ** 2 for one in of_run) / (runs - 1)
        both = 0.0
        for run in range(runs):
            for image in range(images):
                both += (layout[run, image] - of_run[run] - of_image[image] + grand) ** 2
        both /= (runs - 1) * (images - 1)
        of_seeds += seed / (runs * images)
        of_both += both / (runs * images)
    total = max(of_images + of_seeds - of_both, of_seeds)
    if total < of_images / 4:
        return mean, of_images, images - 1
    parts = (of_images, images - 1), (of_seeds, seeds), (of_both, seeds * (images - 1))
    return mean, total, total**2 / sum(variance**2 / degrees for variance, degrees in parts)


def runs_of(generator, runs, images, questions, accuracy=0.5, seed_spread=0.03):
    ease = generator.normal(0, 0.2, images)
    seeds = generator.normal(0, seed_spread, (runs, 1))
    return generator.binomial(questions, np.clip(accuracy + ease + seeds, 0, 1))


@pytest.mark.parametrize("number", range(10))
def test_the_two_way_t_is_that_of_an_analysis_of_variance_done_by_hand(number):
    generator = np.random.default_rng(number)
    images, questions, runs = 40 + 30 * number, 2 + number % 4, (2 + number % 3, 2 + number // 4)
    first, second = (runs_of(generator, count, images, questions, seed_spread=0.01 * number) for count in runs)
    estimate = Estimate.of([first, second], np.full(images, questions))
    difference, variance, degrees = by_hand(first / questions, second / questions)
    one_more = np.mean([one**2 for one in first.mean(axis=0) - second.mean(axis=0) if one]) / (images * questions) ** 2
    assert estimate.value == pytest.approx(difference, abs=1e-12)
    assert estimate.variance == pytest.approx(variance + one_more, rel=1e-9)
    assert estimate.degrees == pytest.approx(degrees, rel=0.1), "one more image moves them a little"
    t = estimate.value / estimate.error
    assert estimate.p_value() == pytest.approx(2 * stats.t.sf(abs(t), estimate.degrees))
    low, high = estimate.interval()
    assert stats.t.cdf((high - low) / 2 / estimate.error, estimate.degrees) == pytest.approx(0.975)


def test_with_one_run_each_a_difference_has_the_paired_t_interval_over_images():
    generator = np.random.default_rng(3)
    first, second = (runs_of(generator, 1, 500, 6) for _ in range(2))
    estimate = Estimate.of([first, second], np.full(500, 6))
    scipys = stats.ttest_rel(first[0] / 6, second[0] / 6).confidence_interval(0.95)
    assert estimate.interval() == pytest.approx(list(scipys), rel=5e-3)
    assert estimate.seed is None and estimate.seed_spread(1) is None


def test_runs_that_agree_on_every_question_are_as_good_as_one():
    generator = np.random.default_rng(4)
    first, second = (runs_of(generator, 1, 200, 6) for _ in range(2))
    asked = np.full(200, 6)
    once = Estimate.of([first, second], asked)
    thrice = Estimate.of([first.repeat(3, axis=0), second.repeat(3, axis=0)], asked)
    assert thrice.interval() == pytest.approx(once.interval()) and thrice.degrees == pytest.approx(once.degrees)


@pytest.mark.parametrize("right", [0, 2, 6])
def test_runs_that_are_right_equally_often_on_every_image_have_an_interval(right):
    hits, asked = np.full((2, 5), right), np.full(5, 6)
    one, both = Estimate.of([hits], asked), Estimate.of([hits, hits], asked)
    low, high = one.wilson()
    assert low <= right / 6 <= high and high - low > 0.3
    assert both.interval()[0] < 0 < both.interval()[1] and both.p_value() == 1.0


def test_two_models_that_answer_alike_throughout_are_not_shown_equal_within_anything():
    hits, asked = np.full((1, 24), 3), np.full(24, 6)
    low, high = Estimate.of([hits, hits], asked).interval(0.9)
    assert low == -high and high == pytest.approx(stats.t.ppf(0.95, 23) / 24), "one image more could differ"


# -------------------------------------------------------------------------------------------------- power and plan


def test_the_detectable_difference_is_that_of_the_closed_form():
    generator = np.random.default_rng(5)
    right = generator.random((2, 8000)) < [[0.6], [0.62]]
    estimate = Estimate.of([right[:1].astype(int), right[1:].astype(int)], np.ones(8000, dtype=int))
    discordant = np.mean(right[0] != right[1])
    expected = (stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) * np.sqrt(discordant / 8000)
    assert estimate.detectable(0.05) == pytest.approx(expected, rel=2e-3)
    assert estimate.detectable(0.05 / 10) > 1.3 * expected


def test_a_plan_foretells_the_test_it_was_made_from_and_what_it_says_is_enough_is():
    generator = np.random.default_rng(6)
    runs = [runs_of(generator, 4, 900, 9, seed_spread=0.01) for _ in range(2)]
    estimate = Estimate.of(runs, np.full(900, 9))
    plan = Plan.of(estimate, 4)
    assert plan.detectable(900, 4) == pytest.approx(estimate.detectable(0.05), rel=5e-3)
    assert np.sqrt(plan.seeds / 2) == pytest.approx(0.01, rel=0.6)
    for count in (3, 10):
        images = plan.images(0.03, count)
        assert plan.detectable(images, count) <= 0.03 < plan.detectable(images - 1, count)
    assert Plan.of(estimate, 4, spread=0.05).images(0.03, 3) is None, "no number of images makes up for three seeds"
    assert Plan.of(estimate, 4, spread=0.0).images(0.03, 3) < plan.images(0.03, 3)
