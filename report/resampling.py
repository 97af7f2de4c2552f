"""Intervals and tests for scores whose samples come in clusters (the questions of one image).

Questions about one image are not independent, so whole images are resampled and whole images are flipped: a test that
treats 25 questions of an image as 25 independent observations finds a difference in a fifth of all comparisons where
there is none. Sources: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13 (percentile interval);
Good, Permutation Tests (2000) on the sign flip; Holm (1979).
"""

from collections.abc import Callable, Hashable, Sequence

import numpy as np

from report.variance import LEVEL

RESAMPLES = 2000
SEED = 0
UNITS = 50_000  # into which differences that are no counts are cut, all together, and 8 for each image that differs
CELLS_PER_CHUNK = 4_000_000  # weights held at once, 32 MB: memory stays flat however many samples there are


def cluster_numbers(keys: Sequence[Hashable]) -> np.ndarray:
    """Cluster keys -> (samples,) int array that counts the distinct keys 0, 1, 2 ... in order of first appearance."""
    seen: dict[Hashable, int] = {}
    return np.array([seen.setdefault(key, len(seen)) for key in keys], dtype=np.int64)


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray],
    clusters: np.ndarray,
    resamples: int = RESAMPLES,
    seed: int = SEED,
    level: float = LEVEL,
) -> tuple[np.ndarray, np.ndarray]:
    """Value and percentile interval of several statistics at once, resampling whole clusters with replacement.

    statistic: takes weights (resamples, samples), how often each sample counts, and returns (resamples, statistics),
        NaN where a statistic is undefined, as an accuracy over no samples is.
    clusters: (samples,) int, from cluster_numbers.
    Returns: values (statistics,), the statistic of the samples themselves, and intervals (statistics, 2). Resamples in
    which a statistic is undefined are left out of its interval. With fewer than two clusters nothing is known about
    the spread, and the interval is NaN rather than a false zero width.
    """
    sample_count = len(clusters)
    values = np.asarray(statistic(np.ones((1, sample_count))), dtype=float)[0]
    cluster_count = int(clusters.max()) + 1 if sample_count else 0
    if cluster_count < 2:
        return values, np.full((len(values), 2), np.nan)
    generator = np.random.default_rng(seed)
    chunk = max(1, CELLS_PER_CHUNK // sample_count)
    drawn_values = []
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = generator.integers(0, cluster_count, size=(rows, cluster_count))
        drawn += np.arange(rows)[:, None] * cluster_count  # one bincount for all rows
        counts = np.bincount(drawn.ravel(), minlength=rows * cluster_count).reshape(rows, cluster_count)
        drawn_values.append(np.asarray(statistic(counts[:, clusters].astype(float)), dtype=float))
    return values, _percentiles(np.concatenate(drawn_values), level)


def _percentiles(drawn_values: np.ndarray, level: float) -> np.ndarray:
    """(resamples, statistics) -> (statistics, 2), NaN ignored; a statistic that is NaN throughout stays NaN."""
    intervals = np.full((drawn_values.shape[1], 2), np.nan)
    defined = ~np.isnan(drawn_values)
    ends = [(1 - level) / 2, (1 + level) / 2]
    whole = defined.all(axis=0)
    if whole.any():
        with np.errstate(invalid="ignore"):  # between two infinite medians numpy says NaN
            quantiles = np.quantile(drawn_values[:, whole], ends, axis=0).T
        intervals[whole] = np.where(np.isnan(quantiles), np.inf, quantiles)
    for column in np.flatnonzero(defined.any(axis=0) & ~whole):
        intervals[column] = np.quantile(drawn_values[defined[:, column], column], ends)
    return intervals


def in_whole_numbers(differences: np.ndarray) -> np.ndarray:
    """(images,) differences -> whole numbers for `sign_flip_p_value`: counts as they are, sums of other scores rounded
    to 1/50,000 of all of them together, and finer where there are more than 6,250 images: to an eighth of their mean
    size, so that few become 0. The test of rounded differences is as exact as that of counts,
    since an image's difference and its opposite are rounded alike."""
    counts = np.rint(differences)
    if not np.allclose(differences, counts, rtol=0, atol=1e-9):
        units = max(UNITS, 8 * np.count_nonzero(differences))
        counts = np.rint(differences * (units / np.abs(differences).sum()))
    return counts.astype(np.int64)


def sign_flip_p_value(differences: Sequence[int] | np.ndarray) -> float:
    """Exact two-sided p-value of the paired sign-flip permutation test.

    differences: (images,) whole numbers, how many more questions of an image the first model answered right than the
        second. If neither model is better, each image's difference could as well have had the other sign.
    Returns: the share of all 2^images sign patterns whose |sum| is at least the observed one. No pattern is sampled:
    the differences are whole numbers, so the distribution of the sum is built up image by image (Pagano and Tritchler
    1983), and the value is exact for any number of images.
    """
    differences = np.asarray(differences)
    sizes = np.abs(differences).astype(np.int64)
    assert np.array_equal(sizes, np.abs(differences)), "differences are counts of questions"
    observed, total = abs(int(differences.sum())), int(sizes.sum())
    if observed == 0:
        return 1.0

    probability = np.zeros(total + 1)  # of the sum of the sizes whose sign came up positive
    probability[0] = 1.0
    reached = 0
    for size in sizes[sizes > 0].tolist():
        grown = probability[: reached + 1] / 2
        probability[: reached + 1] = grown
        probability[size : reached + size + 1] += grown
        reached += size
    # sum = 2 * positive - total, symmetric about 0: both tails are as heavy, and disjoint because observed > 0
    return min(1.0, 2 * float(probability[(total + observed) // 2 :].sum()))


def smallest_p_value(differences: Sequence[int] | np.ndarray) -> float:
    """The smallest value sign_flip_p_value could have had, all differing images agreeing: 2 / 2^(images that differ).

    Above 0.05 (fewer than six differing images) the test could not have found anything, however good a model is.
    """
    return min(1.0, 2.0 ** (1 - int(np.count_nonzero(differences))))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of one family -> p-values adjusted by Holm's step-down method, in the same order.

    Rejecting where the adjusted value is below 0.05 keeps the chance of any false positive in the family below 5 %.
    """
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted
