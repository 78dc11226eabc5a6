# shellcheck shell=bash
# shellcheck disable=SC2034  # read by the stages
# The settings of every profile, in one place. Sourced by common.sh, which has set PROFILE, DEPTH (may be empty: then
# the profile's own), NPROC (processes under torchrun; 0: one process without it), GPUS, GPU_NAME and GPU_GB.
# PLAN_FLAGS: those by which scripts.plan finds the depth for --hours.

SHARDS=''

# `single`: what one speedrun costs, by depth. Work in 10^15 FLOP (pretraining at the default 10.5 tokens a parameter,
# and 250 steps of SFT); GB of weights, gradients and optimizer state; MB of activations for one row of 2,048 tokens;
# ClimbMix shards read. The planner computes the same (tests/test_plan.py); this is for when it is not installed yet.
single_costs() {
  cat <<'TABLE'
8     150   2   600  16
10    430   3   750  26
12    980   5   900  40
14   2090   6  1150  58
16   4120   9  1450  80
18   8000  12  1750 110
20  13900  15  2100 145
22  23500  19  2500 190
24  37800  23  2950 245
26  59300  28  3400 320
28  89900  33  3900 385
30 133400  39  4450 470
32 195000  46  5000 560
TABLE
}

# Achieved bf16 TFLOP/s, about 45 % of the peak in the data sheet. An unknown card is taken for a small one.
gpu_tflops() {
  case $1 in
    *B300* | *B200* | *B100*) say 900 ;;
    *H200* | *H100* | *H800*) say 400 ;;
    *A100* | *A800*) say 150 ;;
    *L40S*) say 130 ;;
    *5090*) say 95 ;;
    *4090* | *A6000* | *6000*Ada* | *L40* | *A40*) say 70 ;;
    *5080* | *4080* | *A10*) say 45 ;;
    *3090* | *5070* | *4070* | *L4*) say 32 ;;
    *) say 20 ;;
  esac
}

# Sets ROW_* to the costs at DEPTH; the last row stands for anything deeper. Minutes: 15 for everything else.
costs_at() { # depth
  local depth work weights row shards
  while read -r depth work weights row shards; do
    ROW_DEPTH=$depth ROW_WEIGHTS=$weights ROW_MB=$row ROW_SHARDS=$shards
    ROW_MINUTES=$((15 + work * 1000 / ($(gpu_tflops "$GPU_NAME") * NPROC) / 60))
    [ "$depth" -lt "$1" ] || break
  done <<TABLE
$(single_costs)
TABLE
}

case ${SINGLE_HOURS:=4} in *[!0-9]* | 0*) die "SINGLE_HOURS is a whole number of hours, not '$SINGLE_HOURS'" ;; esac

# A description of the model in your words (dev/make_identity.py --show is one); stages run elsewhere, so in full.
case ${IDENTITY:=} in '' | /*) ;; *) IDENTITY=$START_DIR/$IDENTITY ;; esac
[ -z "$IDENTITY" ] || [ -f "$IDENTITY" ] || die "IDENTITY names $IDENTITY: there is no such file"

# The deepest model that fits the memory (four rows at a time, 2 GB to spare) and SINGLE_HOURS.
single_depth() {
  local depth chosen=8
  for depth in 8 10 12 14 16 18 20 22 24 26; do
    costs_at "$depth"
    [ "$ROW_MINUTES" -gt $((SINGLE_HOURS * 66)) ] || [ $((ROW_WEIGHTS + 2 + ROW_MB * 4 / 1000)) -gt "$GPU_GB" ] || chosen=$depth
  done
  say "$chosen"
}

# Rows of 2,048 tokens that fit beside the weights: a power of two, 32 at most.
single_rows() {
  local rows=1
  while [ $((rows * 2)) -le 32 ] && [ $((ROW_WEIGHTS + 2 + ROW_MB * rows * 2 / 1000)) -le "$GPU_GB" ]; do rows=$((rows * 2)); done
  say "$rows"
}

case $PROFILE in
  smoke) # every stage once, about a minute on two cores: what CI runs
    TAG=smoke${DEPTH:+-d$DEPTH}
    DEPTH=${DEPTH:-2}
    CORPUS=tinyworld
    VOCAB_SIZE=1024
    BUNDLE=eval_bundle_tinyworld
    DATA_FLAGS="--megabytes=1"
    TOK_TRAIN_FLAGS=""
    PLAN_FLAGS="--aspect-ratio=32 --head-dim=32 --max-seq-len=128 --device-batch-size=8 --total-batch-size=1024 --num-iterations=20"
    BASE_TRAIN_FLAGS="--depth=$DEPTH $PLAN_FLAGS --warmup-steps=4 --no-scaling --momentum-ramp-steps=10 --eval-every=20 --eval-tokens=4096 --core-metric-every=-1 --sample-every=-1"
    BASE_EVAL_FLAGS="--max-per-task=4 --device-batch-size=8 --split-tokens=4096"
    BASE_CHAT_TASKS=tinyworld
    BASE_CHAT_FLAGS="--max-problems=4 --max-new-tokens=16"
    SFT_FLAGS="--mixture=tiny --num-iterations=10 --device-batch-size=8 --total-batch-size=1024 --eval-every=10 --eval-tokens=4096 --chatcore-every=-1"
    CHAT_EVAL_TASKS=tinyworld
    CHAT_EVAL_FLAGS="--max-problems=4 --max-new-tokens=32"
    RL_FLAGS="--task=tiny --num-iterations=2 --examples-per-step=4 --num-samples=2 --max-new-tokens=16 --eval-every=2 --eval-examples=4 --eval-samples=2"
    DATA_TEXT="none: the tinyworld corpus (1 MB of text) is generated here"
    TIME_TEXT="about a minute on two CPU cores"
    DISK_GB=1
    ;;

  tiny) # a small model of a small closed world: minutes on two CPU cores, without a network
    TAG=tiny${DEPTH:+-d$DEPTH}
    DEPTH=${DEPTH:-6}
    CORPUS=tinyworld
    VOCAB_SIZE=4096
    BUNDLE=eval_bundle_tinyworld
    DATA_FLAGS="--megabytes=19"
    TOK_TRAIN_FLAGS=""
    # What two cores do in about a quarter of an hour, SFT, RL and examinations included.
    TINY_STEPS=2500 TIME_TEXT="about 12 minutes on two CPU cores"
    if [ "$GPUS" -eq 0 ] && ! multiplies_bfloat16; then
      TINY_STEPS=1300 TIME_TEXT="about 17 minutes on two CPU cores without units for bfloat16"
    fi
    # The rule of the depth would take hours on two cores, so batch, horizon, rates, decay and momentum ramp are stated.
    PLAN_FLAGS="--aspect-ratio=32 --head-dim=64 --max-seq-len=256 --window-pattern=L --device-batch-size=8 --total-batch-size=2048 --compile=1 --num-iterations=$TINY_STEPS"
    BASE_TRAIN_FLAGS="--depth=$DEPTH $PLAN_FLAGS --in-order --no-scaling --scalar-lr=0.02 --smear-init=2 --smear-lr=0.01 --weight-decay=0.05 --warmup-steps=30 --momentum-ramp-steps=300 --eval-every=400 --save-every=400 --keep=2 --eval-tokens=65536 --core-metric-every=-1 --sample-every=-1"
    BASE_EVAL_FLAGS="--device-batch-size=16 --split-tokens=131072"
    BASE_CHAT_TASKS=tinyworld
    BASE_CHAT_FLAGS="--batch-size=64 --max-new-tokens=32 --max-problems=100"
    SFT_FLAGS="--mixture=tiny --init-lr-frac=0.4 --scalar-lr=0.02 --smear-lr=0.01 --device-batch-size=8 --total-batch-size=4096 --compile=1 --eval-every=50 --eval-tokens=32768 --save-every=100 --keep=2 --chatcore-every=-1"
    CHAT_EVAL_TASKS=tinyworld
    CHAT_EVAL_FLAGS="--batch-size=64 --max-new-tokens=64"
    RL_FLAGS="--task=tiny --num-iterations=90 --examples-per-step=32 --num-samples=8 --max-new-tokens=32 --device-batch-size=64 --init-lr-frac=0.1 --scalar-lr=0.02 --smear-lr=0.01 --eval-every=45 --eval-examples=200 --save-every=30 --keep=2"
    DATA_TEXT="none: the tinyworld corpus (19 MB of text) is generated here"
    DISK_GB=1
    ;;

  single) # one to seven GPUs: the depth that memory and a budget of hours (SINGLE_HOURS, 4 by default) allow
    DEPTH=${DEPTH:-$(single_depth)}
    costs_at "$DEPTH"
    TAG=d$DEPTH
    CORPUS=climbmix
    VOCAB_SIZE=32768
    SHARDS=$ROW_SHARDS
    BUNDLE=eval_bundle
    DATA_FLAGS=""
    TOK_TRAIN_FLAGS="--num-files=8"
    PLAN_FLAGS="--target-param-data-ratio=10.5" # base_train's own, on however many GPUs
    BASE_TRAIN_FLAGS="--depth=$DEPTH --num-files=$SHARDS --save-minutes=10 --keep=2"
    BASE_EVAL_FLAGS="--device-batch-size=$(single_rows)"
    BASE_CHAT_TASKS="ARC-Easy|ARC-Challenge|MMLU" # what takes one look; it does not write answers yet
    BASE_CHAT_FLAGS=""
    # A part of the mixture: all of it would add half of the time of pretraining.
    SFT_FLAGS="--mixture=default --num-iterations=250 --save-minutes=10 --keep=2"
    CHAT_EVAL_TASKS=""
    CHAT_EVAL_FLAGS=""
    RL_FLAGS=""
    TIME_TEXT="pretraining and the rest about $(duration $((ROW_MINUTES * 60))) (an estimate from the card's name), downloads aside"
    DISK_GB=$((SHARDS * 2 / 10 + ROW_WEIGHTS * 6 + 5)) # text and tokens, checkpoints, the rest
    ;;

  gpt2) # eight GPUs of 80 GB: GPT-2 grade
    DEPTH=${DEPTH:-24}
    TAG=d$DEPTH
    CORPUS=climbmix
    VOCAB_SIZE=32768
    # An epoch at ratio 8, of 34.5 million tokens a shard; fewer than for depth 24 are never taken.
    SHARDS=$((8 * (49152 * DEPTH * DEPTH * DEPTH + 2097152 * DEPTH) / 34500000 + 1))
    [ "$SHARDS" -ge 170 ] || SHARDS=170
    BUNDLE=eval_bundle
    DATA_FLAGS=""
    TOK_TRAIN_FLAGS="--num-files=8"
    PLAN_FLAGS="--target-param-data-ratio=8 --device-batch-size=16 --fp8"
    BASE_TRAIN_FLAGS="--depth=$DEPTH $PLAN_FLAGS --num-files=$SHARDS --save-minutes=10 --keep=2"
    BASE_EVAL_FLAGS="--device-batch-size=16"
    BASE_CHAT_TASKS="ARC-Easy|ARC-Challenge|MMLU"
    BASE_CHAT_FLAGS=""
    SFT_FLAGS="--mixture=default --device-batch-size=16 --save-minutes=10 --keep=2"
    CHAT_EVAL_TASKS=""
    CHAT_EVAL_FLAGS=""
    RL_FLAGS=""
    TIME_TEXT="at depth 24 about 2 hours on 8 x H100, 99 minutes of it pretraining; in proportion on fewer; downloads aside"
    DISK_GB=$((110 * SHARDS / 170))
    ;;
esac

if [ "$CORPUS" = climbmix ]; then
  DATA_TEXT="$SHARDS shards of ClimbMix ($((SHARDS / 10 + 1)) GB; NVIDIA's, CC BY-NC 4.0: not for commercial use), the CORE bundle, chat data sets (2 GB)"
fi
MODEL_TEXT="tag $TAG, vocabulary $VOCAB_SIZE, $BASE_TRAIN_FLAGS"
