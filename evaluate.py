"""python evaluate.py --config configs/exp2.yaml [--checkpoint DIR] [--split test] [key=value ...]

Answers every question of a split and scores the answers; `torchrun --nproc_per_node=N evaluate.py ...` shares the work
out, with the same answers. Writes generated_predictions.jsonl, predict_results.json and all_results.json to results_dir
(with image=none, the question-only baseline, to results_dir + "_question_only"; another split likewise).
"""

import argparse
import contextlib
import json
import os
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns in every forked data worker otherwise

import torch

import clicks
import model as modeling
from checkpoint import load_trained
from classification import ClassLoss
from config import Config, check_data_files, load_config
from dataset import SampleEncoder, load_samples, load_split
from distributed import end_process, start_ranks, stop_ranks
from errors import exit_on_user_error
from family import load_family
from files import write_json, write_text
from images import image_path
from inference import answer_split, classify_split
from preflight import check_samples
from report import metrics


def results_folder(config: Config, split: str) -> Path:
    """Where the scores of a split go; the baseline and other splits never overwrite the test results."""
    suffix = "" if split == "test" else f"_{split}"
    return Path(config.results_dir + suffix + ("_question_only" if config.image == "none" else ""))


def read_log(output_dir) -> list[dict]:
    """The lines of the run's log.jsonl."""
    path = Path(output_dir) / "log.jsonl"
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):  # the last line of a killed run may be cut
            rows.append(json.loads(line))
    return rows


def run_history(output_dir) -> list[dict]:
    """Every evaluation line of the run's log.jsonl."""
    return [row for row in read_log(output_dir) if any(key.startswith("eval_") for key in row)]


def table(scores: dict) -> list[str]:
    """The score table on the console: shares in percent, with 95 % intervals where there are several images."""
    lines = []
    for name, value in scores.items():
        if f"{name}_ci" not in scores or value is None:
            continue
        unit, factor, digits = ("pixels", 1, 1) if name.endswith("_pixels") else ("%", 100, 1)
        if name in ("predict_auroc", "predict_brier", "predict_ece"):
            unit, factor, digits = " ", 1, 3
        shown = [f"{factor * number:6.{digits}f}" for number in (value, *(scores[f"{name}_ci"] or []))]
        spread = f"   95 % interval {shown[1]} to {shown[2]}" if shown[1:] else ""
        lines.append(f"  {name:<28}{shown[0]} {unit}{spread}")
    if scores.get("outside_candidates") is not None:
        lines.append(
            f"  {'outside_candidates':<28}{scores['outside_candidates']:6d} of {scores['predict_samples']} answers"
        )
    if scores.get("unparsable"):
        lines.append(f"  {'unparsable':<28}{scores['unparsable']:6d} answers without a point, counted as wrong")
    if scores.get("cut_texts"):
        lines.append(f"  {'cut_texts':<28}{scores['cut_texts']:6d} texts lost their end to max_tokens")
    if scores.get("cut_off"):
        lines.append(f"  {'cut_off':<28}{scores['cut_off']:6d} answers without an end; is the model trained?")
    return lines


def score(rows: list[dict], config: Config) -> dict:
    if config.task == "cls":
        return metrics.score_cls(rows) | {"cut_texts": sum(row["cut_tokens"] > 0 for row in rows)}
    if config.task == "click":
        return metrics.score_click(rows)
    return metrics.score_vqa(rows, metrics.majority_answers(load_samples(config.data.train)))


def draw_worst_misses(rows: list[dict], config: Config, path: Path) -> None:
    """A contact sheet of the clicks farthest off their target, with gold and predicted point."""
    from report import plots

    root = config.data.image_root
    shown = [
        {**row, "image": image_path(root, row["images"][0]), "caption": row["question"]}
        for row in plots.worst_misses(rows)
    ]
    plots.contact_sheet(shown, path)
    print(f"The worst misses are drawn in {path}")


def draw_classification(rows: list[dict], config: Config, results: Path) -> None:
    """The reliability diagram of the predictions, and the run's curves where its log is at hand."""
    from report import plots

    probabilities, labels = [row["probabilities"] for row in rows], [row["true_label"] for row in rows]
    plots.reliability_diagram(probabilities, labels, results / "reliability.png")
    log = read_log(config.output_dir)
    if log:
        plots.loss_curves(log, results / "loss_curves.png")
    print(f"Drawn: {results / 'reliability.png'}" + (f", {results / 'loss_curves.png'}" if log else ""))


def evaluate(config: Config, checkpoint: str | None, split: str, source: str) -> dict:
    """Scores of a split, written to the results folder. All ranks take part; every one returns them."""
    check_data_files(config, dict.fromkeys([split, "train"]))
    family = load_family(config.model_name)
    if family.has_vision and config.resize == "letterbox":
        family.check_image_size(config.image_size, source)
    encoder = SampleEncoder(config, family, modeling.load_tokenizer(config.model_name))
    samples = load_split(config, split)
    check_samples(samples, encoder)
    folder = Path(checkpoint or config.output_dir)
    clicks.check_convention(config.model_name if checkpoint == "base" else folder, family, config)
    ranks = start_ranks()
    started = time.perf_counter()
    trained = None if checkpoint == "base" else folder
    model = load_trained(config.model_name, trained, ranks.device, config.quantization, config.num_labels)
    model.eval()
    if ranks.is_first:
        print(f"Answering {len(samples):,} samples of {samples.source} with {checkpoint or folder}", flush=True)
    loaded = time.perf_counter()
    if config.task == "cls":
        rows = classify_split(ClassLoss(model, family), samples, encoder, ranks)
    else:
        rows = answer_split(model, samples, encoder, ranks)
    seconds = time.perf_counter() - loaded
    scores = score(rows, config) | {
        "cut_off": sum(row.get("cut_off", False) for row in rows),
        "experiment": config.experiment,
        "task": config.task,
        "checkpoint": str(checkpoint or folder),
        "split": split,
        "image": config.image,
        "image_root": config.data.image_root,
        "load_seconds": loaded - started,
        "predict_seconds": seconds,
        "predict_samples_per_second": len(rows) / seconds,
    }
    if ranks.is_first:
        results = results_folder(config, split)
        results.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(results / "generated_predictions.jsonl", lines)
        write_json(results / "all_results.json", {"history": run_history(config.output_dir), "final": scores})
        write_json(results / "predict_results.json", scores)
        print("\n".join([f"{config.experiment}: {split}, {len(rows):,} samples, {seconds:.1f} s", *table(scores)]))
        if config.task == "click":
            draw_worst_misses(rows, config, results / "worst_misses.png")
        if config.task == "cls":
            draw_classification(rows, config, results)
        print(f"Predictions and scores are in {results}", flush=True)
    ranks.barrier()
    stop_ranks()
    return scores


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--checkpoint", metavar="DIR", help="an adapter or checkpoint folder; default: output_dir; "
                        "'base': the model before training")  # fmt: skip
    parser.add_argument("--split", default="test", choices=["train", "val", "test"])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override any config key, e.g. image=none")
    args = parser.parse_intermixed_args(arguments)
    config = load_config(args.config, args.overrides)
    with torch.no_grad():
        evaluate(config, args.checkpoint, args.split, args.config)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
    end_process()
