#!/usr/bin/env bash
#SBATCH --job-name=nanochat
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# One stage on several nodes of a Slurm cluster, from the repository's folder, which the nodes share:
#   sbatch runs/slurm.sh scripts.base_train --depth=24 --save-minutes=10 --keep=2
# Five minutes before its time is up the training saves and stops, and the job queues again to go on. NANOCHAT_BASE_DIR
# must be a folder that all nodes share; give other nodes or hours as sbatch --nodes=4 --time=...
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?sbatch sets it: run this file by sbatch}"
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export HEAD NODES="$SLURM_JOB_NUM_NODES" JOB="nanochat-$SLURM_JOB_ID"

stopping=''
trap 'stopping=1; kill -USR1 "$step"' USR1 # srun passes it to every node, torchrun to every rank

# srun does not take the number of CPUs from sbatch; a node that fails ends the step on all
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 bash runs/multinode.sh "$@" &
step=$!
status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do # the signal ended the waiting, not the step
  status=0
  wait "$step" || status=$?
done

if [ -n "$stopping" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
