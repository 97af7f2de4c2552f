"""Intervals and p-values against SciPy and the bare definitions, and how often they cry wolf where nothing is."""

import itertools

import numpy as np
import pytest
from scipy import stats

from report import resampling
from report.resampling import (
    bootstrap,
    cluster_numbers,
    holm,
    in_whole_numbers,
    sign_flip_p_value,
    smallest_p_value,
)

IMAGES, QUESTIONS, COMPARISONS = 60, 25, 1000  # nine questions are Kvasir-VQA's


def null_comparisons(images, seed=0, questions=QUESTIONS):
    """(comparisons, 2 models, images, questions) right or wrong: hard images, luck of each model with each image, and
    no difference between the models."""
    generator = np.random.default_rng(seed)
    hardness = generator.normal(0.5, 1.0, (COMPARISONS, 1, images, 1))
    luck = generator.normal(0, 1.0, (COMPARISONS, 2, images, 1))
    probability = 1 / (1 + np.exp(-(hardness + luck)))
    return generator.random((COMPARISONS, 2, images, questions)) < probability


def test_sign_flip_p_value_is_the_share_of_all_sign_patterns_at_least_as_extreme():
    generator = np.random.default_rng(1)
    for images in (1, 2, 5, 11):
        differences = generator.integers(-4, 6, images)
        sums = [
            sum(s * d for s, d in zip(signs, differences, strict=True))
            for signs in itertools.product((1, -1), repeat=images)
        ]
        expected = np.mean(np.abs(sums) >= abs(differences.sum()))
        assert sign_flip_p_value(differences) == pytest.approx(expected, abs=1e-12)


def test_sign_flip_p_value_equals_scipys_exact_permutation_test():
    generator = np.random.default_rng(2)
    for _ in range(20):
        differences = generator.integers(-6, 8, 12)
        scipys = stats.permutation_test((differences,), np.sum, permutation_type="samples", n_resamples=np.inf)
        assert sign_flip_p_value(differences) == pytest.approx(scipys.pvalue, abs=1e-12)


def test_sign_flip_p_value_of_many_images_agrees_with_scipys_random_permutations():
    differences = np.random.default_rng(3).integers(-5, 6, 400) + (np.arange(400) % 20 == 0)
    scipys = stats.permutation_test((differences,), np.sum, permutation_type="samples", n_resamples=20_000, rng=0)
    assert sign_flip_p_value(differences) == pytest.approx(scipys.pvalue, abs=0.01)


def test_sign_flip_with_one_question_per_image_is_the_exact_mcnemar_test():
    differences = [1] * 14 + [-1] * 5 + [0] * 40
    assert sign_flip_p_value(differences) == pytest.approx(stats.binomtest(14, 19).pvalue)


def test_sign_flip_of_sums_of_scores_equals_scipys_exact_permutation_test():
    generator = np.random.default_rng(5)
    for _ in range(10):
        differences = generator.normal(0.1, 0.3, 12)
        scipys = stats.permutation_test((differences,), np.sum, permutation_type="samples", n_resamples=np.inf)
        assert sign_flip_p_value(in_whole_numbers(differences)) == pytest.approx(scipys.pvalue, abs=2e-3)
    counts = np.array([3.0, -1.0, 0.0])
    assert in_whole_numbers(counts).tolist() == [3, -1, 0] and in_whole_numbers(np.zeros(3)).tolist() == [0, 0, 0]


def test_equal_models_whose_answers_are_scored_from_0_to_1_are_told_apart_in_3_to_7_percent():
    """Token F1 of 25 questions on each of 60 images: hard images, and luck of each model with each image."""
    generator = np.random.default_rng(6)
    hardness = generator.normal(0, 1, (500, 1, IMAGES, 1)) + generator.normal(0, 0.7, (500, 2, IMAGES, 1))
    f1 = 1 / (1 + np.exp(-(hardness + generator.normal(0, 1, (500, 2, IMAGES, QUESTIONS)))))
    sums = f1.sum(axis=3)
    rejected = np.mean([sign_flip_p_value(in_whole_numbers(a - b)) < 0.05 for a, b in sums])
    assert 0.03 < rejected < 0.07
    paired_t = stats.ttest_rel(f1[:, 0].reshape(500, -1), f1[:, 1].reshape(500, -1), axis=1).pvalue
    assert np.mean(paired_t < 0.05) > 0.4, "what whole images protect from"


def test_similar_images_of_a_very_large_set_are_not_lost_to_rounding():
    differences = np.random.default_rng(7).uniform(0.5, 1.5, 150_000)
    assert np.count_nonzero(in_whole_numbers(differences)) == 150_000


def test_sign_flip_without_any_difference_finds_nothing():
    assert sign_flip_p_value([0, 0, 0]) == sign_flip_p_value([]) == sign_flip_p_value([2, -2]) == 1.0


def test_smallest_p_value_is_reached_when_all_differing_images_agree():
    assert smallest_p_value([3, 0, 1, 2, 1]) == sign_flip_p_value([3, 0, 1, 2, 1]) == 2 / 2**4
    assert smallest_p_value([0, 0]) == 1.0


@pytest.mark.parametrize(("questions", "mcnemars"), [(25, 0.362), (9, 0.188)])
def test_image_level_test_rejects_a_true_null_in_3_to_7_percent_where_mcnemar_cries_wolf(questions, mcnemars):
    right = null_comparisons(IMAGES, questions=questions)
    differences = right[:, 0].sum(axis=2) - right[:, 1].sum(axis=2).astype(int)
    rejected = np.mean([sign_flip_p_value(row) < 0.05 for row in differences])
    assert 0.03 < rejected < 0.07
    only_first = (right[:, 0] & ~right[:, 1]).sum(axis=(1, 2))
    only_second = (right[:, 1] & ~right[:, 0]).sum(axis=(1, 2))
    mcnemar = 2 * stats.binom.cdf(np.minimum(only_first, only_second), only_first + only_second, 0.5)
    assert np.mean(mcnemar < 0.05) == pytest.approx(mcnemars), "README.md's: what the image-level test protects from"


def test_bootstrap_interval_of_a_true_null_leaves_out_zero_in_3_to_7_percent():
    images = 300
    right = null_comparisons(images, seed=4)
    differences = right[:, 0].mean(axis=2) - right[:, 1].mean(axis=2)  # (comparisons, images)
    _, intervals = bootstrap(lambda weights: weights @ differences.T / images, np.arange(images), resamples=1000)
    assert 0.03 < np.mean((intervals[:, 0] > 0) | (intervals[:, 1] < 0)) < 0.07


def test_bootstrap_interval_agrees_with_scipys_over_clusters_of_unequal_size():
    generator = np.random.default_rng(5)
    clusters = cluster_numbers(generator.integers(0, 80, 900).tolist())
    values = (generator.random(900) < 0.3 + 0.5 * (clusters % 3 == 0)).astype(float)
    sums, counts = np.bincount(clusters, values), np.bincount(clusters)
    scipys = stats.bootstrap(
        (sums, counts), lambda s, c, axis: s.sum(axis=axis) / c.sum(axis=axis), paired=True, method="percentile", rng=0
    )  # fmt: skip
    (value,), (interval,) = bootstrap(lambda weights: (weights @ values / weights.sum(axis=1))[:, None], clusters)
    assert value == pytest.approx(values.mean())
    assert interval == pytest.approx(list(scipys.confidence_interval), abs=0.006)
    assert interval[1] - interval[0] > 1.3 * np.ptp(stats.bootstrap((values,), np.mean, rng=0).confidence_interval)


def test_bootstrap_draws_the_same_however_it_is_cut_into_chunks(monkeypatch):
    values = np.random.default_rng(6).random(50)

    def interval():
        return bootstrap(lambda weights: (weights @ values / 50)[:, None], np.arange(50), resamples=301)[1]

    whole = interval()
    monkeypatch.setattr(resampling, "CELLS_PER_CHUNK", 350)
    assert np.array_equal(interval(), whole)


def test_one_cluster_has_no_interval_instead_of_one_of_zero_width():
    values, intervals = bootstrap(lambda weights: weights @ np.ones((4, 1)) / 4, cluster_numbers(["a"] * 4))
    assert values == [1.0] and np.isnan(intervals).all()


def test_resamples_in_which_a_statistic_is_undefined_are_left_out():
    def statistic(weights):  # the mean of a part that only the first cluster has
        with np.errstate(invalid="ignore"):
            return (weights[:, :1] * 0.75) / weights[:, :1]

    values, intervals = bootstrap(statistic, np.arange(3))
    assert values == [0.75] and intervals.tolist() == [[0.75, 0.75]]


def test_holm_multiplies_the_smallest_by_all_and_never_lets_a_larger_p_value_overtake():
    for p_values in itertools.permutations([0.01, 0.03, 0.04, 0.5]):
        expected = {0.01: 0.04, 0.03: 0.09, 0.04: 0.09, 0.5: 0.5}
        assert holm(p_values) == pytest.approx([expected[p] for p in p_values])
    assert holm([0.2]) == [0.2] and holm([]) == [] and holm([0.6, 0.9]) == [1.0, 1.0]


def test_clusters_are_numbered_by_first_appearance():
    assert cluster_numbers(["b", "a", "b", 7]).tolist() == [0, 1, 0, 2]
