#!/usr/bin/env bash
# 02 tokenizer: train it, turn the corpus into tokens, measure its compression. Of ClimbMix the remaining shards are
# downloaded meanwhile, and tokenized as they arrive.
#   bash runs/02_tokenizer.sh [--profile P] [--depth N] [--redo] [--dry-run]
# shellcheck source=runs/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# shellcheck disable=SC2086  # flags are words
commands() {
  local tokenizer="--corpus=$CORPUS --vocab-size=$VOCAB_SIZE"
  [ -z "$SHARDS" ] || beside python -m nanochat.dataset -n "$SHARDS"
  run python -m scripts.tok_train $tokenizer $TOK_TRAIN_FLAGS
  run python -m nanochat.dataset tokenize $tokenizer ${SHARDS:+-n $SHARDS --wait}
  [ -z "$SHARDS" ] || settle
  run python -m scripts.tok_eval $tokenizer
}

stage 02_tokenizer 01_data "$@"
