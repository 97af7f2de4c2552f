"""train.py with a fault planted in its sharded checkpoints, for tests: rank 1 finds its disk full at FAULT_STEP."""

import os

from torch.distributed.checkpoint import HuggingFaceStorageWriter

import train
from distributed import run_command

write_data = HuggingFaceStorageWriter.write_data


def faulty(self, plan, planner):
    if os.environ["RANK"] == "1" and f"checkpoint-{os.environ['FAULT_STEP']}." in str(self.path):
        raise OSError(28, "No space left on device")
    return write_data(self, plan, planner)


HuggingFaceStorageWriter.write_data = faulty
if __name__ == "__main__":
    run_command(train.main)
