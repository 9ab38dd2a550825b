#!/usr/bin/env bash
# From a fresh clone to completions: sets up .venv, writes the bundled 64-expert model, shows the plan for 64 GPUs and
# for this machine, and runs the model on 4 CPU processes, or on this machine's GPUs.
#
#   bash launch/quickstart.sh
#
# TORCH and PYTHON choose what to install; see launch/setup.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUT=quickstart-out
NUM_EXPERTS=64
JOB_LIMIT_S=600

step() { printf '\n== %s\n' "$*"; }

# Prints how many ranks this machine is good for and of what kind: GPUs, as many as divide the experts, or 4 on the CPU.
find_ranks() {
    local gpus=0 ranks
    if nvidia-smi --list-gpus > /dev/null 2>&1; then
        gpus=$(timeout 120 python -c 'import torch; print(torch.cuda.device_count())')
    fi
    if [ "$gpus" -eq 0 ]; then
        echo 4 CPU
        return
    fi
    for ((ranks = gpus; NUM_EXPERTS % ranks != 0; ranks--)); do :; done
    echo "$ranks" GPU
}

# Runs a command with a limit; that, or Ctrl-C, ends all the processes it started.
bounded() {
    local limit_s=$1 code=0
    shift
    timeout --kill-after=20 "$limit_s" "$@" &
    local job=$!
    trap 'kill -TERM "$job"; wait "$job" || true; exit 130' INT TERM
    wait "$job" || code=$?
    trap - INT TERM
    [ "$code" -ne 124 ] || printf 'quickstart: not done after %d s, ended: %s\n' "$limit_s" "$*" >&2
    return "$code"
}

step "set-up (the first time takes minutes)"
bash launch/setup.sh
export PATH="$PWD/.venv/bin:$PATH"

step "the bundled model"
rm -rf "$OUT"
mkdir "$OUT"
ds-moe-ep demo-model --out "$OUT/model"

step "its plan for 8 hosts of 8 GPUs"
ds-moe-ep plan --model "$OUT/model" --hostfile configs/hostfile.8x8

read -r ranks kind <<< "$(find_ranks)"
step "its plan for this machine: $ranks $kind ranks"
printf 'localhost slots=%d\n' "$ranks" > "$OUT/hostfile"
ds-moe-ep plan --model "$OUT/model" --hostfile "$OUT/hostfile"

if [ "$kind" = CPU ]; then
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
fi
where=(--num_gpus "$ranks")
if [ "$kind" = GPU ] && [[ "${CUDA_VISIBLE_DEVICES-}" =~ ^[0-9,]+$ ]]; then # it heeds numbers alone
    where=(--include "localhost:$(cut -d, -f "1-$ranks" <<< "$CUDA_VISIBLE_DEVICES")")
fi
job=(deepspeed --quiet "${where[@]}" launch/infer.py --model "$OUT/model"
    --input ds_moe_ep/demo/prompts.jsonl --output "$OUT/outputs.jsonl" --metrics "$OUT")
step "${job[*]}"
bounded "$JOB_LIMIT_S" "${job[@]}"

step "prompts | completions"
python - "$OUT/outputs.jsonl" << 'PYTHON'
import json
import sys

with open(sys.argv[1], encoding="utf-8") as lines:
    for record in map(json.loads, lines):
        print(f"{record['prompt']} | {record['completion'].strip()}\n")
PYTHON

step "what is where"
printf '%-28s %s\n' \
    "$OUT/model/" "the model, an ordinary Hugging Face directory" \
    "$OUT/outputs.jsonl" "the completions" \
    "$OUT/metrics.jsonl" "the figures of every rank" \
    "ds_moe_ep/demo/" "the prompts, and how the model was trained" \
    ".venv/bin/ds-moe-ep --help" "what else there is"
