"""The benchmarks run, their variants compute the same thing, and their arithmetic is that of the model's makers."""

import json
import re
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import REPO_ROOT, shared_data
from support.forked import start_forked

sys.path.insert(0, str(REPO_ROOT / "bench"))
import workload

from errors import UserError
from images import native_size


def run(*command: str) -> str:
    process = start_forked(*command)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed


def columns(output: str) -> dict[str, list[str]]:
    """First cell of a table's line -> the other cells."""
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in output.splitlines() if "| " in line]
    return {cells[0]: cells[1:] for cells in rows}


def test_speed_prints_a_table_in_which_all_variants_learn_the_same():
    output = run(
        *"bench/speed.py --size tiny --image-tokens 16 --questions-per-image 3 --images 1 --steps 1 --dropout 0".split()
    )
    table = columns(output)
    variants = {name: cells for name, cells in table.items() if name.startswith("(")}
    assert [name[:3] for name in variants] == ["(A)", "(B)", "(C)", "(D)"]
    losses = {round(float(cells[6]), 3) for cells in variants.values()}
    assert len(losses) == 1, losses
    assert all(float(cells[7]) < 1e-4 for name, cells in variants.items() if name[:3] != "(A)")
    assert float(re.search(r"Token ceiling (\S+),", output).group(1)) > 1


@pytest.mark.slow
def test_the_strong_baselines_run_beside_ours():
    options = (
        "--size tiny --image-tokens 16 --questions-per-image 3 --images 2 --steps 1 --variants ATKD --best-batch 4"
    )
    variants = {name[:3]: cells for name, cells in columns(run("bench/speed.py", *options.split())).items()}
    assert all(float(variants[name][0]) > 0 for name in ("(A)", "(T)", "(K)", "(D)")), variants
    assert variants["(K)"][7] == "–" and float(variants["(T)"][7]) < 1e-4


@pytest.mark.slow
def test_shared_gradients_of_a_qwen3_5_are_as_near_to_float64_as_those_of_sequences_of_their_own():
    """Of the whole model in float32: the worst tensor at most twice as far as with chunks of 64 or 48 tokens, all
    tensors together and the loss at most half as far again as with 64, and nothing else than rounding."""
    found = {name: [float(cell) for cell in cells[:4]] for name, cells in columns(run(
        *"bench/chunks.py --size tiny".split()
    )).items() if name == "shared" or name.startswith("alone")}  # fmt: skip
    loss, worst, median, every = found["shared"]
    alone, in_48 = found["alone, chunks of 64"], found["alone, chunks of 48"]
    assert worst <= 2 * max(alone[1], in_48[1]) and alone[1] != in_48[1]
    assert median <= 1.5 * alone[2] and every <= 1.5 * alone[3]
    assert max(loss, median, every) < 1e-5 and worst < 3e-4


@pytest.mark.slow
def test_the_gpu_check_runs_dry_on_a_cpu_and_a_failing_line_does_not_end_the_others(tmp_path):
    printed = run("bench/gpu_check.py", "--size", "tiny", "--out", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    verdicts = {line["name"]: line["verdict"] for line in found["lines"]}
    assert set(verdicts.values()) <= {"ok", "not measured"}, printed
    for name in ("attention: two_part", "compiled layers", "answers", "predicted: exp2's order"):
        assert verdicts[name] == "ok", printed
    assert len(columns(printed)) >= len(found["lines"])
    import gpu_check

    def fails(machine):
        raise RuntimeError("no such kernel")

    lines = gpu_check.run_checks(types.SimpleNamespace(on_gpu=False), [fails, lambda _: gpu_check.Line("next", "1")])
    assert [line.verdict for line in lines] == ["failed: no such kernel", "ok"]


@pytest.mark.parametrize(
    ("compiled", "verdict"), [((1.05, 1.0), "ok"), ((1.07, 1.0), "wrong"), ((1.05, float("nan")), "wrong")]
)
def test_compiled_layers_are_wrong_only_where_they_are_further_from_float32_than_uncompiled_ones(
    monkeypatch, compiled, verdict
):
    import gpu_check

    results = iter([(1.0, 1.0), (0.96, 1.0), compiled])  # loss and a gradient; in float32, uncompiled, compiled
    monkeypatch.setattr(
        gpu_check, "gradients", lambda *_: dict(zip(("loss", "weight"), torch.tensor(next(results)), strict=True))
    )
    machine = types.SimpleNamespace(
        on_gpu=False, batch=lambda *_: {}, four_layers=lambda: torch.nn.Linear(1, 1), loss=lambda **_: None
    )
    assert gpu_check.compiled_layers(machine).verdict == verdict


@pytest.mark.slow
def test_exp2_as_shipped_is_laid_out_as_with_a_train_bs_as_large_as_the_step():
    output = run(
        *"bench/speed.py --size tiny --image-tokens 16 --questions-per-image exp2 --steps 1 --dropout 0".split()
    )
    shipped, large = (cells for name, cells in columns(output).items() if name[:3] in ("(S)", "(L)"))
    assert shipped[6] == large[6] and shipped[7] == large[7], "loss and gradients"


@pytest.mark.slow
def test_the_simulations_of_compare_end_in_four_tables():
    printed = run("bench/simulations.py", "--comparisons", "3")
    assert printed.count("| --- |") >= 4 and "nan" not in printed


def test_the_layout_of_every_shipped_config_is_counted_from_drawn_rows_as_far_as_from_real_ones():
    table = columns(run("bench/layout.py"))
    sharing = {name: float(cells[0]) for name, cells in table.items() if len(cells) == 5 and cells[0][0].isdigit()}
    assert len(sharing) == 10
    assert sharing["exp2, 2 GPUs"] > 3 and sharing["exp3, exp4: stage 2"] > 4
    assert sharing["exp2 with order: images"] > 2 * sharing["exp2, 2 GPUs"]
    assert all(float(cell.rstrip("%")) > 96 for cell in table["64"])


def test_rows_without_a_column_are_an_error(tmp_path):
    (tmp_path / "other.csv").write_text("img_id,question\n1,2\n")
    with pytest.raises(UserError, match="columns source, question, answer, img_id"):
        workload.kvasir_samples(str(tmp_path / "other.csv"))


@pytest.mark.slow
def test_evaluation_speed_gives_generates_answers_token_for_token():
    output = run(*"bench/evaluation_speed.py --size tiny --image-tokens 16 --questions-per-image 3 --rounds 1".split())
    answers = [cells[-1] for name, cells in columns(output).items() if "one by one" in name or "together" in name]
    assert answers == ["6/6"] * 3


@pytest.mark.slow
def test_a_token_of_the_answers_copies_next_to_nothing_of_the_cache():
    """Counted at the 8B's shape: an eighth of its weights' bytes would be copied otherwise, for every token."""
    counted = columns(run(*"bench/evaluation_speed.py --count --size 8b --images 8".split()))
    (theirs, copied_there), (ours, copied) = counted["transformers'"], counted["ours"]
    (cast_anew, _) = counted["transformers', adapter cast in every layer"]
    assert float(copied_there) > 2 and float(copied) < 0.1 * float(copied_there)
    kernels = [int(number.replace(",", "")) for number in (ours, theirs, cast_anew)]
    assert kernels[0] <= kernels[1] < 2700 and kernels[2] > 1.15 * kernels[1]


@pytest.mark.slow
def test_two_processes_are_compared_with_one():
    output = run(*"bench/scaling.py --size tiny --image-tokens 16 --images 1 --rounds 1".split())
    assert re.search(r"median ratio of 1 rounds: \d+\.\d+", output)


@pytest.mark.slow
def test_a_setting_that_cannot_run_is_one_line():
    command = [sys.executable, "bench/speed.py", "--variants", "AZ"]
    finished = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 2 and finished.stderr.strip().splitlines()[-1].startswith("error: --variants AZ")
    assert "Traceback" not in finished.stderr


# --------------------------------------------------------------------------------------------------------- workload


def test_the_8bs_operations_are_those_of_its_architecture(tmp_path):
    """Counted by hand from its config.json: linear layers 27.8 GFLOP a token forward and backward; LoRA of rank 16 adds
    43.6M weights, each with a forward and two backward products. The last layer's MLP (151M, LoRA 0.8M) and the logits
    run at supervised positions only."""
    operations = workload.operations_of(workload.write_folder(tmp_path / "model", workload.EIGHT_B, None))
    last_mlp = 4 * 151e6 + 6 * 0.79e6
    assert operations.per_token == pytest.approx(27.8e9 + 6 * 43.6e6 - last_mlp, rel=1e-3)
    assert operations.per_position == pytest.approx(4 * 4096 * 151_936 + last_mlp, rel=1e-3)
    assert operations.per_pair == pytest.approx(3 * 0.59e6, rel=1e-3)
    assert operations.vision(576) == pytest.approx(2.75e12, rel=1e-3)
    assert operations.vision(2900) == pytest.approx(27.25e12, rel=1e-3)


def test_useful_operations_count_the_pairs_that_the_mask_lets_through(tmp_path):
    from attention import attention_mask

    operations = workload.operations_of(workload.write_folder(tmp_path / "model", workload.TINY, None))
    segments = torch.tensor([[0] * 7 + [1] * 3 + [2] * 5, [0] * 6 + [1] * 4 + [-1] * 5])
    real = (segments >= 0)[:, None, :, None]
    expected = int((attention_mask(segments) & real).sum()) * operations.per_pair
    expected += 25 * operations.per_token + 8 * operations.per_position + operations.vision(4)
    assert operations.useful([[7, 3, 5], [6, 4]], 8, [4]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("family", "size", "low", "high"),
    [
        ("qwen3_vl", "33m", 32e6, 34e6),
        ("qwen3_vl", "8b", 8.7e9, 8.8e9),
        ("qwen3_5", "33m", 34e6, 37e6),
        ("qwen3_5", "9b", 9.3e9, 9.5e9),
    ],
)
def test_the_models_have_the_size_they_are_named_by(tmp_path, family, size, low, high):
    folder = workload.write_folder(tmp_path / "model", workload.SIZES_OF[family][size], None, family)
    model = workload.build_base(folder, torch.device("meta"), 0)
    assert low < sum(parameter.numel() for parameter in model.parameters()) < high


def test_the_histogram_is_that_of_the_real_rows_and_a_step_has_its_mean():
    histogram = workload.REAL_HISTOGRAM
    assert (sum(histogram.values()), sum(k * n for k, n in histogram.items())) == (352, 3007)
    for images in (2, 4, 16):
        questions = workload.questions_of_step("real", histogram, images)
        assert sum(questions) / images == pytest.approx(3007 / 352, rel=0.02)
    assert workload.read_histogram(str(shared_data("kvasir/kvasir_vqa_3000.csv"))) == histogram


def test_a_histogram_without_the_column_is_an_error(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="column 'img_id'"):
        workload.read_histogram(str(tmp_path / "other.csv"))


@pytest.mark.parametrize("tokens", [16, 576, 2040, 2900])
def test_an_image_of_so_many_tokens_is_not_resized(tokens):
    width, height = workload.image_size(tokens, 32)
    assert width * height == tokens * 32 * 32 and native_size(width, height, 32, 64 * 64, 16_777_216) == (width, height)


def test_image_tokens_that_no_image_has_are_an_error():
    with pytest.raises(UserError, match="try 576"):
        workload.image_size(20164, 32)


@pytest.mark.slow
def test_two_ranks_start_from_a_cache_as_from_memory_and_in_the_same_order():
    rows = columns(run("bench/start.py", "--samples", "3000", "--form", "own", "--order", "images"))
    assert [rows[start][-1] for start in ("without a cache", "the first", "a resumed run")] == ["yes"] * 3


def table_of_needs() -> str:
    text = (REPO_ROOT / "BENCHMARKS.md").read_text(encoding="utf-8")
    return text.partition("## What the shipped configs need")[2].partition("\n## ")[0]


def test_every_shipped_config_stands_in_the_table_of_needs_with_its_model_and_the_gpus_of_its_job():
    import needs

    from config import load_config

    rows = {name: cells for names, cells in columns(table_of_needs()).items() for name in names.split(", ")}
    gpus_of_jobs = needs.gpus_of_jobs()
    assert rows.keys() - {"config", "---"} == gpus_of_jobs.keys()
    for name, wanted in gpus_of_jobs.items():
        model, gpus = rows[name][0].rsplit(", ", 1)
        assert model in load_config(REPO_ROOT / "configs" / f"{name}.yaml").model_name and int(gpus) == wanted, name
    assert gpus_of_jobs["exp2"] == 2, "its own job's, not those of the job that runs five experiments"


def test_every_config_of_the_repository_but_the_demos_has_a_job_file():
    import needs

    listed = subprocess.run(["git", "ls-files", "configs"], cwd=REPO_ROOT, capture_output=True, text=True, check=True)
    assert {Path(name).stem for name in listed.stdout.split()} - {"demo"} == needs.gpus_of_jobs().keys()


def test_a_users_own_config_and_a_kind_of_gpu_in_a_job_file_leave_the_table_of_needs_as_it_is(tmp_path, monkeypatch):
    import needs

    before = needs.shipped()
    for folder in ("configs", "slurm"):
        shutil.copytree(REPO_ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("logs"))
    shutil.copy(tmp_path / "configs/exp1.yaml", tmp_path / "configs/mine.yaml")  # as prepare_data.py vqa writes one
    job = tmp_path / "slurm/train_exp2_2gpu.slurm"
    job.write_text(job.read_text().replace("--gres=gpu:2", "--gres=gpu:a100:2"))
    monkeypatch.setattr(needs, "ROOT", tmp_path)
    assert needs.shipped() == before


def test_the_table_of_needs_is_of_the_configs_and_job_files_as_they_are(monkeypatch):
    """Where this fails: run bench/needs.py, and put what it prints into BENCHMARKS.md."""
    import needs

    def stamp():
        return f"<!-- counted from {' '.join(needs.shipped())} -->"

    assert stamp() in table_of_needs()
    load = needs.load_config
    for key, value in (("image_size", 512), ("learning_rate", 1e-6)):  # one that decides, one that does not
        monkeypatch.setattr(
            needs, "load_config", lambda path, key=key, value=value: replace(load(path), **{key: value})
        )
        assert (stamp() in table_of_needs()) == (key == "learning_rate")
    monkeypatch.setattr(needs, "load_config", load)
    gpus = needs.gpus_of_jobs() | {"exp1": 8}
    monkeypatch.setattr(needs, "gpus_of_jobs", lambda: gpus)
    assert stamp() not in table_of_needs()


@pytest.mark.slow
def test_needs_counts_a_shipped_config_for_a_stated_model(tiny_models):
    model = f"Qwen/Qwen3-VL-8B-Instruct={tiny_models['qwen3_vl']}"
    table = columns(run("bench/needs.py", "--only", "exp2", "click_rank32", "--model", model))
    for name, gpus in (("exp2", "2"), ("click_rank32", "8")):
        assert table[name][0] == f"Qwen3-VL-8B, {gpus}" and table[name][2] == "24 GB", table
    assert float(table["click_rank32"][4]) >= float(table["exp2"][4]), "twice the rank, twice the checkpoint"
