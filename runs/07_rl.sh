#!/usr/bin/env bash
# 07 rl: let the chat model practise what it half knows, and examine it again; for the profiles that have RL_FLAGS.
#   bash runs/07_rl.sh [--profile P] [--depth N] [--redo] [--dry-run]
# shellcheck source=runs/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

why_not() {
  [ -z "$RL_FLAGS" ] && say "# 07_rl: off in profile $PROFILE: skipped (by hand, on GSM8K: $(MODE=print launch scripts.chat_rl --model-tag="$TAG"))"
}

# shellcheck disable=SC2086  # flags are words
commands() {
  launch scripts.chat_rl $RL_FLAGS --model-tag="$TAG" --run="$WANDB_RUN" $RESUME
  launch scripts.chat_eval -i rl ${CHAT_EVAL_TASKS:+-a "$CHAT_EVAL_TASKS"} -g "$TAG" $CHAT_EVAL_FLAGS
}

stage 07_rl 05_sft "$@"
