"""Whole families of experiments through a real Slurm, with the real train.py and tiny models, up to the comparison."""

import json
import re
import subprocess

import pytest
import yaml
from conftest import shared_data
from support.headless_browser import headless_browser
from support.run_helpers import write_samples
from support.slurm_cluster import Job
from test_slurm import cluster, real_repo, slurm  # noqa: F401 - fixtures

import compare
import prepare_data


@pytest.mark.slow
@pytest.mark.slurm
def test_the_five_experiments_run_in_one_job_and_are_compared_on_a_page(slurm, real_repo, tiny_models, tmp_path):  # noqa: F811
    data = real_repo / "data" / "kvasir"
    samples = write_samples(real_repo / "data" / "kvasir-vqa", images=6, questions=6)
    data.mkdir(parents=True)
    for split, images in (("train", "012"), ("val", "3"), ("test", "45")):
        of_split = [sample for sample in samples if sample["group"] in images]
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


def count_rows(path):
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.slow
@pytest.mark.slurm
def test_two_seeds_of_exp2_and_of_random_order_run_as_arrays_and_are_compared_as_experiments(
    slurm,  # noqa: F811
    real_repo,  # noqa: F811
    tiny_models,
    tmp_path,
):
    """One task is preempted in the middle of its training; the recipes differ in their order alone."""
    data = real_repo / "data" / "kvasir"
    samples = write_samples(real_repo / "data" / "kvasir-vqa", images=12, questions=6)
    data.mkdir(parents=True)
    for split, images in (("train", range(6)), ("val", (6,)), ("test", range(7, 12))):
        of_split = [sample for sample in samples if int(sample["group"]) in images]
        (data / f"{split}.json").write_text(json.dumps(sorted(of_split, key=lambda sample: sample["stage"])))
    overrides = [f"model_name={tiny_models['qwen3_vl']}", "image_size=64", "num_train_epochs=30", "warmup_steps=1"]
    overrides += ["dataloader_num_workers=0", "logging_steps=1", "eval_steps=", "learning_rate=1e-2", "grad_accum=1"]
    names = ("exp2", "exp2_random_order")
    options = ("--array=1-2", "--partition=both")
    arrays = [
        slurm.run_job(f"slurm/train_{file}_2gpu.slurm", *overrides, cwd=real_repo, options=options) for file in names
    ]
    stopped, log = arrays[0].task(2), real_repo / "outputs" / "exp2_seed2" / "log.jsonl"
    stopped.wait_for(lambda: count_rows(log) > 5, "does not train", seconds=300)
    stopped.preempt()
    stopped.wait_for_restart(seconds=600)  # behind the tasks that still wait for their first start
    tasks = [array.task(seed) for array in arrays for seed in (1, 2)]
    for task in tasks:
        task.wait_for_state("COMPLETED", seconds=600)
    assert [task.restarts for task in tasks] == [0, 1, 0, 0]

    results = real_repo / "results"
    folders = {name: [results / f"{name}_seed{seed}" for seed in (1, 2)] for name in names}
    for name in names:
        for seed, folder in enumerate(folders[name], start=1):
            scores = json.loads((folder / "predict_results.json").read_text())
            assert scores["seed"] == seed and scores["trained_config"]["seed"] == seed
            assert scores["questions_per_step"] == 8
    out = tmp_path / "comparison"
    compared = [f"{name}={','.join(map(str, folders[name]))}" for name in names]
    compare.main([*compared, "--out", str(out), "--image-root", str(real_repo / "data" / "kvasir-vqa")])
    report = json.loads((out / "compare.json").read_text())
    (pair,) = report["pairs"]
    assert pair["runs"] == [2, 2]
    assert [entry["key"] for entry in pair["differing_keys"] if entry["matters"]] == ["order"]
    assert pair["recipe"].startswith("exp2 and exp2_random_order differ in order alone.")
    with headless_browser(tmp_path / "profile") as browser:
        browser.open(out / "compare.html")
        assert browser.run("document.querySelectorAll('.chart .seed').length") == 4
        assert "differ in order alone" in browser.run("document.querySelector('.sentences').textContent")


PAPERS = 48  # of the real ones
IN_TABLE = ("accuracy", "f1", "precision", "recall", "auroc", "brier", "ece")


@pytest.mark.slow
@pytest.mark.slurm
def test_the_six_learning_rate_experiments_run_on_real_papers_at_once_and_end_in_one_table(
    slurm,  # noqa: F811
    real_repo,  # noqa: F811
    tiny_models,
    tmp_path,
):
    """As submit_lr_experiment.sh submits them: two arrays, six tasks of two processes, side by side. Only the models
    are small, and so are the numbers of papers, tokens and pixels."""
    data = real_repo / "data"
    data.mkdir()
    papers = shared_data("openreview/iclr2021.jsonl").read_text(encoding="utf-8").splitlines()[:PAPERS]
    (data / "papers.jsonl").write_text("\n".join(papers), encoding="utf-8")
    for folder, options in (("papers_text", []), ("papers_pages", ["--pages"])):
        out = ["--source", str(data / "papers.jsonl"), "--out", str(data / folder), "--split", "60/20/20"]
        prepare_data.main(["papers", *out, "--train-agreeing", *options])
    for path in (real_repo / "configs").glob("lr_*.yaml"):
        config = yaml.safe_load(path.read_text())
        config |= {"num_train_epochs": 2, "dataloader_num_workers": 0, "logging_steps": 1, "max_tokens": 512}
        config["model_name"] = str(tiny_models["qwen2_5_vl" if "vision" in path.name else "qwen2"])
        config |= {"max_pixels": 100_000} if "vision" in path.name else {}
        path.write_text(yaml.safe_dump(config))

    # Both of the test cluster's nodes are this machine, so that all twelve processes share its ports.
    command = [real_repo / "slurm" / "submit_lr_experiment.sh", "--partition=both", "--mem=90G"]
    submitted = subprocess.run(command, env=slurm.environment(), capture_output=True, text=True)
    arrays = re.findall(r"Submitted batch job (\d+)", submitted.stdout)
    assert submitted.returncode == 0 and len(arrays) == 2, submitted.stderr
    tasks = [Job(slurm, number, real_repo).task(index) for number in arrays for index in range(3)]
    for task in tasks:
        task.wait_for_state("COMPLETED", seconds=900)
    assert max(task.field("StartTime") for task in tasks) < min(task.field("EndTime") for task in tasks), "side by side"
    names = [path.stem for path in sorted((real_repo / "configs").glob("lr_*.yaml"))]
    for number in arrays:
        for index in range(3):
            log = (real_repo / "logs" / "lr_experiment_v7" / f"{number}_{index}.out").read_text()
            assert "[INFO] Using custom classification optimizer with backbone_lr=" in log

    results = real_repo / "results" / "lr_experiment_v7"
    assert sorted(folder.name for folder in results.iterdir()) == names and len(names) == 6
    out = tmp_path / "table"
    compare.main([*(str(results / name) for name in names), "--out", str(out)])
    report = json.loads((out / "compare.json").read_text())
    assert [experiment["name"] for experiment in report["experiments"]] == names and len(report["pairs"]) == 15
    for experiment in report["experiments"]:
        scores = json.loads((results / experiment["name"] / "predict_results.json").read_text())
        for name in IN_TABLE:
            assert experiment[f"predict_{name}"] == scores[f"predict_{name}"], name
