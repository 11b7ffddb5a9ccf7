#!/bin/bash
# Trains on several nodes by Slurm: sbatch docs/launch/slurm.sh, in the checkout, with its .venv on a disk of all nodes.
# One process a node, which has all its GPUs. Before the time limit, and when Slurm preempts the job, all processes save
# and leave with 143; the job is then queued again and goes on from there.
#SBATCH --job-name=ldm_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 --wait=0 .venv/bin/python -m ldm_jax.train --config=configs/fashion_mnist_best.py \
    --workdir=runs/best --distributed
status=$?
if [ "$status" -eq 143 ]; then # stopped and saved; 0 is done, 2 wrong input, all else a failure
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
