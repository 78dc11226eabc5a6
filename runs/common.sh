# shellcheck shell=bash
# shellcheck disable=SC2034  # read by those who source this
# What the stages share: flags, hardware, running or printing a command, and the marks of finished stages.
# Sourced, never run. Works with bash 3.2 and BSD tools: no associative arrays, no mapfile, no GNU options.
set -euo pipefail

START_DIR=$PWD
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
READY=$VENV/.nanochat-ready
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
case $NANOCHAT_BASE_DIR in /*) ;; \~/*) NANOCHAT_BASE_DIR=$HOME/${NANOCHAT_BASE_DIR#??} ;; *) NANOCHAT_BASE_DIR=$START_DIR/$NANOCHAT_BASE_DIR ;; esac
WANDB_RUN=${WANDB_RUN:-dummy} # the name of the wandb run; dummy: no wandb
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
PYTHON=${NANOCHAT_PYTHON:-$VENV/bin/python}
# torchrun's own settings: pass SIGUSR1 on to the ranks, too, and leave them a minute to save.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 PET_SHUTDOWN_TIMEOUT=60

MODE=run # run | print (--dry-run) | key (what a mark remembers of a command)
PROFILE='' DEPTH='' HOURS='' REDO='' SERVE='' REHEARSE='' FROM='' ONLY='' RESUME=''
BACKGROUND='' FOREGROUND=''

trap 'exit 130' INT
trap 'exit 143' TERM

# ------------------------------------------------------------------------------------------------------------ words

say() { printf '%s\n' "$*"; }

die() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 1
}

bad_usage() {
  printf '%s: %s (see --help)\n' "$(basename "$0")" "$*" >&2
  exit 2
}

# The comment at the top of the script is its help.
help() {
  awk 'NR > 1 && /^# shellcheck/ { next } NR > 1 && /^#/ { sub(/^# ?/, ""); print; next } NR > 1 { exit }' "$1"
}

duration() { # seconds
  if [ "$1" -lt 120 ]; then say "$1 s"
  elif [ "$1" -lt 7200 ]; then say "$(($1 / 60)) min $(($1 % 60)) s"
  else say "$(($1 / 3600)) h $(($1 % 3600 / 60)) min"; fi
}

# ------------------------------------------------------------------------------------------------------------ flags

# Reads --profile, --depth, --dry-run, --redo and --help; with ALL_FLAGS=1 also --hours, --from, --only, --serve and
# --rehearse.
parse_flags() {
  local flag value
  while [ $# -gt 0 ]; do
    flag=$1 value=''
    case $flag in
      --*=*) value=${flag#*=} flag=${flag%%=*} ;;
      --profile | --depth | --hours | --from | --only)
        [ $# -ge 2 ] || bad_usage "$flag needs a value"
        value=$2
        shift
        ;;
    esac
    case $flag in
      --profile | --depth | --hours | --from | --only) [ -n "$value" ] || bad_usage "$flag needs a value" ;;
    esac
    case $flag in
      --profile) PROFILE=$value ;;
      --depth) DEPTH=$value ;;
      --dry-run) MODE=print ;;
      --redo) REDO=1 ;;
      --hours | --from | --only | --serve | --rehearse)
        [ -n "${ALL_FLAGS:-}" ] || bad_usage "$flag is for speedrun.sh"
        case $flag in
          --hours) HOURS=$value ;;
          --from) FROM=$value ;;
          --only) ONLY=$value ;;
          --serve) SERVE=1 ;;
          --rehearse) REHEARSE=1 ;;
        esac
        ;;
      -h | --help)
        help "$0"
        exit 0
        ;;
      *) bad_usage "unknown flag '$1'" ;;
    esac
    shift
  done
  case $PROFILE in
    '' | smoke | tiny | single | gpt2) ;;
    *) bad_usage "--profile is smoke, tiny, single or gpt2, not '$PROFILE'" ;;
  esac
  case $DEPTH in
    *[!0-9]* | 0*) bad_usage "--depth is a whole number from 1 on, not '$DEPTH'" ;;
  esac
  case $HOURS in
    '' | *[1-9]*) case $HOURS in *[!0-9.]* | *.*.*) bad_usage "--hours is a number of hours, not '$HOURS'" ;; esac ;;
    *) bad_usage "--hours is a number above 0, not '$HOURS'" ;;
  esac
  [ -z "$HOURS" ] || [ -z "$DEPTH" ] || bad_usage "--hours and --depth exclude each other"
  [ -z "$FROM" ] || [ -z "$ONLY" ] || bad_usage "--from and --only exclude each other"
  [ -z "$REHEARSE" ] || [ -z "$FROM$ONLY$SERVE" ] || bad_usage "--rehearse is of the whole speedrun, without the page"
}

# --------------------------------------------------------------------------------------------------------- hardware

# Sets GPUS, GPU_NAME, GPU_GB (the smallest of them), CORES, MEMORY_GB and MACHINE, a description.
detect_hardware() {
  local list='' memory=0 visible
  GPUS=0 GPU_NAME='' GPU_GB=0
  if command -v nvidia-smi >/dev/null 2>&1; then
    list=$(nvidia-smi --query-gpu=memory.total,name --format=csv,noheader,nounits 2>/dev/null) || list=''
  fi
  case $list in
    [0-9]*)
      GPUS=$(printf '%s\n' "$list" | grep -c .)
      GPU_NAME=$(printf '%s\n' "$list" | sed -n '1s/^[^,]*, *//p')
      GPU_GB=$(($(printf '%s\n' "$list" | sort -n | sed -n '1s/,.*//p') / 1000))
      ;;
  esac
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ] && [ "$GPUS" -gt 0 ]; then
    case $CUDA_VISIBLE_DEVICES in
      '' | -*) GPUS=0 ;;
      *)
        visible=$(printf '%s\n' "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | grep -c .)
        [ "$visible" -ge "$GPUS" ] || GPUS=$visible
        ;;
    esac
  fi
  CORES=$(getconf _NPROCESSORS_ONLN 2>/dev/null || say 1)
  if [ -r /proc/meminfo ]; then
    memory=$(($(awk '/^MemTotal:/ { print $2 }' /proc/meminfo) / 1000000))
  elif command -v sysctl >/dev/null 2>&1; then
    memory=$(($(sysctl -n hw.memsize 2>/dev/null || say 0) / 1000000000))
  fi
  MEMORY_GB=$memory
  MACHINE="$(uname -s) $(uname -m), $CORES CPU cores, $MEMORY_GB GB of memory"
  if [ "$GPUS" -gt 0 ]; then MACHINE="$MACHINE, $GPUS x $GPU_NAME ($GPU_GB GB)"
  else MACHINE="$MACHINE, no NVIDIA GPU"; fi
}

# Has the CPU units for bfloat16 products? Training then takes half the time. (The same as in nanochat/runtime.py.)
multiplies_bfloat16() { grep -q -w -e avx512_bf16 -e amx_tile /proc/cpuinfo 2>/dev/null; }

# Free gigabytes where a folder is, or will be.
free_gb() {
  local folder=$1
  while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
  say $(($(df -Pk "$folder" | awk 'END { print $4 }') / 1000000))
}

# Reads the profile's settings. --dry-run assumes the profile's own machine (ASSUMED) where this one has no GPU.
load_profile() {
  detect_hardware
  ASSUMED=''
  PROFILE_WHY='as asked'
  if [ -z "$PROFILE" ]; then
    PROFILE_WHY='the default for this machine'
    if [ "$GPUS" -eq 0 ]; then PROFILE=tiny
    elif [ "$GPUS" -lt 8 ]; then PROFILE=single
    else PROFILE=gpt2; fi
  fi
  case $PROFILE in
    single | gpt2)
      if [ "$GPUS" -eq 0 ]; then
        [ "$MODE" = print ] ||
          die "profile $PROFILE needs an NVIDIA GPU and nvidia-smi shows none: use --profile tiny, or --dry-run to see the commands"
        case $PROFILE in
          gpt2) GPUS=8 GPU_GB=80 GPU_NAME='NVIDIA H100' ;;
          single) GPUS=1 GPU_GB=24 GPU_NAME='NVIDIA GeForce RTX 4090' ;;
        esac
        MACHINE="$MACHINE; the commands are for $GPUS x $GPU_NAME" ASSUMED=1
      fi
      # Batches are powers of two, so the processes are too.
      NPROC=1
      while [ $((NPROC * 2)) -le "$GPUS" ]; do NPROC=$((NPROC * 2)); done
      export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
      ;;
    *) NPROC=0 ;; # one process, on whatever device there is; torch takes every core
  esac
  # shellcheck source=runs/profiles.sh
  . "$ROOT/runs/profiles.sh"
}

# The stage whose model one chats with.
chat_source() { if [ -n "$RL_FLAGS" ]; then say rl; else say sft; fi; }

# --------------------------------------------------------------------------------------------------------- commands

# Prints a command as one would type it.
show() {
  local word line=''
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./=:,+@%-]*) word="'$(printf '%s' "$word" | sed "s/'/'\\\\''/g")'" ;;
    esac
    line="$line $word"
  done
  say "${line# }"
}

# A mark remembers what is computed, not by how many processes, nor under which wandb name.
key() {
  local word line=''
  for word in "$@"; do
    case $word in --run=* | --resume) ;; *) line="$line $word" ;; esac
  done
  say "${line# }"
}

# run COMMAND...: one command of a stage. `python` and `torchrun` are those of .venv.
run() {
  case $MODE in
    key) key "$@" ;;
    print) show "$@" ;;
    run)
      say "\$ $(show "$@")"
      execute "$@"
      ;;
  esac
}

# launch MODULE FLAGS...: on every GPU of the profile, or as one process.
launch() {
  local module=$1
  shift
  if [ "$NPROC" -gt 0 ] && [ "$MODE" != key ]; then
    run torchrun --standalone --nproc_per_node="$NPROC" -m "$module" -- "$@"
  else
    run python -m "$module" "$@"
  fi
}

# beside COMMAND...: runs while the stage goes on; `settle` waits for it. If it fails, the stage stops.
beside() {
  case $MODE in
    key) key "$@" ;;
    print) say "$(show "$@") &" ;;
    run)
      BESIDE_LOG=$STAGE_MARK.log
      say "\$ $(show "$@") &   # log: $BESIDE_LOG"
      executable "$@"
      "${ARGV[@]}" >"$BESIDE_LOG" 2>&1 &
      BACKGROUND=$!
      ;;
  esac
}

settle() {
  [ "$MODE" != print ] || say wait
  [ "$MODE" = run ] && [ -n "$BACKGROUND" ] || return 0
  local status=0
  wait "$BACKGROUND" || status=$?
  BACKGROUND=''
  [ "$status" -eq 0 ] ||
    die "the command in the background failed (exit $status): $(tail -n 1 "$BESIDE_LOG"); the rest is in $BESIDE_LOG"
}

executable() {
  case $1 in
    python) shift; ARGV=("$PYTHON" "$@") ;;
    torchrun) shift; ARGV=("$PYTHON" -m torch.distributed.run "$@") ;;
    *) ARGV=("$@") ;;
  esac
}

execute() {
  executable "$@"
  if [ -z "$BACKGROUND" ]; then
    "${ARGV[@]}"
    return
  fi
  # This command may be waiting for what the one in the background brings: watch both.
  "${ARGV[@]}" &
  FOREGROUND=$!
  while kill -0 "$FOREGROUND" 2>/dev/null; do
    if [ -n "$BACKGROUND" ] && ! kill -0 "$BACKGROUND" 2>/dev/null; then settle; fi
    sleep 1
  done
  local status=0
  wait "$FOREGROUND" || status=$?
  FOREGROUND=''
  return "$status"
}

# ------------------------------------------------------------------------------------------------------------ marks

# Data and tokenizer belong to a corpus, which models share; everything else to a model's tag.
mark_of() {
  case $1 in
    01_* | 02_*) say "$NANOCHAT_BASE_DIR/marks/corpus-$CORPUS/$1" ;;
    *) say "$NANOCHAT_BASE_DIR/marks/$TAG/$1" ;;
  esac
}

# What a finished or running stage is known by: its commands, and those behind what it stands on.
inputs() { # STAGE_BEFORE
  local before
  MODE=key
  commands
  [ -n "$1" ] || return 0
  before=$(mark_of "$1")
  if [ -f "$before" ]; then say "after $1 $(grep -v '^done ' "$before" | cksum)"
  else say "after $1, of which nothing is known"; fi
}

# Is the stage done, with these inputs, and was what it stands on not made anew since? (Corpora are made anew the same.)
is_done() { # INPUTS STAGE_BEFORE
  [ -f "$STAGE_MARK" ] || return 1
  [ "$(grep -v '^done ' "$STAGE_MARK")" = "$1" ] || return 1
  [ -z "$2" ] || [ "$STAGE" = 03_pretrain ] || ! [ "$(mark_of "$2")" -nt "$STAGE_MARK" ]
}

# What the finished stages of this model took, in seconds; nothing when none is finished.
seconds_spent() {
  local name
  for name in 01_data 02_tokenizer 03_pretrain 04_base_eval 05_sft 06_chat_eval 07_rl; do
    [ ! -f "$(mark_of "$name")" ] || cat "$(mark_of "$name")"
  done | awk '/^done / { n += $(NF - 1) } END { if (n) print n }'
}

on_exit() {
  local status=$?
  [ -z "$FOREGROUND" ] || kill "$FOREGROUND" 2>/dev/null || true
  [ -z "$BACKGROUND" ] || kill "$BACKGROUND" 2>/dev/null || true
  if [ "$status" -ne 0 ] && [ -n "${STAGE_BEGAN:-}" ]; then
    say "$STAGE: stopped (exit $status) after $(duration $(($(date +%s) - STAGE_BEGAN))); the same line goes on from here" >&2
  fi
}

# stage NAME STAGE_BEFORE FLAGS...: runs `commands` unless NAME is marked as done. STAGE_BEFORE names the stage whose
# result this one stands on, '' for none, and 'always' for a stage that leaves no mark. A script may define `why_not`:
# it succeeds, with one line, when the stage has nothing to do.
stage() {
  local before=$2 wanted
  STAGE=$1
  shift 2
  parse_flags "$@"
  load_profile
  if command -v why_not >/dev/null && why_not; then return; fi
  if [ "$MODE" = print ]; then
    commands
    return
  fi
  [ -x "$PYTHON" ] || die "there is no $PYTHON: run 'bash runs/00_setup.sh' first"
  if [ "$before" = always ]; then
    cd "$ROOT"
    commands
    return
  fi
  STAGE_MARK=$(mark_of "$STAGE")
  wanted=$(inputs "$before")
  if [ -z "$REDO" ] && is_done "$wanted" "$before"; then
    say "$STAGE: done (delete $STAGE_MARK or use --from to redo)"
    return
  fi
  # Interrupted in the same work: go on. Anything else begins anew.
  if [ ! -f "$STAGE_MARK" ] && [ -f "$STAGE_MARK.started" ] && [ "$(cat "$STAGE_MARK.started")" = "$wanted" ]; then
    RESUME=--resume
    say "$STAGE: goes on"
  fi
  mkdir -p "$(dirname "$STAGE_MARK")"
  rm -f "$STAGE_MARK"
  say "$wanted" >"$STAGE_MARK.started"
  STAGE_BEGAN=$(date +%s)
  trap on_exit EXIT
  cd "$ROOT"
  commands
  say "done $(date -u '+%Y-%m-%dT%H:%M:%SZ') in $(($(date +%s) - STAGE_BEGAN)) seconds" >>"$STAGE_MARK.started"
  mv "$STAGE_MARK.started" "$STAGE_MARK"
  say "$STAGE: $(duration $(($(date +%s) - STAGE_BEGAN)))"
}
