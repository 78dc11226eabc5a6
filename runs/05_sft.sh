#!/usr/bin/env bash
# 05 sft: teach the base model to chat, to use its tools, and who it is.
#   bash runs/05_sft.sh [--profile P] [--depth N] [--redo] [--dry-run]
# Environment: IDENTITY, a file that says who the model is, in lines of `key: value` (python dev/make_identity.py --show
# prints one). Without it: nanochat.
# shellcheck source=runs/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# shellcheck disable=SC2086  # flags are words
commands() {
  local talks='' stem
  if [ -n "$IDENTITY" ]; then
    stem=$(basename "$IDENTITY")
    talks=$NANOCHAT_BASE_DIR/task_data/identity_of_${stem%.*}.jsonl
    [ "$MODE" != key ] || cksum <"$IDENTITY" # a mark remembers what the description says, too
    run python dev/make_identity.py --about="$IDENTITY" --output="$talks" --force
  else
    case $SFT_FLAGS in *--mixture=default*) run python dev/make_identity.py ;; esac
  fi
  launch scripts.chat_sft $SFT_FLAGS ${talks:+"--identity=$talks"} --model-tag="$TAG" --run="$WANDB_RUN" $RESUME
}

stage 05_sft 03_pretrain "$@"
