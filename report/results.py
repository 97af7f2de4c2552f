"""The results folders of experiments, read and checked: whatever cannot be compared is refused in one line."""

import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import FREE_ON_RESUME, Config, flatten
from errors import UserError
from files import complete_json_lines, read_json, read_json_lines
from tasks import TASKS
from templates import image_paths

PREDICTIONS, SCORES = "generated_predictions.jsonl", "predict_results.json"
FACTS = "answered_with.json"  # in a results folder until its answers are scored
AGAIN = "run evaluate.py again"
LARGEST_FACTOR = 32  # pixels: patch × merge of Qwen3-VL; 28 of the others


@dataclass
class Results:
    """One run's answers to the whole test set."""

    name: str
    folder: str  # as given on the command line
    task: str
    rows: dict[str, dict]  # by sample id, in the order of the file
    stated_accuracy: float | None  # what the score file says, to be checked against the rows
    majority_accuracy: float | None
    majority_accuracy_ci: list[float] | None
    majority_unseen: int  # samples whose question training never asks
    without_images: bool  # evaluate.py image=none: what the questions alone give away
    image_root: str | None
    recipe: dict | None  # what decides the result, see `_recipe`; None: an older evaluate.py did not record it
    seed: object  # of the training; None: not known
    weights: str | None  # SHA-256
    output_dir: str | None
    predictions: str | None = None  # the file of answers that another program gave (evaluate.py --predictions)


@dataclass
class Experiment:
    """One recipe, trained once or with several seeds."""

    name: str
    runs: list[Results]

    @property
    def without_images(self) -> bool:
        return all(run.without_images for run in self.runs)

    @property
    def made_elsewhere(self) -> bool:
        """Whether another program gave the answers, so that no config tells what made them."""
        return any(run.predictions for run in self.runs)


def read_experiment(argument: str) -> Experiment:
    """One command line argument, [NAME=]RUN[,RUN ...] with RUN = FOLDER[+FOLDER ...], -> Experiment.

    Raises: `UserError` on anything incomplete, and on runs that are no seeds of one recipe."""
    name, separator, rest = argument.partition("=")
    folders, name = (argument, None) if Path(argument).exists() or not separator else (rest, name)
    runs = [read_run(folder) for folder in ([folders] if Path(folders).exists() else folders.split(","))]
    if name is None:
        names = {re.sub(r"_seed\d+$", "", run.name) for run in runs}
        if len(names) > 1:
            raise UserError(f"{folders}: several runs of one experiment need a name: NAME={folders}")
        name = names.pop() if len(runs) > 1 else runs[0].name
    for number, run in enumerate(runs):
        for other in runs[:number]:
            if run.folder == other.folder or (run.weights and run.weights == other.weights):
                raise UserError(f"{name}: {other.folder} and {run.folder} are the same run; give each once")
            keys = [entry["key"] for entry in differing_keys(other, run) or [] if entry["matters"]]
            if keys := [key for key in keys if key != "init_adapter"]:
                raise UserError(
                    f"{name}: {other.folder} and {run.folder} differ in {', '.join(keys)}, so they are no seeds of one "
                    "experiment; compare them as two"
                )
    for run in runs:
        run.name = name if len(runs) == 1 else f"{name} seed {run.seed}" if run.seed is not None else run.name
    return Experiment(name, runs)


def read_run(folders: str) -> Results:
    """FOLDER[+FOLDER ...], the parts of one test set -> Results. Raises: `UserError` on anything incomplete."""
    parts = [folders] if Path(folders).exists() else folders.split("+")
    rows, scores = {}, []
    for folder in parts:
        part, score = _read_folder(Path(folder))
        if twice := [sample_id for sample_id in part if sample_id in rows]:
            raise UserError(f"{folders}: {_some(twice)} in more than one of the joined folders; join disjoint parts")
        rows.update(part)
        scores.append(score)
    tasks = {task_named_by(row, folders) for row in rows.values()}
    if len(tasks) > 1:
        raise UserError(f"{folders}: rows of several tasks in one test set ({', '.join(sorted(tasks))})")
    only = scores[0] if len(scores) == 1 else {}
    recipes = [_recipe(score) for score in scores]
    return Results(
        name="+".join(Path(os.path.abspath(folder)).name for folder in parts),
        folder=folders,
        task=tasks.pop(),
        rows=rows,
        stated_accuracy=_joined_mean(scores, "predict_accuracy"),
        majority_accuracy=_joined_mean(scores, "majority_accuracy"),
        majority_accuracy_ci=only.get("majority_accuracy_ci"),
        majority_unseen=sum(score.get("majority_unseen") or 0 for score in scores),
        without_images=all(score.get("image") == "none" for score in scores),
        image_root=next((score["image_root"] for score in scores if score.get("image_root")), None),
        recipe=None if None in recipes else {key: _joined([r.get(key) for r in recipes]) for key in recipes[0]},
        seed=_joined([score.get("seed") for score in scores]),
        weights=_joined([score.get("adapter_sha256") for score in scores]),
        output_dir=(only.get("config") or {}).get("output_dir"),
        predictions=next((score["predictions"] for score in scores if score.get("predictions")), None),
    )


def _joined(values: list):
    """The value of all parts of a test set, or the values one after the other."""
    return values[0] if all(value == values[0] for value in values) else tuple(values)


# The keys with which a result is made, beside those of the training.
EVALUATION_KEYS = ("image", "template", "image_size", "resize", "max_pixels", "quantization")


def _recipe(scores: dict) -> dict | None:
    """What decides a result: the keys of the config it was trained with, the data, and how it was evaluated."""
    asked, hashes = scores.get("config"), scores.get("data_sha256")
    if not isinstance(asked, dict) or not isinstance(hashes, dict):
        return None
    config = scores.get("trained_config") or asked
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    recipe = {"training data": hashes.get("train"), "questions of a step": scores.get("questions_per_step")}
    recipe["trained"] = scores.get("checkpoint") != "base"
    for key, value in flatten({key: defaults[key] for key in defaults.keys() - config.keys()} | config).items():
        if key.split(".")[0] not in FREE_ON_RESUME and value is not dataclasses.MISSING:
            recipe[key] = value
    evaluated = {f"{key} at evaluation": asked.get(key) for key in EVALUATION_KEYS if asked.get(key) != config.get(key)}
    return recipe | evaluated


def differing_keys(first: Results, second: Results) -> list[dict] | None:
    """[{key, first, second, matters}, ...] of two runs' recipes; None where they are not recorded.

    Another seed is another draw of the same recipe, and an image size that is the nearest to fit another model comes
    with that model: they are listed, and do not matter. Training data that one of two trained runs did not record may
    be the same or not: it is listed with recorded False."""
    one, two = first.recipe, second.recipe
    if one is None or two is None:
        return None
    keys = [key for key in one | two if one.get(key) != two.get(key)]
    if None in (one["questions of a step"], two["questions of a step"]):  # no checkpoint tells
        keys = [key for key in keys if key != "questions of a step"]
    if one["trained"] != two["trained"]:  # an untrained model has no settings of a training
        of_answers = ("trained", "model_name", *EVALUATION_KEYS)
        keys = [key for key in keys if key.removesuffix(" at evaluation") in of_answers]
    found = []
    if one["trained"] and two["trained"] and any(_unknown(recipe["training data"]) for recipe in (one, two)):
        keys = [key for key in keys if key != "training data"]
        values = {"first": one["training data"], "second": two["training data"]}
        found = [{"key": "training data", **values, "matters": False, "follows_model": False, "recorded": False}]
    for key in keys:
        values = [recipe.get(key) for recipe in (one, two)]
        sizes = key == "image_size" and "model_name" in keys and all(isinstance(value, int) for value in values)
        follows = sizes and abs(values[0] - values[1]) < LARGEST_FACTOR
        entry = {"key": key, "first": values[0], "second": values[1]}
        matters = key != "seed" and not follows
        found.append(entry | {"matters": matters, "follows_model": follows, "recorded": True})
    return found


def _unknown(value) -> bool:
    """Whether a value, or that of one of the joined parts of a test set, is not recorded."""
    return value is None or (isinstance(value, tuple) and None in value)


def _read_folder(folder: Path) -> tuple[dict[str, dict], dict]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such results folder")
    for name in (PREDICTIONS, SCORES):
        if not (folder / name).is_file():
            again = " with --score-again" * (folder / FACTS).is_file()
            raise UserError(f"{folder / name}: missing; run evaluate.py{again} for this experiment first")
    scores = read_json(folder / SCORES, AGAIN)
    if not isinstance(scores, dict):
        raise UserError(f"{folder / SCORES}: holds no table of scores; {AGAIN}")
    rows = read_rows(folder / PREDICTIONS)
    if scores.get("predict_samples", len(rows)) != len(rows):
        raise UserError(
            f"{folder}: {PREDICTIONS} holds {len(rows)} samples, {SCORES} speaks of {scores['predict_samples']}; "
            f"they are of different runs, or one was cut off: {AGAIN}"
        )
    return rows, scores


def read_rows(path: Path, cure: str = AGAIN) -> dict[str, dict]:
    """The rows of predictions, by id. Raises: `UserError` where one has no id, or that of another, and without any."""
    rows: dict[str, dict] = {}
    for number, row in read_json_lines(path, cure):
        where = f"{path} line {number}"
        if not isinstance(row, dict) or "id" not in row:
            raise UserError(f"{where}: not a sample with an id; {cure}")
        if str(row["id"]) in rows:
            raise UserError(f"{where}: id {row['id']!r} is there twice; ids must tell samples apart")
        try:
            image_paths(row)
        except UserError as error:
            raise UserError(f"{where}: {error}; {cure}") from None
        rows[str(row["id"])] = row
    if not rows:
        raise UserError(f"{path}: empty; {cure}")
    return rows


def task_named_by(row: dict, folder: str | Path, cure: str = AGAIN) -> str:
    """The task whose keys the row has most of; a click has those of an answer in words as well."""
    lacking = {name: [key for key in task.ROW_KEYS if key not in row] for name, task in TASKS.items()}
    name = min(reversed(lacking), key=lambda name: len(lacking[name]) / len(TASKS[name].ROW_KEYS))
    if lacking[name]:
        raise UserError(f"{folder}: sample {row['id']!r} lacks {', '.join(lacking[name])}; {cure}")
    return name


def _joined_mean(scores: list[dict], key: str) -> float | None:
    if any(not isinstance(score.get(key), int | float) or not score.get("predict_samples") for score in scores):
        return None
    return float(np.average([s[key] for s in scores], weights=[s["predict_samples"] for s in scores]))


def _some(ids: list[str]) -> str:
    shown = ", ".join(ids[:5])
    return f"{len(ids)} id{'s' * (len(ids) > 1)} ({shown}{', ...' * (len(ids) > 5)})"


def check_same_test(experiments: list[Experiment]) -> None:
    """Raise UserError unless all runs answer the same samples with the same gold answers."""
    names = [experiment.name for experiment in experiments]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{', '.join(twice)}: two results of one name; name them apart with NAME=FOLDER")
    first, *others = [run for experiment in experiments for run in experiment.runs]
    for other in others:
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
    return list(complete_json_lines(Path(output_dir) / "log.jsonl"))


def run_history(output_dir) -> list[dict]:
    """Every evaluation line of the run's log.jsonl."""
    return [row for row in read_log(output_dir) if any(key.startswith("eval_") for key in row)]
