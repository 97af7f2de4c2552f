#!/bin/bash
# Submit the six learning-rate experiments; arguments are sbatch's:  slurm/submit_lr_experiment.sh [--account=NAME]
set -e
cd "$(dirname "$0")/.."
mkdir -p logs/lr_experiment_v7 # Slurm makes no folders for its logs
sbatch "$@" slurm/lr_text.slurm
sbatch "$@" slurm/lr_vision.slurm
