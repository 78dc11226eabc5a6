#!/usr/bin/env bash
# 08 report: one page of what was done and what came out, also as report.md in the folder that you are in.
#   bash runs/08_report.sh [--profile P] [--depth N] [--dry-run]
# shellcheck source=runs/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

commands() {
  cd "$START_DIR"
  spent=$(seconds_spent)
  run python -m nanochat.report generate --model-tag="$TAG" ${spent:+--seconds=$spent}
}

stage 08_report always "$@"
