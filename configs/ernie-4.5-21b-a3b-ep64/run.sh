#!/usr/bin/env bash
# Runs launch/infer.py on the 64 GPUs of the hostfile beside it. Written by `ds-moe-ep config`.
#   MODEL=DIR run.sh --input IN.jsonl --output OUT.jsonl [other options of launch/infer.py]
# Start it from the folder that holds launch/infer.py. All hosts must see that folder, this one and
# the model under the same paths. MODEL and INFER name another model folder or another infer.py,
# MASTER_PORT another port for the ranks to meet at (29500); one that the shell has set counts.
# They meet at the first address of the first host; MASTER_ADDR names another one of that host.
# All hosts are asked over ssh for what they have before a rank starts; SURVEY=no leaves that out.
set -euo pipefail
here="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
infer="${INFER:-launch/infer.py}"
model="${MODEL:?set MODEL to the folder with config.json and the weights}"
if [ ! -f "$infer" ]; then
  echo "run.sh: no $infer in $PWD. Start it from the folder that holds it, or set INFER." >&2
  exit 2
fi
port="${MASTER_PORT:-29500}"
case $port in
  *[!0-9]*)
    echo "run.sh: MASTER_PORT=$port is no port number. Unset it, or set it to a free port." >&2
    exit 2
    ;;
esac
# Without it pdsh waits for ever for a host that is cut off.
watch="-oServerAliveInterval=5 -oServerAliveCountMax=3"
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND-$watch}"
# DeepSpeed hands these words to a shell on every host without quoting them.
for word in "$PWD" "$here" "$infer" "$model" "$@"; do
  case $word in
    '' | *[![:alnum:]_@+=:,./-]*)
      echo "run.sh: '$word' would not reach the other hosts unchanged: DeepSpeed's pdsh launcher" \
        "does not quote. Use names of letters, digits and _@+=:,./- here, or run.sbatch." >&2
      exit 2
      ;;
  esac
done
# Interrupted, the deepspeed command ends with 1, 130 or 143, as it happens; this script with
# 130. Job control gives the job a process group of its own, so signals have to be handed on.
set -m
{
  [ "${SURVEY-}" = no ] || ds-moe-ep preflight --hosts-only --quick \
    --hostfile "$here/hostfile" --model "$model"
  exec deepspeed --hostfile "$here/hostfile" --launcher pdsh \
    ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} \
    --master_port "$port" "$infer" --model "$model" --config "$here" "$@"
} < /dev/null &
job=$! signals=
for signal in INT TERM HUP; do
  trap "signals+=x; kill -s $signal -- -$job 2> /dev/null || true" "$signal"
done
until [ "${waited-none}" = "$signals" ]; do # a signal ends the waiting, not the job
  waited="$signals" code=0
  wait "$job" || code=$?
done
[ "$code" = 0 ] || [ -z "$signals" ] || code=130
[ "$code" -lt 128 ] || [ "$code" = 130 ] || code=1 # 255 where ssh has lost a host, say
exit "$code"
