#!/usr/bin/env bash
# The tests: style, pytest (with shellcheck on the shell scripts), and the whole pipeline at its smallest. Sets up what is missing first.
#   bash runs/test.sh [PYTEST ARGUMENTS...]     with arguments, only pytest: bash runs/test.sh -k tokenizer
# shellcheck source=runs/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case ${1:-} in -h | --help) help "$0" && exit 0 ;; esac
bash "$ROOT/runs/00_setup.sh" --dev
cd "$ROOT"
if [ $# -gt 0 ]; then exec "$PYTHON" -m pytest "$@"; fi

SCRATCH=$(mktemp -d "${TMPDIR:-/tmp}/nanochat-test.XXXXXX")
trap 'rm -rf "$SCRATCH"' EXIT
SUMMARY='' FAILED=''

part() { # NAME COMMAND...
  local name=$1 began status=ok
  shift
  began=$(date +%s)
  printf '\n== %s\n' "$name"
  "$@" || status=FAILED
  [ "$status" = ok ] || FAILED="$FAILED, $name"
  SUMMARY="$SUMMARY$(printf '%-14s %-7s %s' "$name" "$status" "$(duration $(($(date +%s) - began)))")
"
}

pytest_all() {
  "$PYTHON" -m pytest -q --durations=10 2>&1 | tee "$SCRATCH/pytest.log"
}

smoke() {
  mkdir "$SCRATCH/work"
  (cd "$SCRATCH/work" && NANOCHAT_BASE_DIR="$SCRATCH/base" WANDB_RUN=dummy bash "$ROOT/speedrun.sh" --profile smoke)
}

part 'ruff check' "$PYTHON" -m ruff check .
part 'ruff format' "$PYTHON" -m ruff format --check .
part pytest pytest_all
part smoke smoke

printf '\n%s%s\n' "$SUMMARY" "$(tail -n 1 "$SCRATCH/pytest.log")"
[ -z "$FAILED" ] || die "failed: ${FAILED#, }"
