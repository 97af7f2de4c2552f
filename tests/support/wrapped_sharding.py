"""train.py with a fault planted, for tests: rank 1 finds its disk full when it saves FAULT_STEP, or is sent SIGUSR1 in
STOP_STEP, under a sharded model."""

import os
import signal

from torch.distributed.checkpoint import HuggingFaceStorageWriter

import train
from distributed import run_command

write_data, training_step = HuggingFaceStorageWriter.write_data, train.training_step


def write_or_fail(self, plan, planner):
    if os.environ["RANK"] == "1" and f"checkpoint-{os.environ.get('FAULT_STEP')}." in str(self.path):
        raise OSError(28, "No space left on device")
    return write_data(self, plan, planner)


def step_and_signal(run, *arguments):
    if os.environ["RANK"] == "1" and str(run.state.step + 1) == os.environ.get("STOP_STEP"):
        os.kill(os.getpid(), signal.SIGUSR1)
    return training_step(run, *arguments)


HuggingFaceStorageWriter.write_data, train.training_step = write_or_fail, step_and_signal
if __name__ == "__main__":
    run_command(train.main)
