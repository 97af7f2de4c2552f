"""One of the two ranks of test_two_ranks.py: python two_ranks_worker.py MODEL_FOLDER RESULTS_FOLDER

Does everything that needs two processes in one start, and leaves the results for the tests to judge.
"""

import contextlib
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from dataset import SampleList
from distributed import end_process, start_ranks, stop_ranks
from inference import Stopped, answer_split, split_loss
from model import AnswerLoss
from support.tiny_runs import TinyRun, short_answers, step_gradients, steps_to_compare, vqa_samples


def main(model_folder: Path, results: Path) -> None:
    ranks = start_ranks()
    torch.set_num_threads(1)
    run = TinyRun(model_folder, results / f"run{ranks.rank}", "qwen3_vl")
    found = {"rank": ranks.rank, "world": ranks.world_size, "describe": ranks.describe()}

    found["sum"] = ranks.sum(1 / 3 + ranks.rank, 1e16, ranks.rank, -(2.0**-60))
    found["any"] = [ranks.any(ranks.rank == 1), ranks.any(ranks.rank == 0), ranks.any(False), ranks.any(True)]
    mine = [[0, "ünï 🙂", True], {"a": None}] if ranks.is_first else [[1, "x" * 5000, 0.1], 7, []]
    found["gather"] = ranks.gather(mine)
    found["gather_from_one"] = ranks.gather([] if ranks.is_first else ["only rank 1"])
    found["gather_nothing"] = ranks.gather([])

    found["losses"] = {}
    for name, (samples, pass_tokens) in steps_to_compare().items():
        sums, gradients = step_gradients(run, samples, pass_tokens, ranks)
        found["losses"][name] = [sums["nll"], sums["answer_tokens"]]
        save_file(gradients, results / f"{name}-rank{ranks.rank}.safetensors")

    samples = SampleList(vqa_samples(3, 3), "samples")
    for eval_bs in (1, 4, 16):
        encoder = run.encoder(eval_bs=eval_bs)
        found[f"answers_{eval_bs}"] = answer_split(run.model(), samples, encoder, ranks)
        found[f"loss_{eval_bs}"] = split_loss(AnswerLoss(run.model(), run.family), samples, encoder, ranks)
    found["answers_of_rows"] = answer_split(run.model(), samples, run.encoder(eval_bs=16), ranks, rows=[5])

    stopped = False
    with contextlib.suppress(Stopped):
        answer_split(run.model(), samples, run.encoder(eval_bs=1), ranks, stop=lambda: ranks.rank == 1)
        stopped = None
    found["stopped"] = stopped is False
    (results / f"rank{ranks.rank}.json").write_text(json.dumps(found))
    ranks.barrier()
    stop_ranks()


if __name__ == "__main__":
    with short_answers():
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    end_process()
