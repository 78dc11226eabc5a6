#!/usr/bin/env bash
# 05 sft: teach the base model to chat and to use its tools.
#   bash runs/05_sft.sh [--profile P] [--depth N] [--redo] [--dry-run]
# shellcheck source=runs/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# shellcheck disable=SC2086  # flags are words
commands() {
  launch scripts.chat_sft $SFT_FLAGS --model-tag="$TAG" --run="$WANDB_RUN" $RESUME
}

stage 05_sft 03_pretrain "$@"
