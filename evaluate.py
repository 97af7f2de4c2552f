"""python evaluate.py --config configs/exp2.yaml [--checkpoint DIR | --predictions FILE] [--split test] [key=value ...]

Answers every question of a split and scores the answers; `torchrun --nproc_per_node=N evaluate.py ...` shares the work
out, with the same answers. Writes generated_predictions.jsonl, predict_results.json and all_results.json to results_dir
(with image=none, the question-only baseline, to results_dir + "_question_only"; another split likewise).

--predictions scores answers that another program gave, without a GPU: a .jsonl file with a line {"id", "prediction"}
for each sample. Their results, in results_dir + "_predictions_" + the file's name, are compared like any other.

--score-again scores the answers that lie in the results folder once more, without a GPU: where scoring failed, where a
library of scores was missing, or with another --answers. Where answers are sentences, METEOR matches words and stems,
and synonyms where WordNet is installed (python -m nltk.downloader wordnet, on a machine with network).
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns in every forked data worker otherwise

import torch

from checkpoint import OPTIMIZER_FILE, hash_files, load_trained, read_state
from classification import make_loss
from config import Config, check_data_files, load_config, to_dict
from distributed import all_or_raise, in_turns, run_command, start_ranks, stop_ranks
from errors import UserError, first_names
from files import (
    file_sha256,
    full_disk_is_said,
    read_json,
    read_json_lines,
    refuse_unusable_folder,
    write_json,
    write_text,
)
from inference import predict_split
from preflight import check_samples, open_encoder
from report.free_form import INSTALL, KEPT
from report.results import FACTS, PREDICTIONS, SCORES, read_log, read_rows, run_history, task_named_by
from run_folder import CONFIG_FILE, checkpoints
from samples import load_split
from tasks import task_of
from templates import CONVERSATION_TEMPLATE, image_paths

# What the scores' file holds beside scores.
KEPT_FACTS = """experiment task split split_is_training_file data_sha256 image image_root checkpoint predictions
    predictions_sha256 seed adapter_sha256 questions_per_step trained_config config load_seconds predict_seconds
    predict_samples_per_second""".split()


def results_folder(config: Config, split: str) -> Path:
    """Where the scores of a split go; the baseline and other splits never overwrite the test results."""
    suffix = "" if split == "test" else f"_{split}"
    return Path(config.results_dir + suffix + ("_question_only" if config.image == "none" else ""))


def provenance(config: Config, folder: Path | None, hashes: dict[str, str]) -> dict:
    """What compare.py needs to say in what two results differ. folder: of the weights; None: of the base alone.
    hashes: SHA-256 of the data files by split."""
    trained = questions_per_step = weights = None
    if folder:
        run, step = run_of(folder)
        with contextlib.suppress(UserError):  # weights that were copied elsewhere, or are another tool's
            trained = to_dict(load_config(run / CONFIG_FILE))
        with contextlib.suppress(UserError, IndexError, TypeError):
            newest = checkpoints(run)[-1] if step is None else folder
            questions_per_step = read_state(newest).global_batch
        files = sorted(path for path in folder.glob("*.safetensors") if path.name != OPTIMIZER_FILE)
        digests = hash_files(folder, files)
        weights = hashlib.sha256("".join(digests.values()).encode()).hexdigest() if digests else None
    return {
        "seed": trained["seed"] if trained else None,
        "adapter_sha256": weights,
        "data_sha256": {**hashes, "train": trained_on(trained)},
        "questions_per_step": questions_per_step,
        "trained_config": trained,
        "config": to_dict(config),
    }


def trained_on(config: dict | None) -> str | None:
    """SHA-256 of the file that a run of this config was trained on, whatever the config that asks it; None: unknown."""
    path = Path((config or {}).get("data", {}).get("train") or "")
    return file_sha256(path) if path.is_file() else None


def facts_file(results: Path) -> Path | None:
    """What tells whose answers the rows of a results folder are, scored or not yet."""
    return next((results / name for name in (FACTS, SCORES) if (results / name).is_file()), None)


def say_what_is_replaced(results: Path, by: str, of: str) -> None:
    """of: the key of the facts that names whose answers they are."""
    path = facts_file(results)
    before = read_json(path, "delete it").get(of) if path else by
    if before != by:
        print(f"Replacing the results of {before} in {results}; results_dir=... would keep both", flush=True)


def on_training_images(rows: list[dict], config: Config) -> dict:
    """samples_on_training_images, where a config allows some: those whose image, by its group where one is given, is
    shown in training too."""
    if config.data.shared_images != "allowed" or not config.data.train:
        return {}
    train = load_split(config, "train")
    shown = {sample.get("group") for sample in train} | {path for sample in train for path in image_paths(sample)}
    return {"samples_on_training_images": sum(not shown.isdisjoint([row.get("group"), *row["images"]]) for row in rows
                                              if row.get("group") or row["images"])}  # fmt: skip


def draw_curves(config: Config, task, folder: Path | None, results: Path) -> None:
    """The run's loss and accuracy where its log is at hand, with the step whose weights are scored."""
    from report import plots

    if folder is None:
        return
    run, step = run_of(folder)
    log = read_log(run)
    evaluated = [row for row in log if "step" in row and "eval_loss" in row]
    if step is None and task.BEST_IS_RESULT and evaluated:
        step = max(evaluated, key=task.selection_score)["step"]
    elif step is None:
        step = log[-1].get("step") if log else None
    if plots.loss_curves(log, results / "loss_curves.png", config.experiment, step):
        print(f"Drawn: {results / 'loss_curves.png'}")


def run_of(folder: Path) -> tuple[Path, int | None]:
    """The run's folder, and the step where `folder` is one of its checkpoints."""
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return (folder.absolute().parent, int(match[1])) if match else (folder, None)


def table(scores: dict) -> list[str]:
    """The score table on the console: shares in percent, with 95 % intervals where there are several images."""
    lines = []
    for name, value in scores.items():
        if f"{name}_ci" not in scores or value is None:
            continue
        unit, factor, digits = ("pixels", 1, 1) if name.endswith("_pixels") else ("%", 100, 1)
        if name in ("predict_auroc", "predict_brier", "predict_ece"):
            unit, factor, digits = " ", 1, 3
        numbers = (value, *(scores[f"{name}_ci"] or []))
        shown = ["  open" if number is None else f"{factor * number:6.{digits}f}" for number in numbers]
        spread = f"   95 % interval {shown[1]} to {shown[2]}" if shown[1:] else ""
        lines.append(f"  {name:<28}{shown[0]} {unit}{spread}")
    if scores.get("outside_candidates") is not None:
        lines.append(
            f"  {'outside_candidates':<28}{scores['outside_candidates']:6d} of {scores['predict_samples']} answers"
        )
    if scores.get("majority_unseen"):
        lines.append(
            f"  {'majority_unseen':<28}{scores['majority_unseen']:6d} questions that training never asks; the majority "
            "answer counts as wrong there"
        )
    if scores.get("last_turns"):
        lines.append(
            f"  {'last_turns':<28}{scores['last_turns']:6d} conversations, scored on their last answer alone, with the "
            "gold earlier ones in view"
        )
    if scores.get("free_form_missing"):
        lines.append(
            f"  not scored: {', '.join(scores['free_form_missing'])} missing; {INSTALL}, "
            "and evaluate.py with --score-again"
        )
    if scores.get("meteor_matches"):
        lines.append(f"  METEOR matched {scores['meteor_matches']}; BLEU is sacrebleu's, of all answers together")
    if "samples_on_training_images" in scores:
        lines.append(
            f"  {'samples_on_training_images':<28}{scores['samples_on_training_images']:6d} samples whose images "
            "training shows too (data.shared_images: allowed): memory as well as skill"
        )
    if scores.get("unparsable"):
        lines.append(f"  {'unparsable':<28}{scores['unparsable']:6d} answers without a point, counted as wrong")
    if scores.get("cut_texts"):
        lines.append(f"  {'cut_texts':<28}{scores['cut_texts']:6d} texts lost their end to max_tokens")
    if scores.get("cut_off"):
        lines.append(f"  {'cut_off':<28}{scores['cut_off']:6d} answers without an end; is the model trained?")
    return lines


def write_predictions(results: Path, rows: list[dict], then: str) -> None:
    """Before they are scored: whatever goes wrong then, hours of answers are kept. Scores of earlier answers go.
    then: what to do where the disk is full."""
    with full_disk_is_said(results, then):
        for name in ("all_results.json", SCORES):
            (results / name).unlink(missing_ok=True)
        write_text(results / PREDICTIONS, json_lines(rows))


def json_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def answers_sha256(rows: list[dict]) -> str:
    """Of the rows as they are before they are scored."""
    unscored = [{key: value for key, value in row.items() if key != KEPT} for row in rows]
    return hashlib.sha256(json_lines(unscored).encode()).hexdigest()


def data_hashes(config: Config, split: str) -> dict[str, str]:
    """SHA-256 of the file of the split, and of training where the config names one. Raises: `UserError`."""
    splits = dict.fromkeys([split, *(["train"] if config.data.train else [])])
    check_data_files(config, splits)
    return {name: file_sha256(getattr(config.data, name)) for name in splits}


def what_is_asked(config: Config, split: str, hashes: dict[str, str]) -> dict:
    """What every results folder records, whoever answers."""
    return {
        "experiment": config.experiment,
        "task": config.task,
        "split": split,
        "checkpoint": None,
        "predictions": None,
        "split_is_training_file": "train" in hashes and len(set(hashes.values())) == 1,
        "data_sha256": hashes,
        "image": config.image,
        "image_root": config.data.image_root,
    }


def score_and_write(config: Config, results: Path, rows: list[dict], facts: dict, answers: str, title: str) -> dict:
    """The scores of rows, written to the results folder with the rows, and printed below a title.

    facts: what is recorded beside the scores. It is kept until they are there, so that hours of answers can be scored
    again, whatever goes wrong here, and names their hash: a full disk may leave it beside earlier answers. answers: as
    of `evaluate`."""
    if answers != "auto":
        rows = [{**row, "free_form": answers == "sentences"} for row in rows]
    with full_disk_is_said(results, "evaluate again"):
        results.mkdir(parents=True, exist_ok=True)
        write_json(results / FACTS, facts | {"answers_sha256": answers_sha256(rows)})
    write_predictions(results, rows, "evaluate again")
    again = "evaluate.py again with --score-again" if facts["predictions"] is None else "evaluate.py again"
    try:
        scores = task_of(config).score(rows, config) | {"cut_off": sum(row.get("cut_off", False) for row in rows)}
        scores |= facts | on_training_images(rows, config)
        if any(KEPT in row for row in rows):
            write_predictions(results, rows, "score again")
        with full_disk_is_said(results, "score again"):
            history = run_history(config.output_dir) if facts["predictions"] is None else []
            write_json(results / "all_results.json", {"history": history, "final": scores})
            write_json(results / SCORES, scores)
    except UserError as error:
        raise UserError(f"{error}; the answers are kept: {again} scores them") from None
    except Exception:
        print(f"The answers are kept in {results}: {again} scores them", file=sys.stderr, flush=True)
        raise
    (results / FACTS).unlink()
    print("\n".join([title, *table(scores)]))
    return scores


def evaluate(config: Config, checkpoint: str | None, split: str, source: str, answers: str = "auto") -> dict:
    """Scores of a split, written to the results folder. All ranks take part; the first returns them, the others {}.
    answers: whether they are scored as `sentences` or as `short`; auto: as the samples say, or else as they look."""
    hashes = data_hashes(config, split)
    folder = Path(checkpoint or config.output_dir)
    trained = None if checkpoint == "base" else folder
    encoder = open_encoder(config, source, trained or config.model_name)
    results = results_folder(config, split)
    refuse_unusable_folder(results, "results_dir")
    ranks = start_ranks(config.deterministic)
    samples = in_turns(ranks, lambda: load_split(config, split))
    all_or_raise(ranks, lambda: ranks.is_first and check_samples(samples, encoder))
    facts = what_is_asked(config, split, hashes) | {"checkpoint": str(checkpoint or folder)}
    facts |= all_or_raise(ranks, lambda: provenance(config, trained, hashes) if ranks.is_first else {})
    started = time.perf_counter()
    model = load_trained(config, trained, ranks.device)
    model.eval()
    if ranks.is_first:
        if facts["split_is_training_file"] and split != "train":
            print(f"WARNING: {split} is the file that training reads: these scores measure memory, not skill")
        say_what_is_replaced(results, facts["checkpoint"], "checkpoint")
        print(f"Answering {len(samples):,} samples of {samples.source} with {facts['checkpoint']}", flush=True)
    loaded = time.perf_counter()
    rows = predict_split(make_loss(model, encoder.family, config), samples, encoder, ranks)
    seconds = time.perf_counter() - loaded
    facts |= {
        "load_seconds": loaded - started,
        "predict_seconds": seconds,
        "predict_samples_per_second": len(rows) / seconds,
    }
    title = f"{config.experiment}: {split}, {len(rows):,} samples, {seconds:.1f} s"
    scores = all_or_raise(
        ranks, lambda: score_and_write(config, results, rows, facts, answers, title) if ranks.is_first else {}
    )
    if ranks.is_first:
        draw(config, trained, rows, results)
    ranks.barrier()
    stop_ranks()
    return scores


def draw(config: Config, trained: Path | None, rows: list[dict], results: Path) -> None:
    task_of(config).draw(rows, config, results)
    draw_curves(config, task_of(config), trained, results)
    print(f"Predictions and scores are in {results}", flush=True)


def score_again(config: Config, checkpoint: str | None, split: str, answers: str = "auto") -> dict:
    """The answers that lie in the results folder, scored once more. answers: as of `evaluate`.

    Raises: `UserError` where there are none, or where they are another checkpoint's, to another file or
    not one to each sample."""
    refuse_ranks("--score-again")
    results, cure = results_folder(config, split), "evaluate without --score-again"
    path = facts_file(results)
    if path is None or not (results / PREDICTIONS).is_file():
        raise UserError(f"{results}: no answers to score again; {cure}")
    kept, hashes = read_json(path, cure), data_hashes(config, split)
    if not isinstance(kept, dict) or (kept.get("data_sha256") or {}).get(split) != hashes[split]:
        raise UserError(f"{results}: its answers are to another file than {getattr(config.data, split)}; {cure}")
    if checkpoint and kept.get("checkpoint") != checkpoint:
        raise UserError(f"{results}: its answers are those of {kept.get('checkpoint')}; {cure}")
    by_id = read_rows(results / PREDICTIONS, cure)
    if tasks := {task_named_by(row, results, cure) for row in by_id.values()} - {config.task}:
        raise UserError(f"{results}: its answers are of task {', '.join(sorted(tasks))}, not {config.task}; {cure}")
    if by_id.keys() != {str(sample["id"]) for sample in asked_samples(config, split)}:
        raise UserError(f"{results}: its answers are not one to each sample of {getattr(config.data, split)}; {cure}")
    rows = list(by_id.values())
    if path.name == FACTS and kept.get("answers_sha256") != answers_sha256(rows):
        raise UserError(f"{results}: its answers are not those that {FACTS} speaks of; {cure}")
    for row in rows:
        row.pop(KEPT, None)  # of an earlier version of a library, or of another text
    facts = {name: kept[name] for name in KEPT_FACTS if name in kept} | {"predictions": kept.get("predictions")}
    title = f"{config.experiment}: {split}, {len(rows):,} samples, scored again"
    scores = score_and_write(config, results, rows, facts, answers, title)
    made_by = facts.get("checkpoint")
    draw(config, None if made_by in (None, "base") else Path(made_by), rows, results)
    return scores


def asked_samples(config: Config, split: str) -> list[dict]:
    """Of a split, those that get an answer each: of a conversation, its turns."""
    samples = list(load_split(config, split))
    if config.template == CONVERSATION_TEMPLATE:
        return [turn for conversation in samples for turn in conversation["turns"]]
    return samples


def refuse_ranks(flag: str) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{flag} needs no second process: run it with python instead of torchrun")


# ---------------------------------------------------------------------------------------- answers of another program


def read_predictions(path: Path, ids: list[str], config: Config) -> dict[str, tuple]:
    """Sample id -> what `row` of the config's task takes.

    Raises: `UserError` on a bad line, and unless every id has one line."""
    cure = 'give a .jsonl file with a line {"id": ..., "prediction": ...} for each sample of the split'
    task, found, repeated = task_of(config), {}, []
    for number, line in read_json_lines(path, cure):
        if not isinstance(line, dict) or not {"id", "prediction"} <= line.keys():
            raise UserError(f"{path} line {number}: no object with 'id' and 'prediction'; {cure}")
        sample_id = str(line["id"])
        if sample_id in found:
            repeated.append(sample_id)
        try:
            found[sample_id] = task.output_of(line["prediction"], config)
        except UserError as error:
            raise UserError(f"{path} line {number} (id {sample_id}): {error}") from None
    known = set(ids)
    wrong = {
        "have no line": [sample_id for sample_id in ids if sample_id not in found],
        "are no sample's": [sample_id for sample_id in found if sample_id not in known],
        "are there more than once": list(dict.fromkeys(repeated)),
    }
    told = [f"{len(named):,} id(s) {what} ({first_names(named)})" for what, named in wrong.items() if named]
    if told:
        raise UserError(f"{path}: {'; '.join(told)}; {cure}")
    return found


def score_predictions(config: Config, path: Path, split: str, source: str, answers: str = "auto") -> dict:
    """Scores of answers to a split that another program gave, written to a results folder of their own. answers: as of
    `evaluate`."""
    refuse_ranks("--predictions")
    hashes = data_hashes(config, split)
    task = task_of(config)
    results = results_folder(config, split)
    results = results.with_name(f"{results.name}_predictions_{path.stem}")
    refuse_unusable_folder(results, "results_dir")
    samples = asked_samples(config, split)
    say_what_is_replaced(results, str(path), "predictions")
    found = read_predictions(path, [sample["id"] for sample in samples], config)
    # Points are read as the config's model speaks them; words need no model, not even its tokenizer.
    encoder = open_encoder(config, source) if task.POINTS else SimpleNamespace(config=config)
    rows = []
    for sample in samples:
        try:
            rows.append(task.row(sample, encoder, found[sample["id"]]))
        except UserError as error:
            raise UserError(f"{getattr(config.data, split)} sample {sample['id']}: {error}") from None
    facts = what_is_asked(config, split, hashes) | {"predictions": str(path)}
    facts["predictions_sha256"] = file_sha256(path)
    title = f"Answers in {path}, made elsewhere: {split}, {len(rows):,} samples"
    scores = score_and_write(config, results, rows, facts, answers, title)
    draw(replace(config, output_dir=str(results)), None, rows, results)
    return scores


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--checkpoint", metavar="DIR", help="an adapter or checkpoint folder; default: output_dir; "
                        "'base': the model before training")  # fmt: skip
    parser.add_argument("--predictions", type=Path, metavar="FILE.jsonl",
                        help='score these instead: answers of another program, {"id", "prediction"} a line (a text; '
                             "clicks: also [x, y] in pixels; papers: probabilities)")  # fmt: skip
    parser.add_argument("--score-again", action="store_true",
                        help="score the answers of the results folder once more, without answering")  # fmt: skip
    parser.add_argument("--split", default="test", choices=["train", "val", "test"])
    parser.add_argument("--answers", choices=("auto", "short", "sentences"), default="auto",
                        help="sentences: score token F1, BLEU, ROUGE and METEOR beside exact match (auto: as "
                             "prepare_data.py has decided, or where most gold answers have five words)")  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override any config key, e.g. image=none")
    args = parser.parse_intermixed_args(arguments)
    config = load_config(args.config, args.overrides)
    if args.score_again and args.predictions:
        raise UserError("--score-again is for answers in a results folder; --predictions scores a file without it")
    if args.score_again:
        score_again(config, args.checkpoint, args.split, args.answers)
        return
    if args.predictions and args.checkpoint:
        raise UserError("--predictions are scored without a model; leave --checkpoint out")
    if args.predictions:
        score_predictions(config, args.predictions, args.split, args.config, args.answers)
        return
    with torch.no_grad():
        evaluate(config, args.checkpoint, args.split, args.config, args.answers)


if __name__ == "__main__":
    run_command(main)
