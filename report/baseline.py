"""The majority baseline: what a model is trained on tells, without looking at any image."""

import re
from collections.abc import Iterable
from pathlib import Path

from config import Config
from report.metrics import majority_answers
from samples import read_samples


def majority_answers_for(questions: Iterable[str], config: Config) -> dict[str, str]:
    """Question -> its most frequent answer in the run's training file.

    A run on one stage may be asked about all of them, as in a curriculum. Where its file train_stageN.json lacks a
    question, the files of all stages in the same folder are counted together. Without a training file: nothing.
    """
    if config.data.train is None:
        return {}
    own = Path(config.data.train)
    found = majority_answers(read_samples(own, config.max_samples))
    files = stage_files(own)
    if len(files) == 1 or found.keys() >= set(questions):
        return found
    return majority_answers(sample for file in files for sample in read_samples(file, config.max_samples))


def stage_files(path: Path) -> list[Path]:
    """The files of all stages beside train_stageN.json, in the order of the stages; any other file is alone."""
    named = re.fullmatch(r"(.*_stage)\d+(\.jsonl?)", path.name)
    if not named:
        return [path]
    pattern = re.compile(re.escape(named[1]) + r"(\d+)" + re.escape(named[2]))
    found = {int(match[1]): file for file in path.parent.iterdir() if (match := pattern.fullmatch(file.name))}
    return [found[stage] for stage in sorted(found)]
