"""python bench/simulations.py [--comparisons 1000] [--seed 0]

What compare.py's intervals and tests do on simulated answers whose truth is known: false positives under one recipe,
coverage of the interval of an accuracy, power against the closed form, and the size of the test of equivalence.

Answers: a question has an ease (the sum of its image's and its own), a run has luck on each image and a seed that moves
all its answers; which are right is drawn from a logistic model. 975 images × 9 questions, two runs of one recipe
disagree on about 10 % of the questions.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from report.resampling import sign_flip_p_value
from report.variance import Estimate, Plan
from report.words import ALPHA

IMAGES, QUESTIONS = 975, 9
IMAGE_EASE, QUESTION_EASE, LUCK, MEAN_EASE = 2.5, 7.0, 0.6, 2.0  # on the logit scale
SPREADS = (0.0, 0.005, 0.01)  # of the accuracy, from seed to seed


def logistic(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


class Answers:
    """Draws how many questions of each image each run answers right."""

    def __init__(self, generator: np.random.Generator, images: int = IMAGES):
        self.generator, self.images = generator, images
        many = self._ease(100_000) + generator.normal(0, LUCK, (100_000, 1))
        self._many = many
        self._slope = float((logistic(many) * (1 - logistic(many))).mean())  # of the accuracy, by a shift of all eases

    def _ease(self, images: int) -> np.ndarray:
        of_image = self.generator.normal(MEAN_EASE, IMAGE_EASE, (images, 1))
        return of_image + self.generator.normal(0, QUESTION_EASE, (images, QUESTIONS))

    def shift(self, difference: float) -> float:
        """The shift of all eases that raises the accuracy by `difference`."""
        low, high, now = 0.0, 2.0, logistic(self._many).mean()
        for _ in range(30):
            middle = (low + high) / 2
            too_much = logistic(self._many + middle).mean() - now > difference
            low, high = (low, middle) if too_much else (middle, high)
        return high

    def pair(self, runs: int, spread: float, shift: float = 0.0) -> list[np.ndarray]:
        """Two experiments, (runs, images) each; the second is better by `shift`."""
        ease = self._ease(self.images)
        experiments = []
        for by in (0.0, shift):
            hits = np.empty((runs, self.images), dtype=np.int64)
            for run in range(runs):
                moved = by + self.generator.normal(0, spread) / self._slope
                luck = self.generator.normal(0, LUCK, (self.images, 1))
                hits[run] = (self.generator.random(ease.shape) < logistic(ease + luck + moved)).sum(axis=1)
            experiments.append(hits)
        return experiments


def p_value(first: np.ndarray, second: np.ndarray, asked: np.ndarray) -> float:
    """As comparison.py: single runs by sign flip, several by the two-way t."""
    if len(first) == 1:
        return sign_flip_p_value(first[0] - second[0])
    return Estimate.of([first, second], asked).p_value()


def table(header: list[str], rows: list[list]) -> None:
    for row in [header, ["---"] * len(header), *rows]:
        print("| " + " | ".join(map(str, row)) + " |")
    print(flush=True)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def false_positives(generator, comparisons: int) -> None:
    print("Two experiments of the same recipe: how often a difference is found (p < 0.05)\n")
    answers, asked = Answers(generator), np.full(IMAGES, QUESTIONS)
    rows = []
    for spread in SPREADS:
        row = [f"{100 * spread:g} points"]
        for runs in (1, 3, 5):
            found = [p_value(*answers.pair(runs, spread), asked) < ALPHA for _ in range(comparisons)]
            row.append(percent(np.mean(found)))
        rows.append(row)
    table(["spread from seed to seed", "1 run each (of the trained models)", "3 seeds each", "5 seeds each"], rows)


def coverage(generator, tests: int) -> None:
    print("Coverage of the 95 % interval of an accuracy, 6 to 12 questions an image\n")
    rows = []
    for images in (10, 30, 100):
        for correlation in (0.3, 0.8):
            row = [images, correlation]
            for accuracy in (0.5, 0.9, 0.99):
                inside = 0
                for _ in range(tests):
                    asked = generator.integers(6, 13, images)
                    scale = (1 - correlation) / correlation
                    of_image = generator.beta(accuracy * scale, (1 - accuracy) * scale, images)
                    low, high = Estimate.of([generator.binomial(asked, of_image)[None]], asked).wilson()
                    inside += low <= accuracy <= high
                row.append(percent(inside / tests))
            rows.append(row)
    table(["images", "correlation within an image", "accuracy 0.5", "0.9", "0.99"], rows)


def power(generator, comparisons: int) -> None:
    print("Power: how often a true difference is found that the closed form says is found in 80 %\n")
    answers, asked = Answers(generator), np.full(IMAGES, QUESTIONS)
    rows = []
    for runs, spread in ((1, 0.0), (3, 0.005), (5, 0.005), (5, 0.01), (10, 0.005)):
        estimates = [Estimate.of(answers.pair(runs, spread), asked) for _ in range(200)]
        plans = [Plan.of(estimate, runs) for estimate in estimates]
        plan = Plan(*(float(np.mean([getattr(one, name) for one in plans])) for name in ("image", "both", "seeds")))
        detectable = plan.detectable(IMAGES, runs)
        shift = answers.shift(detectable)
        found = [p_value(*answers.pair(runs, spread, shift), asked) < ALPHA for _ in range(comparisons)]
        rows.append(
            [runs, f"{100 * spread:g} points", f"{100 * detectable:.2f} points", "80 %", percent(np.mean(found))]
        )
    table(["runs each", "spread", "detectable difference", "closed form", "found"], rows)


def equivalence(generator, comparisons: int) -> None:
    print("--margin: how often two experiments are shown equal\n")
    answers, asked = Answers(generator), np.full(IMAGES, QUESTIONS)
    rows = []
    for runs, spread, margin in ((1, 0.0, 0.01), (3, 0.005, 0.02), (5, 0.005, 0.02)):
        row = [runs, f"{100 * spread:g} points", f"{100 * margin:g} points"]
        for difference in (margin, 0.0):
            shift = answers.shift(difference) if difference else 0.0
            shown = 0
            for _ in range(comparisons):
                ends = Estimate.of(answers.pair(runs, spread, shift), asked).interval(1 - 2 * ALPHA)
                shown += all(abs(end) < margin for end in ends)
            row.append(percent(shown / comparisons))
        rows.append(row)
    table(["runs each", "spread", "margin", "true difference = margin (should be 5 %)", "no difference"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator = np.random.default_rng(arguments.seed)
    pairs = [Answers(generator).pair(1, 0.0) for _ in range(3)]
    print(f"{arguments.comparisons} comparisons a cell, seed {arguments.seed}; accuracy of a run about "
          f"{np.mean(pairs) / QUESTIONS:.1%}\n")  # fmt: skip
    coverage(generator, 2 * arguments.comparisons)
    false_positives(generator, arguments.comparisons)
    power(generator, arguments.comparisons)
    equivalence(generator, arguments.comparisons)


if __name__ == "__main__":
    main()
