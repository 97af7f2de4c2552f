"""A run small enough for tests: a few drawn images with questions, a config, and ways to start and stop it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from support import configs
from support.forked import start_forked

REPO = Path(__file__).resolve().parents[2]


def write_samples(folder, images=3, questions=5):
    """Noise images, questions of differing length; returns the samples (also written as samples.json)."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    samples = []
    for image in range(images):
        pixels = generator.integers(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((120, 100)).save(folder / f"{image}.png")
        for number in range(questions):
            samples.append(
                {
                    "id": f"{image}-{number}",
                    "image": f"{image}.png",
                    "question": f"What colour is thing {number}?" + " Really?" * (number % 3),
                    "answer": ["red", "blue; green", "none"][(image + number) % 3],
                    "candidates": ["red", "blue", "green", "none"],
                    "stage": 1 + number % 3,
                    "multi_label": True,
                    "group": str(image),
                }
            )
    (folder / "samples.json").write_text(json.dumps(samples))
    return samples


def write_config(folder, model, output, **changes):
    """A config of the samples in `folder`; returns its path."""
    defaults = {
        "data": dict.fromkeys(("train", "val", "test"), str(folder / "samples.json")),
        "image_size": 64,
        "num_train_epochs": 4,
        "warmup_steps": 2,
        "order": "random",
        "logging_steps": 1,
        "save_steps": 4,
    }
    values = configs.config_values(folder, model, output, **{**defaults, **changes})
    return configs.write_values(folder / f"{Path(output).name}.yaml", values)


def log_rows(output, key="loss"):
    """Lines of log.jsonl that have the key."""
    path = Path(output) / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if key in row]


def history(output):
    """What of the log must be equal in equal runs: everything but times and memory."""
    return [
        (row["step"], row["epoch"], row["loss"], row["grad_norm"], row["learning_rate"]) for row in log_rows(output)
    ]


def order(output):
    return [json.loads(line) for line in (Path(output) / "order.jsonl").read_text().splitlines()]


def weights(output):
    return (Path(output) / "adapter_model.safetensors").read_bytes()


def start(config, *overrides, ranks=0, script="train.py", environment=None):
    """train.py in a process of its own; with ranks, under torchrun. `start_train` is faster where that is no matter."""
    launcher = [sys.executable]
    if ranks:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.Popen(
        [*launcher, str(script), "--config", str(config), *overrides],
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), **(environment or {})},
    )


def start_train(config, *overrides, ranks, script="train.py", environment=None):
    """As `start` with ranks, without torchrun and without the time that the imports take."""
    return start_forked(script, "--config", config, *overrides, ranks=ranks, environment=environment)


def finish(process, timeout=120):
    """(exit code, everything printed)."""
    text, _ = process.communicate(timeout=timeout)
    return process.returncode, text


def children(process):
    """Process ids of a torchrun's workers, in rank order."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    return sorted(int(pid) for pid in listed.stdout.split())


def wait_for_step(output, step, process, timeout=90):
    """Return once log.jsonl has reached a step of a run in another process."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        rows = []
        with contextlib.suppress(ValueError):  # its last line may be being written
            rows = log_rows(output)
        if rows and rows[-1]["step"] >= step:
            return
        assert process.poll() is None, f"the run ended before step {step}: {process.communicate()[0]}"
        time.sleep(0.02)
    raise AssertionError(f"step {step} not reached in {timeout} s")


def send(pid, number=signal.SIGUSR1):
    os.kill(pid, number)
