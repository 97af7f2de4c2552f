"""python demo.py [--summary | --family qwen3_5]

Makes what a first run needs and no download provides: a tiny Qwen3-VL with random weights (demo/model) and a set of
drawn endoscopy images with questions, in the published layout of Kvasir-VQA (demo/raw). `make demo` goes on from
there. --summary reads the results of configs/demo.yaml, shows them, and says where to look next. --family makes a tiny
model of another family.
"""

import argparse
import functools
import sys
from pathlib import Path

from errors import exit_on_user_error
from files import read_json, read_json_lines
from report.metrics import majority_answers
from toy.endoscopy import NUMBER, write_endoscopy_set
from toy.tiny_model import write_tiny_model

CURE = "run make demo first"
DEMO_LAYERS = {"qwen3_vl": 3, "qwen3_5": 4}
PROMISED_RATIO = 2.5  # test accuracy over the majority answer's


def summarise(config: str = "configs/demo.yaml") -> bool:
    """Print the demo's scores question by question, three answers, and where to look next.

    Returns: whether the test accuracy is at least PROMISED_RATIO times that of always giving the majority answer.
    """
    results, output = Path("results/demo"), Path("outputs/demo")
    scores = read_json(results / "predict_results.json", CURE)
    rows = [row for _, row in read_json_lines(results / "generated_predictions.jsonl", CURE)]
    majority = majority_answers(read_json(Path("demo/data/train.json"), CURE))
    width = max(map(len, majority)) + 2
    print(f"\n{'test accuracy, in per cent':<{width}}  majority answer   trained model   questions")
    for question in majority:
        asked = [row for row in rows if row["question"] == question]
        guessed = sum(row["answer"] == majority[question] for row in asked) / len(asked)
        right = sum(row["correct"] for row in asked) / len(asked)
        print(f"{question:<{width}}{100 * guessed:17.1f}{100 * right:16.1f}{len(asked):12,}")
    guessed, right = scores["majority_accuracy"], scores["predict_accuracy"]
    print(f"{'all':<{width}}{100 * guessed:17.1f}{100 * right:16.1f}{len(rows):12,}")
    print("\nThree of its answers:")
    for row in rows[:3]:
        print(f"  demo/raw/{row['images'][0]}  {row['question']}\n    says {row['prediction']!r}, is {row['answer']!r}")
    python = sys.executable if Path(sys.executable).is_relative_to(Path.cwd()) else "python"
    python = Path(python).relative_to(Path.cwd()) if python != "python" else python
    image = f"demo/raw/{rows[0]['images'][0]}"
    print(f"""
Where to look next:
  demo/raw/images                               the images
  demo/data/report.md                           how they were split
  {f"{output}/log.jsonl":<45} one line per logged step; as curves: {python} -m tensorboard.main --logdir {output}/runs
  {f"{results}/generated_predictions.jsonl":<45} every answer
  {python} predict.py --adapter-path {output} --image {image} --prompt "{NUMBER}"
  {python} evaluate.py --config {config} image=none    what the questions alone give away
  configs/exp2.yaml                             the first real experiment""")
    kept = right >= PROMISED_RATIO * guessed
    ratio = f"{right / guessed:.1f} times the majority answer's accuracy; {PROMISED_RATIO} times was promised"
    print(f"\n{'✓' if kept else '✗'} {ratio}")
    return kept


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--summary", action="store_true", help="show the results of configs/demo.yaml")
    parser.add_argument("--family", default="qwen3_vl", choices=DEMO_LAYERS, help="of the tiny model")
    args = parser.parse_args(arguments)
    if args.summary:
        return 0 if summarise() else 1
    write_model = functools.partial(write_demo_model, family=args.family)
    for folder, write in (("demo/model", write_model), ("demo/raw", write_endoscopy_set)):
        if Path(folder).exists():
            print(f"{folder} is there already; delete it to have it made anew")
        else:
            print(f"Making {folder} ...", flush=True)
            write(folder)
    return 0


def write_demo_model(folder: str | Path, family: str = "qwen3_vl") -> Path:
    """The demo's model: a tiny one that LoRA can teach."""
    return write_tiny_model(folder, family, teachable=True, layers=DEMO_LAYERS[family])


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main())
