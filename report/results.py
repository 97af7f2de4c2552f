"""The results folders of experiments, read and checked: whatever cannot be compared is refused in one line."""

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from errors import UserError
from files import read_json, read_json_lines
from tasks import TASKS
from templates import image_paths

PREDICTIONS, SCORES = "generated_predictions.jsonl", "predict_results.json"
AGAIN = "run evaluate.py again"


@dataclass
class Results:
    """One experiment's answers to the whole test set."""

    name: str
    folder: str  # as given on the command line
    task: str
    rows: dict[str, dict]  # by sample id, in the order of the file
    stated_accuracy: float | None  # what the score file says, to be checked against the rows
    majority_accuracy: float | None
    majority_accuracy_ci: list[float] | None
    without_images: bool  # evaluate.py image=none: what the questions alone give away
    image_root: str | None


def read_results(argument: str) -> Results:
    """One command line argument, [NAME=]FOLDER[+FOLDER ...], -> Results.

    Raises: `UserError` on anything incomplete.
    """
    name, separator, rest = argument.partition("=")
    folders, name = (argument, None) if Path(argument).exists() or not separator else (rest, name)
    parts = [folders] if Path(folders).exists() else folders.split("+")
    rows, scores = {}, []
    for folder in parts:
        part, score = _read_folder(Path(folder))
        if twice := [sample_id for sample_id in part if sample_id in rows]:
            raise UserError(f"{folders}: {_some(twice)} in more than one of the joined folders; join disjoint parts")
        rows.update(part)
        scores.append(score)
    tasks = {_task_of(row, folders) for row in rows.values()}
    if len(tasks) > 1:
        raise UserError(f"{folders}: rows of several tasks in one test set ({', '.join(sorted(tasks))})")
    only = scores[0] if len(scores) == 1 else {}
    return Results(
        name=name or "+".join(Path(os.path.abspath(folder)).name for folder in parts),
        folder=folders,
        task=tasks.pop(),
        rows=rows,
        stated_accuracy=_joined_mean(scores, "predict_accuracy"),
        majority_accuracy=_joined_mean(scores, "majority_accuracy"),
        majority_accuracy_ci=only.get("majority_accuracy_ci"),
        without_images=all(score.get("image") == "none" for score in scores),
        image_root=next((score["image_root"] for score in scores if score.get("image_root")), None),
    )


def _read_folder(folder: Path) -> tuple[dict[str, dict], dict]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such results folder")
    for name in (PREDICTIONS, SCORES):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing; run evaluate.py for this experiment first")
    scores = read_json(folder / SCORES, AGAIN)
    if not isinstance(scores, dict):
        raise UserError(f"{folder / SCORES}: holds no table of scores; {AGAIN}")
    rows: dict[str, dict] = {}
    for number, row in read_json_lines(folder / PREDICTIONS, AGAIN):
        where = f"{folder / PREDICTIONS} line {number}"
        if not isinstance(row, dict) or "id" not in row:
            raise UserError(f"{where}: not a sample with an id; {AGAIN}")
        if str(row["id"]) in rows:
            raise UserError(f"{where}: id {row['id']!r} is there twice; ids must tell samples apart")
        try:
            image_paths(row)
        except UserError as error:
            raise UserError(f"{where}: {error}; {AGAIN}") from None
        rows[str(row["id"])] = row
    if not rows:
        raise UserError(f"{folder / PREDICTIONS}: empty; {AGAIN}")
    if scores.get("predict_samples", len(rows)) != len(rows):
        raise UserError(
            f"{folder}: {PREDICTIONS} holds {len(rows)} samples, {SCORES} speaks of {scores['predict_samples']}; "
            f"they are of different runs, or one was cut off: {AGAIN}"
        )
    return rows, scores


def _task_of(row: dict, folder: str) -> str:
    """The task whose keys the row has most of."""
    lacking = {name: [key for key in task.ROW_KEYS if key not in row] for name, task in TASKS.items()}
    name = min(lacking, key=lambda name: len(lacking[name]) / len(TASKS[name].ROW_KEYS))
    if lacking[name]:
        raise UserError(f"{folder}: sample {row['id']!r} lacks {', '.join(lacking[name])}; {AGAIN}")
    return name


def _joined_mean(scores: list[dict], key: str) -> float | None:
    if any(not isinstance(score.get(key), int | float) or not score.get("predict_samples") for score in scores):
        return None
    return float(np.average([s[key] for s in scores], weights=[s["predict_samples"] for s in scores]))


def _some(ids: list[str]) -> str:
    shown = ", ".join(ids[:5])
    return f"{len(ids)} id{'s' * (len(ids) > 1)} ({shown}{', ...' * (len(ids) > 5)})"


def check_same_test(results: list[Results]) -> None:
    """Raise UserError unless all results answer the same samples with the same gold answers."""
    first = results[0]
    names = [result.name for result in results]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{', '.join(twice)}: two results of one name; name them apart with NAME=FOLDER")
    for other in results[1:]:
        if other.task != first.task:
            raise UserError(
                f"{first.name} holds {first.task} results, {other.name} {other.task} results: no comparison"
            )
        only_first = [sample_id for sample_id in first.rows if sample_id not in other.rows]
        only_other = [sample_id for sample_id in other.rows if sample_id not in first.rows]
        if only_first or only_other:
            sides = ((only_first, first.name), (only_other, other.name))
            found = ", ".join(f"{_some(ids)} only in {name}" for ids, name in sides if ids)
            raise UserError(f"{first.name} and {other.name} answer different test sets: {found}; evaluate on one split")
        for key in TASKS[first.task].TEST_KEYS:
            differing = [i for i, row in first.rows.items() if row.get(key) != other.rows[i].get(key)]
            if differing:
                raise UserError(
                    f"{first.name} and {other.name} disagree on the {key} of {_some(differing)}: "
                    "their test files differ; evaluate both on the same file"
                )


def read_log(output_dir) -> list[dict]:
    """The lines of the run's log.jsonl."""
    path = Path(output_dir) / "log.jsonl"
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        with contextlib.suppress(ValueError):  # the last line of a killed run may be cut
            rows.append(json.loads(line))
    return rows


def run_history(output_dir) -> list[dict]:
    """Every evaluation line of the run's log.jsonl."""
    return [row for row in read_log(output_dir) if any(key.startswith("eval_") for key in row)]
