#!/usr/bin/env bash
# A model of depth 12, for trying something out: minutes on 8 GPUs, an hour or so on one. Bits per byte all along, CORE at the end.
#   bash runs/quick.sh [FLAGS OF base_train...]        NAME=lr3 bash runs/quick.sh --matrix-lr=0.03
# Environment: NAME (what it is called; quick), DEPTHS (12), SEEDS (how often, with seeds 1 to N; 1), NPROC (processes; by
# the GPUs). Without a network: --core-metric-every=-1.
# Data: bash runs/01_data.sh --profile single and bash runs/02_tokenizer.sh --profile single, or --corpus and --vocab-size
# of your own. Killed at any moment, the same line goes on.
# shellcheck source=runs/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case ${1:-} in -h | --help) help "$0" && exit 0 ;; esac
[ -x "$PYTHON" ] || die "there is no $PYTHON: run 'bash runs/00_setup.sh' first"
cd "$ROOT"
exec "$PYTHON" -m scripts.sweep "${NAME:-quick}" --vary depth="${DEPTHS:-12}" --seeds "${SEEDS:-1}" ${NPROC:+--nproc="$NPROC"} -- \
  --core-metric-every=1000000 --sample-every=-1 "$@"
