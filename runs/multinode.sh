#!/usr/bin/env bash
# One stage on several nodes: the same line on each of them. They meet at the first and train as one; when one drops out
# or comes back, all begin again at the last checkpoint.
#   HEAD=node0 NODES=2 bash runs/multinode.sh scripts.base_train --depth=24 --save-minutes=5 --keep=2
# Environment: HEAD (the first node, by a name or address that the others reach), NODES (how many; 1:2 also trains on one
# of two while the other is away), PORT (on which they meet at HEAD; 29400), JOB (a name, the same on all; nanochat),
# RANKS (processes on this node; default one a GPU), RESTARTS (how often a node may begin again; 10).
# NANOCHAT_BASE_DIR must be a folder that all nodes share.
# shellcheck source=runs/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case ${1:-} in
  -h | --help) help "$0" && exit 0 ;;
  scripts.*) ;;
  *) bad_usage "the first word is the stage, such as scripts.base_train, not '${1:-}'" ;;
esac
[ -n "${HEAD:-}" ] || bad_usage "HEAD is not set: the first node, by a name or address that the others reach"
[ -n "${NODES:-}" ] || bad_usage "NODES is not set: how many nodes there are"

detect_hardware
STAGE_MODULE=$1
shift
for flag in "$@"; do
  case $flag in
    --resume-from-step*) bad_usage "every restart would go back to that step: start it once without this script and stop it with Ctrl-C in its first step, which sets the later checkpoints aside; then come back without the flag" ;;
  esac
done
if [ -z "${RANKS:-}" ]; then
  if [ "$GPUS" -gt 0 ]; then RANKS=$GPUS; else RANKS=1; fi
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Nodes that stayed would otherwise not tell one that comes back where to meet (torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
cd "$ROOT"
exec "$PYTHON" -m torch.distributed.run --nnodes="$NODES" --nproc-per-node="$RANKS" --rdzv-backend=c10d \
  --rdzv-endpoint="$HEAD:${PORT:-29400}" --rdzv-id="${JOB:-nanochat}" --max-restarts="${RESTARTS:-10}" \
  --rdzv-conf=join_timeout=86400,keep_alive_interval=2 \
  -m "$STAGE_MODULE" -- "$@" --resume
