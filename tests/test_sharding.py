"""FSDP: shares on two processes train like DDP on two and like one process, and resume bit for bit."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support.document_runs import document_config, losses, predictions, write_documents
from support.run_helpers import REPO, finish, history, log_rows, start, start_train
from support.run_helpers import write_config as question_config
from support.run_helpers import write_samples as write_questions
from support.tiny_runs import tiny_run, vqa_samples

import evaluate
import model as modeling
import sharding
import train
from classification import attach_head
from config import load_config
from dataset import SampleEncoder
from distributed import Ranks
from errors import UserError
from model import load_base
from preflight import make_plan
from samples import SampleList
from templates import IGNORE

TOLERANCE = 2e-5  # of losses near 1: other orders of summation, over eleven steps of training


@pytest.fixture(scope="session")
def documents(tmp_path_factory):
    """45 documents make five whole steps and one of five, which the ranks cannot share evenly."""
    return write_documents(tmp_path_factory.mktemp("documents"), train=45, val=9, test=5)


@pytest.fixture
def config(documents, tiny_models, tmp_path):
    """config(name, **changes) -> the path of a config of page images, full fine-tuning, 12 steps."""

    def config(name, **changes):
        values = {"num_train_epochs": 2, "save_steps": 5, "train_bs": 2, "grad_accum": 2, **changes}
        return document_config(documents, tiny_models["qwen3_vl"], tmp_path / name, "page", "qwen3_vl", **values)

    return config


def final_bytes(output):
    return [(output / name).read_bytes() for name in ("model.safetensors", "cls_head.safetensors")]


def newest_state(output):
    newest = max(output.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    return json.loads((newest / "trainer_state.json").read_text())


# ----------------------------------------------------------------------------------------------------- two processes


def test_two_shares_train_like_two_copies_and_like_one_process(config, tmp_path):
    runs = {name: start_train(config(name, parallel=name, num_train_epochs=1), ranks=2) for name in ("fsdp", "ddp")}
    train.main(["--config", str(config("one", grad_accum=4, num_train_epochs=1))])
    for process in runs.values():
        code, text = finish(process)
        assert code == 0, text
    for name in ("fsdp", "ddp"):
        assert len(losses(tmp_path / name)) == 6
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), abs=TOLERANCE)
        for key in ("eval_loss", "test_loss", "eval_accuracy"):
            found, expected = ([row[key] for row in log_rows(tmp_path / n, key)] for n in (name, "one"))
            assert found == pytest.approx(expected, abs=TOLERANCE)
    weights = {name: load_file(tmp_path / name / "model.safetensors") for name in ("one", "fsdp")}
    assert weights["one"].keys() == weights["fsdp"].keys()
    for name, tensor in weights["one"].items():
        assert tensor.dtype == weights["fsdp"][name].dtype
        assert torch.allclose(tensor, weights["fsdp"][name], atol=1e-3), name


@pytest.mark.slow
def test_an_interrupted_run_resumes_bit_for_bit_and_its_checkpoints_need_no_pickle(config, tmp_path):
    code, text = finish(start(config("whole", parallel="fsdp"), ranks=2))
    assert code == 0, text
    path = config("cut", parallel="fsdp", save_steps=100)
    wrapped = REPO / "tests" / "support" / "wrapped_sharding.py"
    code, text = finish(start(path, ranks=2, script=wrapped, environment={"STOP_STEP": "7"}))  # one rank alone hears it
    assert code == 0 and (tmp_path / "cut" / "PREEMPTED").exists() and "Saved checkpoint-7" in text, text
    code, text = finish(start(path, ranks=2))
    assert code == 0 and "step 7/12" in text, text
    assert history(tmp_path / "cut") == history(tmp_path / "whole")
    assert final_bytes(tmp_path / "cut") == final_bytes(tmp_path / "whole")
    files = {str(file.relative_to(tmp_path / "cut" / "checkpoint-12"))
             for file in (tmp_path / "cut" / "checkpoint-12").rglob("*") if file.is_file()}  # fmt: skip
    shares = {f"sharded/shard-0000{rank}-model-00001-of-00001.safetensors" for rank in (1, 2)}
    assert files == shares | {"cls_head.safetensors", "trainer_state.json", "base.json"}


@pytest.mark.slow
def test_one_process_goes_on_from_the_shares_of_two(config, tmp_path):
    for name in ("whole", "cut"):
        code, text = finish(start(config(name, parallel="fsdp", save_steps=6), ranks=2))
        assert code == 0, text
    shutil.rmtree(tmp_path / "cut" / "checkpoint-12")  # as if it had been stopped after step 6
    (tmp_path / "cut" / "model.safetensors").unlink()
    train.main(["--config", str(config("cut", parallel="fsdp", save_steps=100, grad_accum=4))])
    train.main(["--config", str(config("whole", parallel="fsdp", save_steps=100, grad_accum=4))])
    assert len(losses(tmp_path / "cut")) == 12
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), abs=TOLERANCE)


@pytest.mark.slow
def test_where_one_rank_cannot_write_all_end_and_the_checkpoint_before_stays(config, tmp_path):
    path = config("out", parallel="fsdp")
    wrapped = REPO / "tests" / "support" / "wrapped_sharding.py"
    code, text = finish(start(path, ranks=2, script=wrapped, environment={"FAULT_STEP": "10"}))
    assert code != 0 and "No space left on device" in text and "GB are free there" in text, text
    folders = {file.name for file in (tmp_path / "out").iterdir() if "checkpoint" in file.name}
    assert folders == {"checkpoint-5", "checkpoint-6"} and not (tmp_path / "out" / "model.safetensors").exists()
    code, text = finish(start(path, ranks=2))
    assert code == 0 and "step 6/12" in text, text


# -------------------------------------------------------------------------------------------------------- one process


def test_one_process_goes_on_from_any_share_and_reads_it_for_evaluation(config, tmp_path):
    train.main(["--config", str(config("whole", parallel="fsdp", grad_accum=4))])
    path = config("cut", parallel="fsdp", grad_accum=4)
    train.main(["--config", str(path)])
    output = tmp_path / "cut"
    assert final_bytes(output) == final_bytes(tmp_path / "whole")
    evaluate.main(["--config", str(path)])
    from_final = predictions(tmp_path / "cut_results")
    evaluate.main(
        ["--config", str(path), "--checkpoint", str(output / f"checkpoint-{newest_state(output)['best_step']}")]
    )
    assert predictions(tmp_path / "cut_results") == from_final
    for name in ("checkpoint-12", "checkpoint-10", "model.safetensors"):
        (output / name).rename(output / f"gone-{name}")
    train.main(["--config", str(path)])
    assert history(output) == history(tmp_path / "whole")
    assert final_bytes(output) == final_bytes(tmp_path / "whole")


@pytest.mark.parametrize(
    "family",
    ["qwen3_vl", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_5"))],
)
def test_questions_are_trained_and_answered_under_fsdp_as_under_ddp(family, tiny_models, tmp_path):
    """With every part trained, and answers generated on the way."""
    write_questions(tmp_path / "data", images=2, questions=3)
    keys = {"finetuning": "full", "vision_frozen": False, "projector_frozen": False, "eval_steps": 2, "save_steps": 2}
    keys |= {"data": {"image_root": str(tmp_path / "data"), "train": str(tmp_path / "data" / "samples.json"),
                      "val": str(tmp_path / "data" / "samples.json")},
             "learning_rate": 1e-3, "eval_max_samples": 2}  # fmt: skip
    keys |= {"image_size": 64 if family.startswith("qwen3") else 56}
    keys |= {"num_train_epochs": 2, "gradient_checkpointing": True}
    for parallel in ("ddp", "fsdp"):
        path = question_config(tmp_path / "data", tiny_models[family], tmp_path / parallel, parallel=parallel, **keys)
        train.main(["--config", str(path)])
    assert history(tmp_path / "fsdp") == history(tmp_path / "ddp")
    found, expected = ([(row["eval_loss"], row["eval_accuracy"]) for row in log_rows(tmp_path / name, "eval_loss")]
                       for name in ("fsdp", "ddp"))  # fmt: skip
    assert found == expected
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("fsdp", "ddp"))
    assert one == other


def test_a_busier_rank_is_matched_with_batches_of_no_weight():
    class Third(Ranks):
        def gather(self, rows):
            return [2, *rows, 3]

    batch = {"input_ids": torch.ones(1, 4), "targets": torch.ones(1, 4, dtype=torch.int64), "answer_tokens": 4}
    batch |= {"class_labels": torch.tensor([1]), "supervised": torch.arange(4), "tokens": 4}
    padded = sharding.pad_passes([batch], Third(1, 3, torch.device("cpu")))
    assert len(padded) == 3 and padded[0] is batch
    for added in padded[1:]:
        assert added["answer_tokens"] == added["tokens"] == len(added["supervised"]) == 0
        assert (added["targets"] == IGNORE).all() and (added["class_labels"] == IGNORE).all()
    assert sharding.pad_passes([batch] * 3, Third(1, 3, torch.device("cpu"))) == [batch] * 3


def test_the_best_epoch_is_put_back_from_its_shares(config, monkeypatch, tmp_path):
    accuracies = iter([0.9, 0.5])
    monkeypatch.setattr(
        train, "scores_while_training", lambda *_: {"eval_accuracy": next(accuracies), "eval_loss": 0.5}
    )
    train.main(["--config", str(config("out", parallel="fsdp", grad_accum=4, save_steps="epoch"))])
    output = tmp_path / "out"
    best, last = (load_file(output / f"checkpoint-{step}" / "cls_head.safetensors") for step in (6, 12))
    final = load_file(output / "cls_head.safetensors")
    assert torch.equal(final["weight"], best["weight"]) and not torch.equal(final["weight"], last["weight"])
    base = load_base(str(output), torch.float32)
    attach_head(base, 2, seed=0)
    sharding.load_unsharded(output / "checkpoint-6" / "sharded", base)
    weights = load_file(output / "model.safetensors")
    assert all(torch.equal(weights[name], p) for name, p in base.named_parameters() if name in weights)
    assert torch.equal(best["weight"], base.cls_head.weight)


@pytest.mark.parametrize(
    "changes",
    [{}, {"vision_frozen": False}, {"projector_frozen": False}, {"backbone_learning_rate": 0.0}],
    ids=lambda changes: next(iter(changes), "as the experiments"),
)
def test_a_bfloat16_base_is_sharded_and_computed_as_on_gpus(changes, config, monkeypatch, tmp_path, capsys):
    """Frozen parts stay bfloat16 beside trained ones in float32, and all of it computes in bfloat16."""
    load, policy = modeling.load_base, sharding.MixedPrecisionPolicy
    monkeypatch.setattr(modeling, "load_base", lambda name, dtype, kind="none": load(name, torch.bfloat16, kind))
    compute = {torch.float32: torch.bfloat16, None: None}  # the head computes as it is
    monkeypatch.setattr(
        sharding, "MixedPrecisionPolicy", lambda param_dtype, **others: policy(compute[param_dtype], **others)
    )
    train.main(["--config", str(config("out", parallel="fsdp", grad_accum=4, learning_rate=3e-3, **changes))])
    found = losses(tmp_path / "out")
    assert len(found) == 12 and sum(found[-3:]) < sum(found[:3])


def test_images_in_some_samples_only_are_refused_where_ranks_could_not_meet(tiny_models, tmp_path):
    run = tiny_run(tiny_models, "qwen3_vl")
    samples = vqa_samples(2, 2)
    samples[2].pop("image")
    config = replace(run.config, parallel="fsdp")
    encoder = SampleEncoder(config, run.family, run.tokenizer)
    make_plan(replace(config, parallel="ddp"), SampleList(samples, "s"), run.encoder(), 2)
    with pytest.raises(UserError, match=r"s row 3 .* has no image and others have.*set parallel: ddp"):
        make_plan(config, SampleList(samples, "s"), encoder, 2)


def test_adapters_are_not_sharded(config):
    with pytest.raises(UserError, match="LoRA runs under parallel: ddp"):
        load_config(config("out", parallel="fsdp", finetuning="lora"))
