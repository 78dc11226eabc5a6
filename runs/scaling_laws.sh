#!/usr/bin/env bash
# Scaling laws: models of several depths, each trained for several budgets of FLOPs; then the best size and tokens at each
# budget, and how they grow. Killed at any moment, the same line goes on; what is done is skipped. Models are not kept.
#   bash runs/scaling_laws.sh [FLAGS OF base_train...]
# Environment: NAME (what it is called; scaling_laws), BUDGETS (1e18,2e18,5e18,1e19), DEPTHS (8,10,12,14,16,18,20), NPROC
# (processes; by the GPUs). Data: as for runs/quick.sh.
# shellcheck source=runs/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case ${1:-} in -h | --help) help "$0" && exit 0 ;; esac
[ -x "$PYTHON" ] || die "there is no $PYTHON: run 'bash runs/00_setup.sh' first"
cd "$ROOT"
exec "$PYTHON" -m scripts.sweep "${NAME:-scaling_laws}" --then fit --drop-models ${NPROC:+--nproc="$NPROC"} \
  --vary target-flops="${BUDGETS:-1e18,2e18,5e18,1e19}" --vary depth="${DEPTHS:-8,10,12,14,16,18,20}" -- \
  --eval-every=1000000 --core-metric-every=-1 --sample-every=-1 "$@"
