#!/usr/bin/env bash
# 04 base_eval: what the base model knows: CORE, bits per byte, samples; and what it makes of the chat tasks, before it
# has learned to chat.
#   bash runs/04_base_eval.sh [--profile P] [--depth N] [--redo] [--dry-run]
# shellcheck source=runs/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# shellcheck disable=SC2086  # flags are words
commands() {
  launch scripts.base_eval --eval=core,bpb,sample --bundle="$BUNDLE" --model-tag="$TAG" $BASE_EVAL_FLAGS
  launch scripts.chat_eval -i base -a "$BASE_CHAT_TASKS" -g "$TAG" $BASE_CHAT_FLAGS
}

stage 04_base_eval 03_pretrain "$@"
