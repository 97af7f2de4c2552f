"""torchrun --nproc_per_node=2 train.py --config C.yaml [key=value ...]

Stands in for `train.py` and `evaluate.py`, under whose names it is copied into a scratch repo, where only the launcher
is tested: no model and no torch, and a step is a short pause. It keeps what the launcher relies on: checkpoint-N
folders, the marker PREEMPTED after SIGUSR1 or SIGTERM, exit codes, the final adapter, and that a complete run ends at
once.

Environment: STAND_IN_HOLDS=N: the first N starts stay at their second step until they are stopped or the file `release`
appears; STAND_IN_CRASH=NAME: a config whose name contains it raises; STAND_IN_STUCK=1: no step is ever finished;
STAND_IN_LOADING_SECONDS: how long a start takes before it listens to signals; STAND_IN_SAVING_SECONDS: how long a stop
takes; STAND_IN_LEAVING_SECONDS: how long the process lives on after it; STAND_IN_EVALUATION_HOLDS=N: the first N
evaluations never end.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

from config import load_config

TOTAL_STEPS = 8
FINAL = "adapter_model.safetensors"


def train(config, name):
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    first_rank = os.environ["RANK"] == "0"
    step = max((int(folder.name.split("-")[1]) for folder in output.glob("checkpoint-*")), default=0)
    time.sleep(float(os.environ.get("STAND_IN_LOADING_SECONDS", "0")))
    told = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, _: told.append(number))
    starts = note_start(output, step) if first_rank else 0
    crash = os.environ.get("STAND_IN_CRASH")
    assert not crash or crash not in name, "the stand-in was told to crash"
    stuck = "STAND_IN_STUCK" in os.environ
    held_at = step + 2 if starts <= int(os.environ.get("STAND_IN_HOLDS", "0")) else None
    while step < TOTAL_STEPS and not told:
        time.sleep(0.05)
        if not first_rank:  # the ranks stop and end together, whichever of them is told
            if (output / "PREEMPTED").exists() or (output / FINAL).exists():
                return
        elif not stuck and (step != held_at or Path("release").exists()):
            step += 1
    if told:
        print(f"stand-in: told {signal.Signals(told[0]).name} at step {step}", flush=True)
    if first_rank:
        time.sleep(float(os.environ.get("STAND_IN_SAVING_SECONDS", "0")))
        if not stuck:
            (output / f"checkpoint-{step}").mkdir(exist_ok=True)
        if step < TOTAL_STEPS:
            (output / "PREEMPTED").touch()
            time.sleep(float(os.environ.get("STAND_IN_LEAVING_SECONDS", "0")))
        elif not (output / FINAL).exists():
            (output / FINAL).write_text(f"{step} steps")
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Python's own end restores the default: to die of it


def note_start(output, step):
    """Add a line for the tests, which take it as: from now on it listens. Returns the number of starts so far."""
    environment = {key: os.environ.get(key, "") for key in ("WORLD_SIZE", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")}
    with open(output / "starts.jsonl", "a+") as file:
        file.write(json.dumps({"step": step, **environment}) + "\n")
        file.seek(0)
        return len(file.readlines())


def evaluate(config, name):
    if os.environ["RANK"] != "0":
        return
    with open(Path(config.output_dir) / "evaluations", "a+") as file:
        file.write("started\n")
        file.seek(0)
        starts = len(file.readlines())
    while starts <= int(os.environ.get("STAND_IN_EVALUATION_HOLDS", "0")):
        time.sleep(0.1)
    results = Path(config.results_dir)
    results.mkdir(parents=True, exist_ok=True)
    (results / "predict_results.json").write_text("{}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    job = evaluate if Path(sys.argv[0]).name == "evaluate.py" else train
    job(load_config(arguments.config, arguments.overrides), Path(arguments.config).stem)
