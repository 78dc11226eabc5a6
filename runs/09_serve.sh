#!/usr/bin/env bash
# 09 serve: the chat page, until Ctrl-C.
#   bash runs/09_serve.sh [--profile P] [--depth N] [--dry-run]
# shellcheck source=runs/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

commands() {
  run python -m scripts.chat_web -i "$(chat_source)" -g "$TAG"
}

stage 09_serve always "$@"
