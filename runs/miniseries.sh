#!/usr/bin/env bash
# The miniseries: a model of each depth, all as their depth says, and what they say of those that are deeper. Killed at any
# moment, the same line goes on; what is done is skipped.
#   bash runs/miniseries.sh [FLAGS OF base_train...]
# Environment: NAME (what it is called; miniseries), DEPTHS (12,14,16,18,20,22,24,26), NPROC (processes; by the GPUs).
# Data: as for runs/quick.sh. Without a network: --core-metric-every=-1.
# shellcheck source=runs/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case ${1:-} in -h | --help) help "$0" && exit 0 ;; esac
[ -x "$PYTHON" ] || die "there is no $PYTHON: run 'bash runs/00_setup.sh' first"
cd "$ROOT"
exec "$PYTHON" -m scripts.sweep "${NAME:-miniseries}" --then series ${NPROC:+--nproc="$NPROC"} \
  --vary depth="${DEPTHS:-12,14,16,18,20,22,24,26}" -- \
  --core-metric-every=1000000 --core-metric-max-per-task=-1 --sample-every=-1 "$@"
