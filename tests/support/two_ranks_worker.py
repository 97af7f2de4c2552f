"""One of the ranks of test_two_ranks.py: python two_ranks_worker.py MODEL_FOLDER RESULTS_FOLDER [TRAINED,...]

Does everything that needs two processes in one start, and leaves the results for the tests to judge. With names of
`tiny_runs.TRAINED` it does only the runs over mixed samples, cut in every way, on any number of ranks.
"""

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file

import distributed
import train
from distributed import Ranks, end_process, start_ranks, stop_ranks
from errors import UserError
from inference import Stopped, answer_split, split_loss
from model import AnswerLoss
from samples import SampleList
from support.tiny_runs import (
    CUTS,
    TinyRun,
    mixed_run,
    sha256_of,
    short_answers,
    step_gradients,
    steps_to_compare,
    vqa_samples,
)


def mixed_runs(run: TinyRun, ranks: Ranks, results: Path, names, cuts) -> dict:
    """Name of a run -> SHA-256 of this rank's gradients of each step and of its weights at the end. The first rank's
    are kept as files."""
    found = {}
    for trained in names:
        for pass_tokens in cuts:
            name = f"{trained}-{pass_tokens}"
            gradients, weights = mixed_run(run, trained, pass_tokens, ranks)
            found[name] = [sha256_of(tensors) for tensors in (*gradients, weights)]
            for step, tensors in enumerate([*gradients, weights] if ranks.is_first else []):
                save_file(tensors, results / f"{name}-{step}.safetensors")
    return found


def who_checks(run: TinyRun, ranks: Ranks) -> list:
    """The splits that this rank has checked before a training, and whether the folder was locked by then."""
    checked = []
    train_file = run.folder / "train.json"
    train_file.write_text(json.dumps(vqa_samples(1, 2)))
    config = replace(run.config, data=replace(run.config.data, train=str(train_file), val=None, test=None))

    def check(samples, encoder):
        checked.append([samples.source, (Path(config.output_dir) / ".lock").is_file()])
        raise UserError("as far as this test goes")

    with mock.patch.multiple("train", check_samples=check, start_ranks=lambda *_: ranks, StopSignal=mock.MagicMock()):
        try:
            train.set_up(config, "c.yaml")
        except UserError as error:
            checked.append(str(error))
    return checked


def main(model_folder: Path, results: Path, only_trained: str = "") -> None:
    ranks = start_ranks()
    torch.set_num_threads(1)
    distributed.BUCKET_ELEMENTS = 5_000  # so that gradients travel in several buckets
    run = TinyRun(model_folder, results / f"run{ranks.rank}", "qwen3_vl")
    if only_trained:
        found = {"mixed": mixed_runs(run, ranks, results, only_trained.split(","), CUTS)}
    else:
        found = all_but_training(run, ranks, results)
        found["mixed"] = mixed_runs(run, ranks, results, ["everything"], CUTS[:1])
    (results / f"rank{ranks.rank}.json").write_text(json.dumps(found))
    ranks.barrier()
    stop_ranks()


def all_but_training(run: TinyRun, ranks: Ranks, results: Path) -> dict:
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
    found["loss_of_rows"] = split_loss(AnswerLoss(run.model(), run.family), samples, run.encoder(), ranks, rows=[3, 5])
    found["answers_of_rows"] = answer_split(run.model(), samples, run.encoder(eval_bs=16), ranks, rows=[5])

    stopped = False
    with contextlib.suppress(Stopped):
        answer_split(run.model(), samples, run.encoder(eval_bs=1), ranks, stop=lambda: ranks.rank == 1)
        stopped = None
    found["stopped"] = stopped is False
    found["checked"] = who_checks(run, ranks)
    return found


if __name__ == "__main__":
    with short_answers():
        main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
    end_process()
