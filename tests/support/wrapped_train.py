"""train.py with a fault planted, for tests: `FAULT=nan_on_rank_1` or `FAULT=slow_steps` in the environment."""

import os
import time

import model
import train
from distributed import run_command

fault = os.environ.get("FAULT", "")
forward = model.AnswerLoss.forward


calls = 0


def faulty(self, batch):
    global calls
    calls += 1
    loss = forward(self, batch)
    step = (calls + 1) // 2  # two micro-batches a step
    if fault == "nan_on_rank_1" and os.environ["RANK"] == "1" and step in (2, 5, 6, 7):
        return loss * float("nan")
    if fault == "slow_steps":
        time.sleep(0.1)
    return loss


model.AnswerLoss.forward = faulty
if __name__ == "__main__":
    run_command(train.main)
