"""Whole families of experiments through a real Slurm, with the real train.py and tiny models, up to the comparison."""

import json
import random

import pytest
from headless_browser import headless_browser
from run_helpers import write_samples
from test_slurm import cluster, real_repo, slurm  # noqa: F401 - fixtures

import compare


@pytest.mark.slow
@pytest.mark.slurm
def test_the_five_experiments_run_in_one_job_and_are_compared_on_a_page(slurm, real_repo, tiny_models, tmp_path):  # noqa: F811
    data = real_repo / "data" / "kvasir"
    samples = write_samples(real_repo / "data" / "kvasir-vqa", pictures=6, questions=6)
    data.mkdir(parents=True)
    for split, pictures in (("train", "012"), ("val", "3"), ("test", "45")):
        of_split = [sample for sample in samples if sample["group"] in pictures]
        (data / f"{split}.json").write_text(json.dumps(of_split))
        for stage in (1, 2, 3):
            of_stage = [sample for sample in of_split if sample["stage"] == stage]
            (data / f"{split}_stage{stage}.json").write_text(json.dumps(of_stage))
    overrides = [f"model_name={tiny_models['qwen3_vl']}", "image_size=64", "num_train_epochs=2", "warmup_steps=1"]
    overrides += ["dataloader_num_workers=0", "logging_steps=1", "eval_steps=", "learning_rate=1e-2"]
    job = slurm.run_job("slurm/train_all_4gpu.slurm", *overrides, cwd=real_repo)
    job.wait_for_state("COMPLETED", seconds=600)

    results = real_repo / "results"
    stages = "+".join(str(results / f"exp3_stage{stage}") for stage in (1, 2, 3))
    names = ("exp1", "exp2", "exp4_stage3", "exp5_sequential_cot")
    compared = [*(f"{name}={results / name}" for name in names), f"exp3={stages}"]
    out = tmp_path / "comparison"
    compare.main([*compared, "--out", str(out), "--image-root", str(real_repo / "data" / "kvasir-vqa")])
    report = json.loads((out / "compare.json").read_text())
    assert len(report["experiments"]) == 5 and len(report["pairs"]) == 10
    with headless_browser(tmp_path / "profile") as browser:
        browser.open(out / "compare.html", "#stage=2")
        assert browser.run("document.querySelectorAll('img').length") > 0


@pytest.mark.slow
@pytest.mark.slurm
def test_the_learning_rate_arrays_run_on_slurm_and_end_in_one_table(slurm, real_repo, tiny_models, tmp_path):  # noqa: F811
    words = {0: "rejected weak flawed", 1: "accepted strong novel"}
    generator = random.Random(0)
    papers = [
        {"id": f"paper-{n}", "title": f"Paper {n}", "label": n % 2, "text": f"{words[n % 2]} {generator.random()}"}
        for n in range(24)
    ]
    data = real_repo / "data"
    data.mkdir()
    for split, part in (("train", papers[:16]), ("val", papers[16:20]), ("test", papers[20:])):
        (data / f"{split}.json").write_text(json.dumps(part))
    overrides = [f"data.{split}=data/{split}.json" for split in ("train", "val", "test")]
    overrides += [
        "data.image_root=data",
        "num_train_epochs=2",
        "train_bs=2",
        "grad_accum=1",
        "dataloader_num_workers=0",
    ]
    (real_repo / "logs" / "lr_experiment_v7").mkdir(parents=True)  # as submit_lr_experiment.sh does
    array = slurm.run_job("slurm/lr_text.slurm", f"model_name={tiny_models['qwen2']}", *overrides, cwd=real_repo)
    for index in range(3):
        array.task(index).wait_for_state("COMPLETED", seconds=600)
    results = real_repo / "results" / "lr_experiment_v7"
    out = tmp_path / "table"
    compare.main([*(str(folder) for folder in sorted(results.iterdir())), "--out", str(out)])
    assert len(json.loads((out / "compare.json").read_text())["experiments"]) == 3
