"""How far a share of right answers, or a difference of two, may be off: by formula, over images and training runs.

Sources: Korn and Graubard, Survey Methodology 24 (1998) and Wilson (1927) on shares whose samples come in clusters;
Miller, Adding Error Bars to Evals (2024, arXiv 2411.00640); Satterthwaite (1946) on the degrees of freedom of a sum of
variances; Schuirmann (1987) on two one-sided tests of equivalence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

LEVEL = 0.95
POWER = 0.8
ROUNDING = 1e-9  # a mean of scores depends on their order, by less


def t_quantile(probability: float, degrees: float) -> float:
    return float(special.stdtrit(degrees, probability))


def wilson(share: float, variance: float, degrees: float, samples: int, level: float = LEVEL) -> list[float]:
    """Wilson's interval of a share, as if of that many independent samples as would have its variance.

    degrees: of freedom of the variance, images less one. samples: the most that the effective sample size may be.
    Where the variance is 0, which says little (all are right), each image counts as one sample. Never of width zero.
    """
    effective = share * (1 - share) / variance if variance > 0 else 0.0
    effective = effective or degrees + 1
    effective *= (t_quantile((1 + level) / 2, max(samples - 1, 1)) / t_quantile((1 + level) / 2, degrees)) ** 2
    effective = min(max(effective, 1.0), samples)
    z = float(special.ndtri((1 + level) / 2))
    centre = (share + z**2 / (2 * effective)) / (1 + z**2 / effective)
    half = z * np.sqrt(share * (1 - share) / effective + (z / (2 * effective)) ** 2) / (1 + z**2 / effective)
    return [max(0.0, min(share, float(centre - half))), min(1.0, max(share, float(centre + half)))]  # rounding


def accuracy_interval(correct: np.ndarray, clusters: np.ndarray, level: float = LEVEL) -> list[float] | None:
    """The interval of a mean of 0 and 1; None with fewer than two clusters, which tell nothing about the spread.

    correct: (samples,), NaN where a sample has no part in it. clusters: (samples,) int."""
    part = ~np.isnan(correct)
    count = int(clusters.max()) + 1
    asked = np.bincount(clusters[part], minlength=count)
    return Estimate.of([np.bincount(clusters[part], correct[part], count)[None]], asked).wilson(level)


def influence_interval(share: float, influences: np.ndarray, samples: int, level: float = LEVEL) -> list[float] | None:
    """The interval of a share that is no plain mean. influences: (clusters,), by how much each cluster moves it."""
    count = len(influences)
    if count < 2:
        return None
    variance = _image_variance(influences)
    return wilson(share, variance + _unseen_share(count) * (variance > 0), count - 1, samples, level)


def _image_variance(influences: np.ndarray) -> float:
    return float(len(influences) / (len(influences) - 1) * (influences**2).sum())


def _unseen_share(clusters: int) -> float:
    """The variance of one more image, a third of whose questions go another way: a rare bad image is seldom in a small
    test set, and without it 95 % intervals of an accuracy of 0.99 cover 88 % (bench/simulations.py)."""
    return 1 / (3 * clusters) ** 2


@dataclass(frozen=True)
class Estimate:
    """The share right of one experiment, or the difference first − second of two, and how far it may be off."""

    value: float
    samples: int
    clusters: int
    image: float  # variance from the choice of images; the interaction of seeds and images is in it
    seed: float | None  # from the choice of training seeds, with the interaction too; None: a single run tells nothing
    interaction: float  # of seeds and images, which the two others both hold
    variance: float  # image + seed − interaction
    degrees: float  # of freedom of the variance, by Satterthwaite

    @staticmethod
    def of(experiments: Sequence[np.ndarray], asked: np.ndarray) -> "Estimate":
        """experiments: one or two arrays (runs, clusters), how many questions of an image each run answered right.
        asked: (clusters,), how many there are; images without any are left out.

        Two-way variance: an image is hard or easy for all runs of an experiment, a seed good or bad on all images.
        variance = image + seed − interaction, from the mean squares of a two-way layout, images weighted by their
        questions. Where an experiment has one run, seed is unknown, and the variance speaks of the trained models.
        """
        present = asked > 0
        asked, experiments = asked[present], [hits[:, present] for hits in experiments]
        clusters, total = len(asked), int(asked.sum())
        shares = [hits.sum(axis=1) / total if total else np.full(len(hits), np.nan) for hits in experiments]
        signs = (1, -1)[: len(experiments)]
        value = float(sum(sign * share.mean() for sign, share in zip(signs, shares, strict=True)))
        if clusters < 2:
            return Estimate(value, total, clusters, np.nan, None, 0.0, np.nan, 0)
        combined = sum(sign * hits.mean(axis=0) for sign, hits in zip(signs, experiments, strict=True))
        image = _image_variance((combined - value * asked) / total)
        if len(experiments) == 2:  # one more image that differs, as those do
            differing = combined[np.abs(combined) > ROUNDING]
            image += float((differing**2).mean() if len(differing) else (asked**2).mean()) / total**2
        elif image > 0:
            image += _unseen_share(clusters)
        if any(len(hits) < 2 for hits in experiments):
            return Estimate(value, total, clusters, image, None, 0.0, image, clusters - 1)
        seed = interaction = 0.0
        for hits, share in zip(experiments, shares, strict=True):
            runs = len(hits)
            seed += float(share.var(ddof=1)) / runs
            residuals = (hits - share[:, None] * asked) / total
            residuals -= residuals.mean(axis=0)
            interaction += clusters / (clusters - 1) * float((residuals**2).sum()) / (runs * (runs - 1))
        seeds = sum(len(hits) - 1 for hits in experiments)  # degrees of freedom; all spread alike, as in a mixed model
        variance = max(image + seed - interaction, seed)
        if variance <= image / 4:  # seeds that happen to agree, which a few may; or nothing varies at all
            return Estimate(value, total, clusters, image, seed, interaction, image, clusters - 1)
        squares = image**2 / (clusters - 1) + seed**2 / seeds + interaction**2 / (seeds * (clusters - 1))
        degrees = variance**2 / squares
        return Estimate(value, total, clusters, image, seed, interaction, variance, degrees)

    @property
    def error(self) -> float:
        """The standard error."""
        return float(np.sqrt(self.variance))

    def wilson(self, level: float = LEVEL) -> list[float] | None:
        """The interval of a share; None with fewer than two images."""
        if self.clusters < 2:
            return None
        return wilson(self.value, self.variance, min(self.degrees, self.clusters - 1), self.samples, level)

    def interval(self, level: float = LEVEL) -> list[float] | None:
        """The t interval of a difference; None with fewer than two images."""
        if self.clusters < 2:
            return None
        half = t_quantile((1 + level) / 2, self.degrees) * self.error
        return [self.value - half, self.value + half]

    def detectable(self, alpha: float) -> float | None:
        """The smallest true difference that a two-sided test at `alpha` finds in 80 % of cases."""
        return None if self.clusters < 2 else _detectable(self.variance, self.degrees, alpha)

    def seed_spread(self, runs: int) -> float | None:
        """Of one experiment: the standard deviation of its accuracy from seed to seed, were there endlessly many
        images. None where a single run tells nothing."""
        return None if self.seed is None else float(np.sqrt(max(0.0, (self.seed - self.interaction) * runs)))

    def p_value(self) -> float:
        """Two-sided, of the t test that the difference is 0."""
        if self.clusters < 2:
            return 1.0
        return float(2 * special.stdtr(self.degrees, -abs(self.value) / self.error))


def _detectable(variance: float, degrees: float, alpha: float) -> float:
    return (t_quantile(1 - alpha / 2, degrees) + t_quantile(POWER, degrees)) * float(np.sqrt(variance))


@dataclass(frozen=True)
class Plan:
    """The variances of a difference of two experiments, from which other numbers of images and seeds are foretold."""

    image: float  # of one image
    both: float  # of one image in one run of each: the interaction
    seeds: float  # of one seed of each
    alpha: float = 1 - LEVEL

    @staticmethod
    def of(estimate: Estimate, runs: int, spread: float | None = None, alpha: float = 1 - LEVEL) -> "Plan":
        """estimate: a difference. runs: of each experiment. spread: of the accuracy from seed to seed, where it is
        assumed; None: as it was measured."""
        both = estimate.interaction * estimate.clusters * runs
        image = max(0.0, estimate.image * estimate.clusters - both / runs)
        measured = max(0.0, ((estimate.seed or 0.0) - estimate.interaction) * runs)
        return Plan(image, both, measured if spread is None else 2 * spread**2, alpha)

    def detectable(self, images: int, runs: int) -> float:
        """The smallest true difference found in 80 % of cases. With one run each, of the trained models alone."""
        from_images = (self.image + self.both / runs) / images
        if runs == 1:
            return _detectable(from_images, images - 1, self.alpha)
        variance = from_images + self.seeds / runs
        of_seeds = self.seeds / runs + self.both / (runs * images)  # as it is measured, with the interaction
        squares = from_images**2 / (images - 1) + of_seeds**2 / (2 * (runs - 1))
        return _detectable(variance, variance**2 / squares, self.alpha)

    def images(self, difference: float, runs: int, most: int = 10_000_000) -> int | None:
        """The fewest images with which a difference is found; None where no number of images is enough."""
        if self.detectable(most, runs) > difference:
            return None
        low, high = 1, most  # not enough (or too few for any test), enough
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.detectable(middle, runs) <= difference else (middle, high)
        return high
