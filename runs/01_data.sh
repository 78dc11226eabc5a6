#!/usr/bin/env bash
# 01 data: text on disk. The tinyworld corpus is generated; of ClimbMix the first 8 shards come now, which are enough
# for the tokenizer, and the others during the next stage.
#   bash runs/01_data.sh [--profile P] [--depth N] [--redo] [--dry-run]
# shellcheck source=runs/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# shellcheck disable=SC2086  # flags are words
commands() {
  case $CORPUS in
    tinyworld) run python -m nanochat.tinyworld $DATA_FLAGS ;;
    climbmix) run python -m nanochat.dataset -n 8 ;;
  esac
}

stage 01_data '' "$@"
