#!/usr/bin/env bash
# 06 chat_eval: examine the chat model.
#   bash runs/06_chat_eval.sh [--profile P] [--depth N] [--redo] [--dry-run]
# shellcheck source=runs/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# shellcheck disable=SC2086  # flags are words
commands() {
  launch scripts.chat_eval -i sft ${CHAT_EVAL_TASKS:+-a "$CHAT_EVAL_TASKS"} -g "$TAG" $CHAT_EVAL_FLAGS
}

stage 06_chat_eval 05_sft "$@"
