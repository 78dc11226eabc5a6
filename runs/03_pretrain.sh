#!/usr/bin/env bash
# 03 pretrain: the base model.
#   bash runs/03_pretrain.sh [--profile P] [--depth N] [--redo] [--dry-run]
# shellcheck source=runs/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# shellcheck disable=SC2086  # flags are words
commands() {
  launch scripts.base_train $BASE_TRAIN_FLAGS --corpus="$CORPUS" --vocab-size="$VOCAB_SIZE" --model-tag="$TAG" --run="$WANDB_RUN" $RESUME
}

stage 03_pretrain 02_tokenizer "$@"
