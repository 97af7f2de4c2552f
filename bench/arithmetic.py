"""python bench/arithmetic.py [--size 8b] [--tflops 790] [--text-tokens 50] [--questions-per-image 9]

The limit that arithmetic sets: operations per question with and without a shared prefix, and how long three epochs of
Kvasir-VQA take at a measured matrix rate if nothing else costs anything.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules at the root

import workload as work

from errors import exit_on_user_error
from forecast import Operations

ANSWER_TOKENS = 4  # a Kvasir-VQA answer has 3.9 on average, its end token included


def teraflops(operations: Operations, image_tokens: int, text_tokens: int, k: int) -> dict:
    """Operations of one question in 10¹², by what costs them: (alone with full logits, as one of k that share)."""
    alone, shared = [[image_tokens + text_tokens]], [[image_tokens, *[text_tokens] * k]]
    linear, attention = replace(operations, per_pair=0), replace(operations, per_token=0)
    parts = {
        "layers' matrices": (linear.useful(alone, 0, []), linear.useful(shared, 0, []) / k),
        "attention": (attention.useful(alone, 0, []), attention.useful(shared, 0, []) / k),
        "logits and the last MLP": (alone[0][0] * operations.per_position, ANSWER_TOKENS * operations.per_position),
        "vision": (operations.vision(image_tokens), operations.vision(image_tokens) / k),
    }
    parts["all"] = (sum(part[0] for part in parts.values()), sum(part[1] for part in parts.values()))
    return {name: (a / 1e12, b / 1e12) for name, (a, b) in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="8b", choices=work.SIZES)
    parser.add_argument("--tflops", type=float, default=790, help="measured rate of a large bf16 product, one H100")
    parser.add_argument("--text-tokens", type=int, default=50, help="of a question and its answer")
    parser.add_argument("--questions-per-image", type=int, default=9)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        operations = work.operations_of(work.write_folder(Path(folder) / "model", work.SIZES[args.size], None))
    questions = work.EPOCHS * work.QUESTIONS_IN_TRAINING
    columns = {}
    for image_tokens in (576, 2040, 2900):
        parts = teraflops(operations, image_tokens, args.text_tokens, args.questions_per_image)
        minutes = tuple(questions * value / args.tflops / 60 for value in parts["all"])
        ratio = (parts["all"][0] / parts["all"][1],) * 2
        columns[image_tokens] = parts | {f"minutes at {args.tflops:g} TFLOP/s": minutes, "ratio": ratio}
    print("| TFLOP per question |" + "".join(f" {n} alone | {n} shared |" for n in columns))
    print("|---|" + "--:|" * 2 * len(columns))
    for name in next(iter(columns.values())):
        pairs = [column[name] for column in columns.values()]
        cells = (f" | {b:.2f} |" if name == "ratio" else f" {a:.3g} | {b:.3g} |" for a, b in pairs)
        print(f"| {name} |" + "".join(cells))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
