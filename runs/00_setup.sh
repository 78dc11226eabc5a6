#!/usr/bin/env bash
# 00 set-up: .venv with all that nanochat needs; by uv where there is one, else by venv and pip. A second run is instant.
#   bash runs/00_setup.sh [--dev] [--redo] [--dry-run]
#     --dev   what the tests need, too
# Without an NVIDIA GPU it takes a CPU build of torch, from a folder that pip's find-links names or from PyTorch's own
# index, and never gigabytes of CUDA libraries. With NANOCHAT_PYTHON set there is nothing to do.
# shellcheck source=runs/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

TORCH=2.13.0
CPU_INDEX=https://download.pytorch.org/whl/cpu
LOG=$VENV/setup.log

# The first Python that runs and is new enough. A name may be there without running, as pyenv's are.
find_python() {
  local name version seen=''
  for name in python3 python3.13 python3.12 python3.11 python3.10 python; do
    version=$("$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
    case $version in
      3.[0-9] | 2.*) seen="$seen $name=$version" ;;
      *) FOUND=$(command -v "$name") && return ;;
    esac
  done
  die "Python 3.10 or newer is needed; here is ${seen:- none}. Install one (Debian, Ubuntu: apt install python3 python3-venv; macOS: brew install python), or uv, which brings its own"
}

# install WHAT...: into .venv, showing what is long and keeping everything in the log.
install() {
  if [ -n "$UV" ]; then set -- "$UV" pip install --python "$VENV/bin/python" "$@"
  else set -- "$VENV/bin/python" -m pip install --disable-pip-version-check "$@"; fi
  PYTHONUNBUFFERED=1 "$@" 2>&1 </dev/null | tee "$LOG" | progress
}

progress() {
  local line
  while IFS= read -r line; do
    case $line in
      *.metadata*) ;;
      *Downloading* | *Installing* | *Building* | *Prepared* | *Retrying*)
        printf '  %.110s\n' "${line#"${line%%[! ]*}"}"
        ;;
    esac
  done
}

reason() { # the error that pip or uv ended with
  if grep -qiE 'connection|dns error|timed out|unreachable' "$LOG"; then printf 'no network? '; fi
  { grep 'ERROR: ' "$LOG" || grep -E 'error:|×|Because' "$LOG" || grep . "$LOG" || say 'no output'; } | tail -n 1 | sed 's/^ *//' | cut -c 1-300
}

# Folders that pip's settings name as find-links and that hold a CPU build.
wheel_folder() {
  local python folder wheel folders=${PIP_FIND_LINKS:-}
  for python in "$VENV/bin/python" "${FOUND:-python3}"; do
    folders="$folders $("$python" -m pip config get global.find-links 2>/dev/null || true)"
  done
  for folder in $folders; do
    folder=${folder#file://}
    for wheel in "$folder"/torch-"$TORCH"+cpu-*.whl "$folder"/torch-"$TORCH"%2Bcpu-*.whl; do
      [ ! -f "$wheel" ] || { say "$folder" && return; }
    done
  done
}

torch_is_there() {
  "$VENV/bin/python" - <<'PY' 2>/dev/null
from importlib.metadata import version
assert tuple(int(part) for part in version("torch").split("+")[0].split(".")[:2]) >= (2, 9)
PY
}

install_torch() {
  local folder patience=''
  if torch_is_there; then return; fi
  if [ "$(uname -s)" != Linux ] || [ "$GPUS" -gt 0 ]; then
    install "torch==$TORCH" || die "torch $TORCH could not be installed: $(reason)"
    return
  fi
  # Only a CPU build is called +cpu, so no other index can offer a CUDA one in its place.
  folder=$(wheel_folder)
  if [ -n "$folder" ] && install --no-index --no-deps --find-links "$folder" "torch==$TORCH+cpu"; then return; fi
  if [ -z "$UV" ]; then patience='--retries=1 --timeout=20'; fi
  # shellcheck disable=SC2086  # two words
  UV_HTTP_TIMEOUT=60 install $patience --no-deps --index-url "$CPU_INDEX" "torch==$TORCH+cpu" ||
    die "no CPU build of torch $TORCH for this Python: pip's find-links offers none and PyTorch's index gave none ($(reason)); set PIP_FIND_LINKS to a folder with one, or install torch into .venv by hand"
}

DEV='' arguments=''
for argument in "$@"; do
  if [ "$argument" = --dev ]; then DEV=1; else arguments="$arguments $argument"; fi
done
# shellcheck disable=SC2086  # words again
parse_flags $arguments

detect_hardware
EXTRAS=''
[ "$GPUS" -eq 0 ] || [ "$(uname -s)" != Linux ] || EXTRAS="$EXTRAS gpu"
[ "$WANDB_RUN" = dummy ] || EXTRAS="$EXTRAS wandb"
[ -z "$DEV" ] || EXTRAS="$EXTRAS dev"

if [ "$MODE" = print ]; then
  say "bash runs/00_setup.sh${DEV:+ --dev}"
  exit 0
fi
if [ -n "${NANOCHAT_PYTHON:-}" ]; then
  say "00_setup: NANOCHAT_PYTHON is set: $NANOCHAT_PYTHON is taken as it is"
  exit 0
fi

# Ready for this folder, this pyproject.toml and these extras?
wanted="$ROOT $(cksum <"$ROOT/pyproject.toml")"
if [ -z "$REDO" ] && [ -f "$READY" ] && [ "$(head -n 1 "$READY")" = "$wanted" ]; then
  missing=''
  for extra in $EXTRAS; do grep -qx "$extra" "$READY" || missing="$missing $extra"; done
  if [ -z "$missing" ]; then
    say "00_setup: done ($READY)"
    exit 0
  fi
fi

began=$(date +%s)
cd "$ROOT"
UV=$(command -v uv || true)
FOUND=''
if [ -n "$UV" ]; then
  FOUND=$( (find_python && say "$FOUND") 2>/dev/null || say 3.12) # uv fetches a Python where there is none
else
  find_python
  "$FOUND" -c 'import venv, ensurepip' 2>/dev/null ||
    die "$FOUND has no venv module: install it (Debian, Ubuntu: apt install python3-venv), or install uv"
fi

if [ "$GPUS" -gt 0 ]; then needed=12; else needed=3; fi
if [ ! -d "$VENV" ] && [ "$(free_gb "$ROOT")" -lt "$needed" ]; then
  die "the packages need $needed GB in $ROOT and $(free_gb "$ROOT") GB are free"
fi

# A venv that does not run, or came from another folder, is made anew.
if ! "$VENV/bin/python" -c 'import sys; assert sys.version_info >= (3, 10)' 2>/dev/null ||
  { [ -f "$READY" ] && [ "$(head -n 1 "$READY" | sed 's/ [0-9]* [0-9]*$//')" != "$ROOT" ]; }; then
  say "  making .venv with $FOUND"
  if [ -n "$UV" ]; then "$UV" venv --quiet --clear --python "$FOUND" "$VENV"
  else "$FOUND" -m venv --clear "$VENV"; fi || die "$FOUND could not make $VENV"
fi
rm -f "$READY"
[ -n "$UV" ] || "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$VENV/bin/python" -m ensurepip >/dev/null # made by uv

install_torch
install -e ".${DEV:+[dev]}" ||
  die "the packages could not be installed: $(reason); the rest is in $LOG"
for extra in $EXTRAS; do
  case $extra in
    gpu) what="flash-attn-4 could not be installed, attention goes through torch" ;;
    wandb) what="wandb could not be installed, the run goes on without it" ;;
    *) continue ;;
  esac
  install -e ".[$extra]" || say "00_setup: $what: $(reason)"
done
"$VENV/bin/python" -c 'import torch, nanochat' || die "the packages are installed but do not import; remove .venv and try again"

{ say "$wanted" && for extra in $EXTRAS; do say "$extra"; done; } >"$READY.new"
mv "$READY.new" "$READY"
if [ "$GPUS" -gt 0 ]; then
  "$VENV/bin/python" -m scripts.doctor || say '00_setup: something computes wrong numbers on this machine, see above (python -m scripts.doctor)'
fi
say "00_setup: $(duration $(($(date +%s) - began))), $("$VENV/bin/python" -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__)')"
