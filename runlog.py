"""What a run leaves to read: console lines, log.jsonl, order.jsonl and TensorBoard, without overlap on resume."""

import contextlib
import json
import os
import resource
import sys
import time
from pathlib import Path

import torch

from config import Config, to_yaml
from distributed import Ranks
from files import complete_json_lines, full_disk_is_said, write_text


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process: the GPU's, or on CPU the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


class RunLog:
    """Writes on the first rank only; calling it elsewhere does nothing, so callers need no rank gate."""

    def __init__(self, config: Config, ranks: Ranks, resumed_step: int, evaluation_due: bool = False):
        """Lines after `resumed_step` belong to steps that will be trained again, and scores of that step, where its
        evaluation is due, to one that will be repeated: they are dropped."""
        self.active = ranks.is_first
        self._tensorboard = None
        if not self.active:
            return
        output = Path(config.output_dir)
        self._log = _continue_lines(output / "log.jsonl", resumed_step, evaluation_due)
        self._order = _continue_lines(output / "order.jsonl", resumed_step)
        from torch.utils.tensorboard import SummaryWriter

        self._tensorboard = SummaryWriter(str(output / "runs"), purge_step=resumed_step + 1)
        if resumed_step == 0:
            self._tensorboard.add_text("config", f"```yaml\n{to_yaml(config)}```", 0)

    def say(self, text: str = "") -> None:
        if self.active:
            with contextlib.suppress(OSError):  # a terminal that is gone must not end the run
                print(text, flush=True)

    def record(self, values: dict, prefix: str) -> None:
        """One line in log.jsonl, and its numbers as TensorBoard curves `prefix/key` (eval_ keys: `eval/key`)."""
        if not self.active:
            return
        with full_disk_is_said(Path(self._log.name)):
            self._log.write(json.dumps(values) + "\n")
            self._log.flush()
            for key, value in values.items():
                if key not in ("step", "epoch") and isinstance(value, (int, float)):
                    self._tensorboard.add_scalar(f"{prefix}/{key.removeprefix('eval_')}", value, values["step"])
            self._tensorboard.flush()

    def order(self, trained: list) -> None:
        """Record which samples each step trained, in the plan's order, whichever rank did them.
        trained: [[step, [[place in the step, sample id], ...]], ...] of all ranks."""
        if not self.active:
            return
        by_step: dict = {}
        for step, places in trained:
            by_step.setdefault(step, []).extend(places)
        lines = ([step, [sample_id for _, sample_id in sorted(places)]] for step, places in sorted(by_step.items()))
        with full_disk_is_said(Path(self._order.name)):
            self._order.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            self._order.flush()

    def sample(self, number: int, images: list, text: str) -> None:
        """A training sample as the model sees it: images uint8 (height, width, 3), text with the label mask."""
        if self.active:
            for image in images:
                self._tensorboard.add_image(f"sample_{number}", image, 0, dataformats="HWC")
            self._tensorboard.add_text(f"sample_{number}", f"```\n{text}\n```", 0)

    def close(self) -> None:
        if self.active:
            self._log.close()
            self._order.close()
            self._tensorboard.close()


def _continue_lines(path: Path, resumed_step: int, evaluation_due: bool = False):
    """A file of JSON lines open for appending, after those that will be written again are dropped."""
    kept = []
    for entry in complete_json_lines(path):
        step = entry["step"] if isinstance(entry, dict) else entry[0]
        repeated = evaluation_due and step == resumed_step and "eval_loss" in entry
        if step <= resumed_step and not repeated:
            kept.append(json.dumps(entry, ensure_ascii=False) + "\n")
    write_text(path, "".join(kept))
    return open(path, "a", encoding="utf-8")


class Meter:
    """What the log says of an interval: the mean loss of its answer tokens, and rates over the time spent training."""

    def __init__(self, sums: dict[str, float]):
        """sums: those of an interval that began before the run was stopped; empty otherwise."""
        self.sums = sums or {"nll": 0, "answer_tokens": 0}
        self._reset()

    def _reset(self) -> None:
        self._steps = self._questions = self._tokens = 0
        self._waited = self._paused = 0.0
        self._started = time.perf_counter()

    def add(self, step: dict, questions: int) -> None:
        """step: what `training_step` returns."""
        if step["finite"]:
            self.sums["nll"] += step["nll"]
            self.sums["answer_tokens"] += step["answer_tokens"]
        self._steps += 1
        self._questions += questions
        self._tokens += step["tokens"]
        self._waited += step["waited"]

    @contextlib.contextmanager
    def paused(self):
        """Time that is not spent training: evaluating, saving."""
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    @property
    def has_loss(self) -> bool:
        return bool(self.sums["answer_tokens"])

    def interval(self) -> dict[str, float]:
        """Values for the log line, of the time since the last call, which starts the next interval."""
        seconds = time.perf_counter() - self._started - self._paused
        values = {
            "loss": self.sums["nll"] / self.sums["answer_tokens"],
            "seconds_per_step": seconds / self._steps,
            "qa_per_second": self._questions / seconds,
            "tokens_per_second": self._tokens / seconds,
            "data_share": self._waited / seconds,
        }
        self.sums = dict.fromkeys(self.sums, 0)
        self._reset()
        return values


def step_line(values: dict, total_steps: int, eta_seconds: float, counted: str) -> str:
    """The console line of an interval: the same columns each time, for `tail -f` and `grep`. counted: see `tasks`."""
    unit = "QA" if counted == "questions" else counted
    width = len(str(total_steps))
    return (
        f"step {values['step']:>{width}}/{total_steps} | epoch {values['epoch']:.2f} | loss {values['loss']:.4f} | "
        f"grad_norm {values['grad_norm']:.2f} | lr {values['learning_rate']:.2e} | "
        f"{values['seconds_per_step']:.2f} s/step | {values['qa_per_second']:.1f} {unit}/s | "
        f"data {values['data_share']:.0%} | mem {values['memory_gb']:.1f} GB | ETA {duration(eta_seconds)}"
    )


def git_commit() -> str:
    """The commit this code is at, with a mark where files differ from it; `unknown` outside a checkout."""
    import subprocess

    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return run.stdout.strip() or "unknown"


def on_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
