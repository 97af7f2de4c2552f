"""The shipped job files on a real Slurm (see support/slurm_cluster.py), with a stand-in for the training itself."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO_ROOT
from support.run_helpers import log_rows, weights, write_samples
from support.slurm_cluster import SlurmCluster, why_unavailable

from run_folder import step_of

JOB_FILES = sorted((REPO_ROOT / "slurm").glob("*.slurm"))


def skip_or_fail(reason):
    """Skip the test; in CI, where everything has to be there, fail it."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


@pytest.fixture(scope="session")
def cluster():
    """A running `SlurmCluster` for all tests."""
    if reason := why_unavailable():
        skip_or_fail(reason)
    with SlurmCluster() as running:
        yield running


@pytest.fixture
def slurm(cluster):
    """The cluster, without the jobs of earlier tests."""
    yield cluster
    cluster.end_jobs()


@pytest.fixture
def repo(tmp_path, monkeypatch):
    """A scratch repo: the job files, config.py and what it imports, a small config for each job, and the stand-in."""
    copy_repo(tmp_path, monkeypatch, ["config.py", "errors.py"])
    for script in ("train.py", "evaluate.py"):
        shutil.copy(Path(__file__).parent / "support" / "stand_in_train.py", tmp_path / script)
    (tmp_path / "configs").mkdir()
    for name in config_names():
        (tmp_path / "configs" / f"{name}.yaml").write_text(
            f"experiment: {name}\nmodel_name: none\ntask: vqa\ndata: {{train: none}}\nlearning_rate: 1\n"
            f"output_dir: outputs/{name}\nresults_dir: results/{name}\n"
        )
    return tmp_path


@pytest.fixture
def real_repo(tmp_path, monkeypatch):
    """A copy of the repo's scripts, job files and configs, to submit from."""
    copy_repo(tmp_path, monkeypatch, [path.name for path in REPO_ROOT.glob("*.py")])
    for name in ("configs", "merged", "prepare", "report", "tasks", "toy"):
        shutil.copytree(REPO_ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def copy_repo(folder, monkeypatch, scripts):
    if (Path(sys.prefix) / "bin" / "activate").exists():
        monkeypatch.setenv("VENV", sys.prefix)
    shutil.copytree(REPO_ROOT / "slurm", folder / "slurm", ignore=shutil.ignore_patterns("*.out", "*.err"))
    (folder / "slurm" / "logs").mkdir(exist_ok=True)
    for script in scripts:
        shutil.copy(REPO_ROOT / script, folder)


def config_names():
    """Every config that a job file names, as bash expands it."""
    names = set()
    for file in JOB_FILES:
        words = [word.strip("()") for word in file.read_text().replace("=", " ").split() if "configs/" in word]
        paths = subprocess.run(["bash", "-c", f"echo {' '.join(words)}"], capture_output=True, text=True).stdout.split()
        names |= {Path(path).stem for path in paths if path.endswith(".yaml")}
    return sorted(names)


def starts(repo, name):
    """What the stand-in noted at each start of a training."""
    path = repo / "outputs" / name / "starts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_start(job, name, count=1):
    job.wait_for(lambda: len(starts(job.repo, name)) >= count, f"has not started {name} {count} times")


# ---- the files


def test_job_files_are_small_and_name_nobody():
    for file in JOB_FILES:
        text = file.read_text()
        assert len(text.splitlines()) <= 25, file
        assert not any(word in text for word in ("/home", "mail-user", "#SBATCH --account", "#SBATCH --partition")), (
            file
        )


def array_task_runs(folder, task, *arguments):
    """What launch.sh adds to a run in an array's task: the key=value arguments."""
    (folder / "torchrun").write_text("#!/bin/sh\n")
    (folder / "torchrun").chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(REPO_ROOT), "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "job", "SLURM_JOB_NODELIST": "n",
           "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}", **task}  # fmt: skip
    command = 'source slurm/launch.sh; seed_of_task "$@"; echo "seeded: ${seeded[*]}"; trap - EXIT'
    done = subprocess.run(
        ["bash", "-c", command, "-", *arguments], env=job, cwd=REPO_ROOT, capture_output=True, text=True
    )
    return done.stdout.partition("seeded: ")[2].strip() + done.stderr


def test_a_task_of_an_array_trains_its_number_as_seed_in_folders_of_its_own(tmp_path):
    assert array_task_runs(tmp_path, {}, "configs/exp2.yaml") == ""
    task = {"SLURM_ARRAY_TASK_ID": "3"}
    assert array_task_runs(tmp_path, task, "configs/exp2.yaml", "results_dir=there") == (
        "seed=3 output_dir=outputs/exp2_seed3 results_dir=there_seed3"
    )
    assert "init_adapter=outputs/exp4_stage1_seed3" in array_task_runs(tmp_path, task, "configs/exp4_stage2.yaml")


def stop_again(folder, checkpoints, restarts):
    """What launch.sh does with a run in `folder` that was stopped once more: (code, what it remembers, printed)."""
    programs = folder / "programs"
    programs.mkdir(parents=True)
    for name, printed in (("torchrun", ""), ("squeue", "COMPLETING")):
        (programs / name).write_text(f"#!/bin/sh\necho {printed}\n")
        (programs / name).chmod(0o755)
    for step in checkpoints:
        (folder / f"checkpoint-{step}").mkdir()
    (folder / "restarts").write_text(restarts)
    job = {"SLURM_SUBMIT_DIR": str(folder), "SLURM_RESTART_COUNT": "3", "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "job",
           "SLURM_JOB_NODELIST": "node", "PATH": f"{programs}:{os.environ['PATH']}"}  # fmt: skip
    stop = f"source {REPO_ROOT}/slurm/launch.sh; leave_stopped {folder} train"
    done = subprocess.run(["bash", "-c", stop], env=job, capture_output=True, text=True)
    return done.returncode, (folder / "restarts").read_text().strip(), done.stdout + done.stderr


def test_a_run_that_gets_on_is_requeued_and_one_that_does_not_is_given_up(tmp_path):
    """Checkpoints are in the order of their steps: 1000 comes after 900."""
    code, remembered, printed = stop_again(tmp_path / "on", [900, 1000], "2 checkpoint-900")
    assert (code, remembered) == (75, "0 checkpoint-1000"), printed
    code, remembered, printed = stop_again(tmp_path / "stuck", [900, 1000], "2 checkpoint-1000")
    assert (code, remembered) == (1, "3 checkpoint-1000") and "stopped 3 times in a row" in printed


@pytest.mark.slurm
@pytest.mark.parametrize("file", JOB_FILES, ids=lambda file: file.stem)
def test_slurm_accepts_the_resources_of_every_job_file(slurm, file):
    slurm.call("sbatch", "--test-only", file, cwd=REPO_ROOT)


@pytest.mark.slurm
def test_the_learning_rate_experiments_are_submitted_together(slurm):
    script = REPO_ROOT / "slurm" / "submit_lr_experiment.sh"
    done = subprocess.run([script, "--test-only"], env=slurm.environment(), capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("to start at") == 2, done.stderr


# ---- one run


@pytest.mark.slow
@pytest.mark.slurm
def test_a_job_stopped_twice_goes_on_where_it_was_and_completes(slurm, repo):
    """The first signal comes while the run still loads and has no handler."""
    environment = {"STAND_IN_HOLDS": "2", "STAND_IN_LOADING_SECONDS": "2"}
    job = slurm.run_job("slurm/train_exp2_2gpu.slurm", "learning_rate=2", cwd=repo, environment=environment)
    job.wait_for_log("train configs/exp2.yaml learning_rate=2")
    job.preempt()
    job.wait_for_restart(1)
    wait_for_start(job, "exp2", 2)
    job.preempt()
    job.wait_for_restart(2)
    job.wait_for_state("COMPLETED")
    assert job.exit_code == 0 and job.restarts == 2
    steps = [start["step"] for start in starts(repo, "exp2")]
    assert len(steps) == 3 and steps == sorted(set(steps)), "each start goes on from the checkpoint of the one before"
    assert {start["WORLD_SIZE"] for start in starts(repo, "exp2")} == {"2"}
    assert (repo / "results/exp2/predict_results.json").exists()
    assert not (repo / "outputs/exp2/PREEMPTED").exists()
    story = job.log()
    order = [
        "restart 0",
        "stopped by a signal",
        "requeue",
        "restart 1",
        "requeue",
        "restart 2",
        "train configs/exp2.yaml: done",
    ]
    position = 0
    for line in [*order, "evaluate configs/exp2.yaml: done"]:
        position = story.index(line, position) + 1


@pytest.mark.slow
@pytest.mark.slurm
def test_a_signal_to_every_process_of_the_job_is_survived_by_torchrun(slurm, repo):
    """SIGUSR1 kills an unprotected torchrun, and the job ends before its workers have saved."""
    environment = {"STAND_IN_HOLDS": "1", "STAND_IN_SAVING_SECONDS": "2"}
    job = slurm.run_job("slurm/train_exp2_2gpu.slurm", cwd=repo, environment=environment)
    wait_for_start(job, "exp2")
    slurm.call("scancel", "--full", "--signal=USR1", job.id)
    job.wait_for_restart()
    job.wait_for_state("COMPLETED")


@pytest.mark.slow
@pytest.mark.slurm
def test_a_run_that_has_saved_but_does_not_end_is_ended(slurm, repo):
    launcher = repo / "slurm" / "launch.sh"
    assert "LEAVING_SECONDS=60 " in launcher.read_text()
    launcher.write_text(launcher.read_text().replace("LEAVING_SECONDS=60 ", "LEAVING_SECONDS=2 "))
    environment = {"STAND_IN_HOLDS": "1", "STAND_IN_LEAVING_SECONDS": "999"}
    job = slurm.run_job("slurm/train_exp2_2gpu.slurm", cwd=repo, environment=environment)
    wait_for_start(job, "exp2")
    job.preempt()
    job.wait_for_restart()


@pytest.mark.slow
@pytest.mark.slurm
def test_an_evaluation_that_is_stopped_is_repeated_without_training_again(slurm, repo):
    job = slurm.run_job("slurm/train_exp2_2gpu.slurm", cwd=repo, environment={"STAND_IN_EVALUATION_HOLDS": "1"})
    job.wait_for(lambda: (repo / "outputs/exp2/evaluations").exists(), "does not evaluate")
    job.preempt()
    job.wait_for_restart()
    job.wait_for_state("COMPLETED")
    assert [start["step"] for start in starts(repo, "exp2")] == [0, 8]


@pytest.mark.slow
@pytest.mark.slurm
def test_a_run_that_fails_is_not_requeued_and_fails_the_job(slurm, repo):
    (repo / "outputs/exp2").mkdir(parents=True)
    (repo / "outputs/exp2/PREEMPTED").touch()  # left by an earlier run
    job = slurm.run_job("slurm/train_exp2_2gpu.slurm", cwd=repo, environment={"STAND_IN_CRASH": "exp2"})
    job.wait_for_state("FAILED")
    assert job.exit_code == 1 and job.restarts == 0
    assert "train configs/exp2.yaml: FAILED with exit code 1" in job.log()
    assert not (repo / "results/exp2").exists()


@pytest.mark.slow
@pytest.mark.slurm
def test_a_mistake_in_an_override_fails_the_job_with_one_line(slurm, repo):
    job = slurm.run_job("slurm/train_exp2_2gpu.slurm", "learning_rat=2", cwd=repo)
    job.wait_for_state("FAILED")
    assert job.exit_code == 2
    assert "did you mean 'learning_rate'?" in job.log("StdErr")


@pytest.mark.slow
@pytest.mark.slurm
def test_a_cancelled_job_saves_and_stays_cancelled(slurm, repo):
    job = slurm.run_job("slurm/train_exp2_2gpu.slurm", cwd=repo, environment={"STAND_IN_HOLDS": "1"})
    wait_for_start(job, "exp2")
    slurm.call("scancel", job.id)
    job.wait_for_log("not requeued")
    slurm.wait_until(slurm.is_idle, "the node does not become idle")
    assert job.state == "CANCELLED" and job.restarts == 0
    assert (repo / "outputs/exp2/PREEMPTED").exists()


@pytest.mark.slow
@pytest.mark.slurm
def test_a_job_that_is_stopped_again_and_again_without_a_new_checkpoint_gives_up(slurm, repo):
    job = slurm.run_job("slurm/train_exp2_2gpu.slurm", cwd=repo, environment={"STAND_IN_STUCK": "1"})
    for start in (1, 2, 3):
        wait_for_start(job, "exp2", start)
        job.preempt()
        if start < 3:
            job.wait_for_restart(start)
    job.wait_for_state("FAILED")
    assert job.exit_code == 1 and job.restarts == 2
    assert "stopped 3 times in a row without a new checkpoint" in job.log()


@pytest.mark.slow
@pytest.mark.slurm
def test_two_nodes_train_as_one_run_and_save_when_told(slurm, repo):
    options = ("--partition=both", "--nodes=2", "--gres=gpu:1")
    environment = {"STAND_IN_HOLDS": "1", "STAND_IN_LOADING_SECONDS": "1"}
    job = slurm.run_job("slurm/train_exp2_2gpu.slurm", cwd=repo, options=options, environment=environment)
    wait_for_start(job, "exp2")
    job.preempt()
    job.wait_for_restart()
    job.wait_for_state("COMPLETED")
    assert [start["WORLD_SIZE"] for start in starts(repo, "exp2")] == ["2", "2"]
    assert starts(repo, "exp2")[1]["step"] > 0


# ---- several runs


@pytest.mark.slow
@pytest.mark.slurm
def test_a_stopped_task_of_an_array_is_requeued_alone_and_no_two_tasks_share_a_port(slurm, repo):
    (repo / "logs/lr_experiment_v7").mkdir(parents=True)
    array = slurm.run_job("slurm/lr_text.slurm", cwd=repo, environment={"STAND_IN_HOLDS": "9"})
    names = ("lr_text_2e5", "lr_text_2e6", "lr_text_2e5_backbone_2e6")
    for index, name in enumerate(names):
        wait_for_start(array.task(index), name)
    last = array.task(2)  # its plain job id is the array's
    last.preempt()
    last.wait_for_restart()
    wait_for_start(last, names[2], 2)
    assert [array.task(index).state for index in (0, 1)] == ["RUNNING", "RUNNING"]
    (repo / "release").touch()
    for index in range(3):
        array.task(index).wait_for_state("COMPLETED")
    assert [array.task(index).restarts for index in range(3)] == [0, 0, 1]
    first_starts = [starts(repo, name)[0] for name in names]
    for fact in ("MASTER_PORT", "CUDA_VISIBLE_DEVICES"):
        assert len({start[fact] for start in first_starts}) == 3, fact
    assert (repo / f"logs/lr_experiment_v7/{array.id}_0.out").exists()


@pytest.mark.slow
@pytest.mark.slurm
def test_four_chains_share_a_job_fail_alone_stop_together_and_go_on_where_they_were(slurm, repo):
    environment = {"STAND_IN_HOLDS": "1", "STAND_IN_CRASH": "exp3_stage2"}
    job = slurm.run_job("slurm/train_all_4gpu.slurm", cwd=repo, environment=environment)
    firsts = ("exp1", "exp2", "exp3_stage1", "exp4_stage1")
    for name in firsts:
        wait_for_start(job, name)
    assert [starts(repo, name)[0]["CUDA_VISIBLE_DEVICES"] for name in firsts] == ["0", "1", "2", "3"]
    job.preempt()
    job.wait_for_restart()
    (repo / "release").touch()
    job.wait_for_state("FAILED", seconds=120)
    summary = job.log().splitlines()[-5:]
    assert [f"GPU {index}: exit code {int(index == 2)}" in line for index, line in enumerate(summary[:4])] == [True] * 4
    assert "train configs/exp3_stage2.yaml: FAILED" in summary[2] and job.exit_code == 1
    assert not starts(repo, "exp3_stage3"), "a chain ends at its first failure"
    assert (repo / "results/exp4_stage3/predict_results.json").exists()

    evaluated = (repo / "results/exp1/predict_results.json").stat().st_mtime_ns
    again = slurm.run_job("slurm/train_all_4gpu.slurm", cwd=repo)
    again.wait_for_state("COMPLETED", seconds=120)
    assert (repo / "results/exp1/predict_results.json").stat().st_mtime_ns == evaluated, "evaluated once is enough"
    for name in ("exp3_stage2", "exp3_stage3"):
        assert (repo / f"results/{name}/predict_results.json").exists()


# ---- the real train.py and evaluate.py


@pytest.mark.slow
@pytest.mark.slurm
def test_exp2_preempted_twice_on_slurm_ends_with_the_adapter_of_an_undisturbed_job(slurm, real_repo, tiny_models):
    """And so does a job that starts from a checkpoint of another run, which a requeued one must not go back to."""
    write_samples(real_repo / "data")
    data = [f"data.{split}=data/samples.json" for split in ("train", "val", "test")]
    small = "image_size=64 train_bs=2 grad_accum=2 num_train_epochs=20 logging_steps=1 eval_steps= save_steps=1000"
    overrides = [f"model_name={tiny_models['qwen3_vl']}", *data, "data.image_root=data", "dataloader_num_workers=0"]
    overrides += small.split()

    def submit(name, *more):
        folders = (f"output_dir=outputs/{name}", f"results_dir=results/{name}")
        return slurm.run_job("slurm/train_exp2_2gpu.slurm", *overrides, *folders, *more, cwd=real_repo)

    def steps(name="disturbed"):
        return [row["step"] for row in log_rows(real_repo / "outputs" / name)]

    job = submit("disturbed")
    for restart, step in enumerate((4, 14), start=1):
        job.wait_for(lambda step=step: len(steps()) >= step, f"has not reached step {step}", seconds=120)
        job.preempt()
        job.wait_for_restart(restart)
    job.wait_for_state("COMPLETED", seconds=120)
    undisturbed = submit("undisturbed")
    undisturbed.wait_for_state("COMPLETED", seconds=120)
    assert steps() == list(range(1, 41)), "one history, no step twice"
    assert weights(real_repo / "outputs/disturbed") == weights(real_repo / "outputs/undisturbed")
    answers = [real_repo / "results" / name / "generated_predictions.jsonl" for name in ("disturbed", "undisturbed")]
    assert answers[0].read_text() == answers[1].read_text()

    start = min((real_repo / "outputs/disturbed").glob("checkpoint-*"), key=step_of)
    job = submit("branched", f"resume={start}")
    job.wait_for(lambda: len(steps("branched")) >= 4, "has not trained four steps", seconds=120)
    job.preempt()
    job.wait_for_restart(1)
    job.wait_for_state("COMPLETED", seconds=120)
    assert steps("branched") == list(range(step_of(start) + 1, 41)) and step_of(start) < 36
    resumed = [line.split()[2] for line in job.log().splitlines() if line.startswith("Resuming from ")]
    assert resumed[0] == f"{start}:" and resumed[1].startswith("outputs/branched/checkpoint-")
    assert weights(real_repo / "outputs/branched") == weights(real_repo / "outputs/undisturbed")
