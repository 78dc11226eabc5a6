#!/usr/bin/env bash
# Scaling laws: models of several depths, each trained for several budgets of FLOPs; then the best size and tokens at each
# budget, and how they grow. Killed at any moment, the same line goes on; what is done is skipped. Models are not kept.
#   bash runs/scaling_laws.sh [FLAGS OF base_train...]
# Environment: NAME (of the sweep; scaling_laws), BUDGETS (1e18,2e18,5e18,1e19), DEPTHS (8,10,12,14,16,18,20). Data: as for
# runs/quick.sh.
# shellcheck source=runs/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case ${1:-} in -h | --help) help "$0" && exit 0 ;; esac
cd "$ROOT"
"$PYTHON" -m scripts.sweep "${NAME:-scaling_laws}" --drop-models \
  --vary target-flops="${BUDGETS:-1e18,2e18,5e18,1e19}" --vary depth="${DEPTHS:-8,10,12,14,16,18,20}" -- \
  --core-metric-every=-1 --sample-every=-1 "$@"
exec "$PYTHON" -m scripts.scaling fit "${NAME:-scaling_laws}"
