"""run.sh and run.sbatch: the two ways to start launch/infer.py on all hosts of a plan.

Both read the configuration beside them at run time, so a folder can be moved. Every word that comes
from a hostfile or a path is quoted for the shell.
"""

import re
import shlex
from pathlib import Path

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.hostfile import Cluster

__all__ = ["RUN_SBATCH", "RUN_SH", "run_sbatch", "run_sh"]

RUN_SH = "run.sh"
RUN_SBATCH = "run.sbatch"

_RUN_SH = r"""#!/usr/bin/env bash
# Runs launch/infer.py on @GPUS@ of the hostfile beside it. Written by `ds-moe-ep config`.
#   @SETTING@run.sh --input IN.jsonl --output OUT.jsonl [other options of launch/infer.py]
# Start it from the folder that holds launch/infer.py. All hosts must see that folder, this one and
# the model under the same paths. MODEL and INFER name another model folder or another infer.py,
# MASTER_PORT another port for the ranks to meet at (29500); one that the shell has set counts.
@ABOUT@set -euo pipefail
here="$(CDPATH= cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
infer="${INFER:-launch/infer.py}"
@MODEL@
if [ ! -f "$infer" ]; then
  echo "run.sh: no $infer in $PWD. Start it from the folder that holds it, or set INFER." >&2
  exit 2
fi
port="${MASTER_PORT:-29500}"
@PORT@
@PDSH@# Interrupted, the deepspeed command ends with 1, 130 or 143, as it happens; this script with
# 130. Job control gives the job a process group of its own, so signals have to be handed on.
set -m
{
@SURVEY@  exec deepspeed --hostfile "$here/hostfile" @LAUNCHER@ \
    @ADDRESS@--master_port "$port" "$infer" --model "$model" --config "$here" "$@"
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
"""

# Kubernetes sets MASTER_PORT=tcp://IP:PORT where a service is called master.
_PORT = r"""case $port in
  *[!0-9]*)
    echo "@SCRIPT@: MASTER_PORT=$port is no port number. Unset it, or set it to a free port." >&2
    exit 2
    ;;
esac"""

_PDSH = r"""# Without it pdsh waits for ever for a host that is cut off.
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
"""

_ABOUT_HOSTS = """\
# They meet at the first address of the first host; MASTER_ADDR names another one of that host.
# All hosts are asked over ssh for what they have before a rank starts; SURVEY=no leaves that out.
"""

_ADDRESS = '${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} \\\n    '

_SURVEY = r"""  [ "${SURVEY-}" = no ] || ds-moe-ep preflight --hosts-only --quick \
    --hostfile "$here/hostfile" @FILTER@--model "$model"
"""

_RUN_SBATCH = r"""#!/usr/bin/env bash
#SBATCH --job-name=ds_moe_ep
#SBATCH --nodes=@NODES@
#SBATCH --ntasks=@RANKS@
#SBATCH --ntasks-per-node=@SLOTS@
#SBATCH --gpus-per-node=@SLOTS@
#SBATCH --exclusive
#SBATCH --mem=0
# Runs launch/infer.py on @GPUS@ under Slurm without ssh. Written by `ds-moe-ep config`.
#   @SETTING@sbatch [--partition P --time T] run.sbatch --input IN.jsonl --output OUT.jsonl [...]
# Submit it from the folder that holds launch/infer.py. MODEL and INFER name another model folder or
# another infer.py, PYTHON another interpreter, MASTER_PORT another port for the ranks to meet at
# (one that follows from the job's id); one that the submitting shell has set counts.
set -euo pipefail
here="${CONFIG:-}"
if [ -z "$here" ]; then
  # Slurm runs a copy of this script, so the folder it came from has to be asked for.
  job="$(scontrol show job "${SLURM_JOB_ID:?submit this script with sbatch}")"
  here="$(dirname -- "$(sed -n 's/^ *Command=\([^ ]*\).*/\1/p' <<< "$job")")"
fi
infer="${INFER:-launch/infer.py}"
@MODEL@
if [ ! -f "$here/ds_inference.json" ]; then
  echo "run.sbatch: no ds_inference.json in $here. Set CONFIG to the folder that has it." >&2
  exit 2
fi
if [ ! -f "$infer" ]; then
  echo "run.sbatch: no $infer in $PWD. Submit from the folder that holds it, or set INFER." >&2
  exit 2
fi
if [ "$SLURM_NTASKS" != @RANKS@ ]; then
  echo "run.sbatch: the plan has @RANKS@ ranks, but Slurm gave $SLURM_NTASKS tasks. Submit with" \
    "--nodes=@NODES@ --ntasks-per-node=@SLOTS@, or plan again with ds-moe-ep config." >&2
  exit 2
fi
port="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"
@PORT@
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_PORT="$port"
WORLD_SIZE="$SLURM_NTASKS"
export MASTER_ADDR MASTER_PORT WORLD_SIZE
# Consecutive ranks share a node, as the plan has it, and its cores: srun would give each task one.
exec srun --kill-on-bad-exit=1 --distribution=block --cpu-bind=none bash -c \
  'export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID"; exec "$@"' task \
  "${PYTHON:-python}" -u "$infer" --model "$model" --config "$here" "$@"
"""


def run_sh(model: Path, cluster: Cluster) -> str:
    """Return a script that starts the ranks over ssh with DeepSpeed's launcher.

    Args:
        model: the model as the user named it; a folder becomes the script's default, while a bare
            config.json has no weights and leaves MODEL to be set.
        cluster: the hosts. For this machine alone nothing goes through ssh.
    """
    used = ["--include", cluster.include_filter] if cluster.include_filter else []
    if cluster.is_local:
        about = pdsh = survey = address = ""
        launcher = ["--no_ssh_check", "--master_addr", "127.0.0.1", *used]
    else:
        # DeepSpeed would run a hostfile of one host on the machine at hand unless forced not to.
        alone = ["--force_multi"] if len(cluster.hosts) == 1 else []
        launcher = ["--launcher", "pdsh", *alone, *used]
        about, pdsh, address = _ABOUT_HOSTS, _PDSH, _ADDRESS
        survey = _fill(_SURVEY, FILTER="".join(f"{shlex.quote(word)} " for word in used))
    return _fill(
        _RUN_SH,
        GPUS=_gpus(cluster),
        SETTING=_setting(model),
        MODEL=_model_lines(model),
        ABOUT=about,
        PORT=_fill(_PORT, SCRIPT=RUN_SH),
        PDSH=pdsh,
        SURVEY=survey,
        LAUNCHER=shlex.join(launcher),
        ADDRESS=address,
    )


def run_sbatch(model: Path, cluster: Cluster) -> str:
    """Return a Slurm batch script that starts the ranks with srun.

    The hosts are Slurm's to choose; the cluster only says how many, with how many GPUs each.

    Args:
        model: as for `run_sh`.
        cluster: the hosts.

    Raises:
        ConfigError: if hosts differ in their slots or leave some out, which srun cannot express.
    """
    first = cluster.hosts[0]
    for host in cluster.hosts:
        if host.slots != tuple(range(len(first.slots))):
            raise ConfigError(
                f"srun starts as many tasks on every node and cannot leave single GPUs out, but "
                f"{host.name} gives slots {list(host.slots)} and {first.name} {len(first.slots)}. "
                f"Use run.sh."
            )
    return _fill(
        _RUN_SBATCH,
        NODES=str(len(cluster.hosts)),
        SLOTS=str(len(first.slots)),
        RANKS=str(cluster.num_gpus),
        GPUS=_gpus(cluster),
        SETTING=_setting(model),
        MODEL=_model_lines(model),
        PORT=_fill(_PORT, SCRIPT=RUN_SBATCH),
    )


def _gpus(cluster: Cluster) -> str:
    return f"the {cluster.num_gpus} GPUs" if cluster.num_gpus > 1 else "the GPU"


def _setting(model: Path) -> str:
    return "MODEL=DIR " if model.is_file() else ""


def _model_lines(model: Path) -> str:
    if model.is_file():
        return 'model="${MODEL:?set MODEL to the folder with config.json and the weights}"'
    return f'default_model={shlex.quote(str(model))}\nmodel="${{MODEL:-$default_model}}"'


def _fill(template: str, **values: str) -> str:
    """Put values in the place of @NAMES@, which unlike braces mean nothing to a shell."""
    return re.sub("@([A-Z]+)@", lambda match: values[match[1]], template)
