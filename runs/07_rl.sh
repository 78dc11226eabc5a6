#!/usr/bin/env bash
# 07 rl: reinforcement learning, for the profiles that have RL_FLAGS.
#   bash runs/07_rl.sh [--profile P] [--depth N] [--redo] [--dry-run]
# shellcheck source=runs/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

why_not() {
  if [ ! -f "$ROOT/scripts/chat_rl.py" ]; then say "# 07_rl: no RL stage yet: skipped"
  elif [ -z "$RL_FLAGS" ]; then say "# 07_rl: off in profile $PROFILE: skipped"
  else return 1; fi
}

# shellcheck disable=SC2086  # flags are words
commands() {
  launch scripts.chat_rl $RL_FLAGS --model-tag="$TAG" --run="$WANDB_RUN"
}

stage 07_rl 05_sft "$@"
