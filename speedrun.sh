#!/usr/bin/env bash
# From raw text to a model that answers: runs the numbered stages in runs/, skips those that are done, goes on with one
# that was interrupted.
#   bash speedrun.sh [--profile smoke|tiny|single|gpt2] [--depth N | --hours H] [--from STAGE | --only STAGE] [--serve]
#                    [--rehearse | --dry-run]
#     --profile   without it: tiny where there is no NVIDIA GPU, single on 1 to 7 of them, gpt2 on 8
#     --depth N   layers, in place of the profile's
#     --hours H   the depth that takes at most so long in all, found by timing this machine (python -m scripts.plan)
#     --from S    do stage S and all after it anew; S is a number or a name: 03 or pretrain
#     --only S    do only stage S, anew
#     --serve     end with the chat page (stage 09)
#     --rehearse  first see that all of it works here: every stage in small, a kill, a resume; says how long each will take
#     --dry-run   print the commands; nothing runs, nothing needs to be installed (but for --hours)
# Environment: NANOCHAT_BASE_DIR (default ~/.cache/nanochat), WANDB_RUN (name of the wandb run; default: no wandb),
# SINGLE_HOURS (budget of profile single; default 4), NANOCHAT_PYTHON (use this Python instead of making .venv),
# IDENTITY (a file that says who the model is, in lines of `key: value`: python dev/make_identity.py --show prints one).
# shellcheck source=runs/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/runs/common.sh"

STAGES='00_setup 01_data 02_tokenizer 03_pretrain 04_base_eval 05_sft 06_chat_eval 07_rl 08_report 09_serve'

stage_named() { # 3, 03, pretrain or 03_pretrain
  local name
  for name in $STAGES; do
    case $1 in "$name" | "${name%%_*}" | "${name#*_}" | "${name#0}") say "$name" && return ;; esac
    [ "0$1" != "${name%%_*}" ] || { say "$name" && return; }
  done
  return 1
}

ALL_FLAGS=1 parse_flags "$@"
depth_asked=$DEPTH
if [ -n "$ONLY$FROM" ]; then
  first=$(stage_named "$ONLY$FROM") || bad_usage "no stage '$ONLY$FROM'; there are: $STAGES"
fi
load_profile

# Sets DEPTH to what HOURS allow. What was found once holds on, so that the same line goes on with the same model.
find_depth() {
  local kept=$NANOCHAT_BASE_DIR/marks/hours/$PROFILE-$HOURS asked found
  [ "$PROFILE" != smoke ] || bad_usage "--hours is for the profiles tiny, single and gpt2"
  # shellcheck disable=SC2086  # flags are words
  set -- --hours="$HOURS" --corpus="$CORPUS" --vocab-size="$VOCAB_SIZE" $PLAN_FLAGS
  if [ "$NPROC" -gt 0 ]; then set -- "$@" --gpus="$NPROC"
  elif [ "$GPUS" -gt 0 ]; then set -- "$@" --gpus=1; fi
  [ -z "$ASSUMED" ] || set -- "$@" --gpu="$GPU_NAME"
  asked="$*; $MACHINE"
  if [ -f "$kept" ] && [ "$(sed -n 1p "$kept")" = "$asked" ]; then
    DEPTH=$(sed -n 2p "$kept") HOURS_TEXT="as found before (delete $kept to find it anew)"
    return
  fi
  if [ -z "${NANOCHAT_PYTHON:-}" ] && { [ ! -x "$PYTHON" ] || [ ! -f "$READY" ]; }; then
    [ "$MODE" = run ] || die "--hours needs the planner, and $VENV is not ready: run 'bash runs/00_setup.sh' first"
    say "--hours needs the planner: set-up comes first"
    bash "$ROOT/runs/00_setup.sh"
  fi
  found=$("$PYTHON" -m scripts.plan --json "$@") || exit
  DEPTH=$(say "$found" | sed -n 's/^{"depth": \([0-9]*\)[,}].*/\1/p')
  [ -n "$DEPTH" ] || die "the planner named no depth: $found"
  HOURS_TEXT="by $(show python -m scripts.plan "$@")"
  [ "$MODE" = run ] || return 0
  mkdir -p "$(dirname "$kept")"
  printf '%s\n%s\n' "$asked" "$DEPTH" >"$kept"
}

if [ -n "$HOURS" ]; then
  find_depth
  why=$PROFILE_WHY
  load_profile
  PROFILE_WHY=$why
  TIME_TEXT="at most $HOURS hours, downloads aside: depth $DEPTH, $HOURS_TEXT"
  [ "$MODE" = run ] || say "# --hours $HOURS: depth $DEPTH, $HOURS_TEXT"
  depth_asked=$DEPTH
fi

chosen=''
for name in $STAGES; do
  case $name in 09_serve) [ -n "$SERVE" ] || [ "${first:-}" = 09_serve ] || continue ;; esac
  if [ -n "$ONLY" ]; then [ "$name" = "$first" ] || continue
  elif [ -n "$FROM" ]; then [ "$name" = "$first" ] || [ -n "$chosen" ] || continue; fi
  chosen="$chosen $name"
done

announce() {
  local packages=0.5
  [ "$GPUS" -eq 0 ] || packages=4
  say "profile   $PROFILE ($PROFILE_WHY) on $MACHINE"
  say "model     $MODEL_TEXT"
  say "download  Python packages into .venv (set-up, once; $packages GB); data: $DATA_TEXT"
  say "time      $TIME_TEXT"
  say "lands     in $NANOCHAT_BASE_DIR (up to $DISK_GB GB; $(free_gb "$NANOCHAT_BASE_DIR") GB free); the report also in $START_DIR/report.html"
}

chat_line() {
  local line=''
  [ "$START_DIR" = "$ROOT" ] || line="cd $(show "$ROOT") && "
  [ "$NANOCHAT_BASE_DIR" = "$HOME/.cache/nanochat" ] || line="${line}NANOCHAT_BASE_DIR=$(show "$NANOCHAT_BASE_DIR") "
  case $PYTHON in "$VENV"/*) line="$line.venv/bin/python" ;; *) line="$line$(show "$PYTHON")" ;; esac
  say "$line -m scripts.chat_cli -i $(chat_source) -g $TAG"
}

if [ "$MODE" = run ]; then
  announce
  case $chosen in
    *01_data* | *02_tokenizer*)
      [ -d "$NANOCHAT_BASE_DIR/marks/$TAG" ] || [ "$(free_gb "$NANOCHAT_BASE_DIR")" -ge "$DISK_GB" ] ||
        die "profile $PROFILE needs $DISK_GB GB in $NANOCHAT_BASE_DIR; $(free_gb "$NANOCHAT_BASE_DIR") GB are free: set NANOCHAT_BASE_DIR to a larger disk, or choose a smaller --depth or --profile"
      ;;
  esac
fi

if [ -n "$REHEARSE" ]; then
  if [ "$MODE" = run ]; then
    printf '\n[00] setup\n'
    (cd "$START_DIR" && bash "$ROOT/runs/00_setup.sh")
    printf '\n'
  fi
  cd "$ROOT"
  run python -m scripts.rehearse --profile="$PROFILE" ${depth_asked:+--depth="$depth_asked"}
  exit
fi

began=$(date +%s)
redo='' dry=''
[ -z "$FROM$ONLY" ] || redo=--redo
[ "$MODE" = run ] || dry=--dry-run
for name in $chosen; do
  [ "$MODE" != run ] || printf '\n[%s] %s\n' "${name%%_*}" "${name#*_}"
  if [ "$name" = 00_setup ]; then
    set -- ${redo:+"$redo"} ${dry:+"$dry"}
  else
    set -- --profile="$PROFILE" ${depth_asked:+--depth="$depth_asked"} ${redo:+"$redo"} ${dry:+"$dry"}
  fi
  (cd "$START_DIR" && bash "$ROOT/runs/$name.sh" "$@")
done

if [ "$MODE" = run ]; then
  printf '\ndone in %s\n' "$(duration $(($(date +%s) - began)))"
  [ ! -f "$START_DIR/report.html" ] || say "report: $START_DIR/report.html (and report.md)"
  say "chat:   $(chat_line)"
fi
