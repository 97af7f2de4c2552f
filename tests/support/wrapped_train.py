"""train.py with a fault planted, for tests: `FAULT=nan_on_rank_1`, `FAULT=slow_steps` or `FAULT=slow_save` (of more
than 30 s) in the environment."""

import os
import time

import torch

import checkpoint
import model
import train
from distributed import run_command

fault = os.environ.get("FAULT", "")
forward = model.AnswerLoss.forward


def faulty(self, batch):
    loss = forward(self, batch)
    step = torch.initial_seed() // 4_099 - 42 * 1_000_003 + 1  # dropout is seeded from (seed, step, rank)
    if fault == "nan_on_rank_1" and os.environ["RANK"] == "1" and step in (2, 5, 6, 7):
        return loss * float("nan")
    if fault == "slow_steps":
        time.sleep(0.1)
    return loss


save_adapter = checkpoint.save_adapter


def slow_save(*arguments):
    time.sleep(33)
    save_adapter(*arguments)


model.AnswerLoss.forward = faulty
if fault == "slow_save":
    checkpoint.save_adapter = slow_save
if __name__ == "__main__":
    run_command(train.main)
