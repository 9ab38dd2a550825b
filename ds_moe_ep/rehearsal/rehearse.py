"""Runs a job of many hosts on this machine, small but whole, and compares what it writes.

What is real: the plan, the generated files, DeepSpeed's launcher with pdsh and ssh, infer.py, the
ranks and who holds which experts. What is not: widths and weights of the model, and the hardware.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ds_moe_ep.config.bundle import HOSTFILE, write_bundle
from ds_moe_ep.engine.console import quiet_libraries
from ds_moe_ep.errors import ConfigError, DistributedError, some
from ds_moe_ep.hostfile import Cluster, local_cluster
from ds_moe_ep.model_spec import ModelSpec, read_model_spec
from ds_moe_ep.plan import ParallelPlan
from ds_moe_ep.rehearsal.hosts import memory_bytes, simulate_hosts, why_no_hosts
from ds_moe_ep.rehearsal.shared_start import shared_start

__all__ = ["rehearse"]

_INFER = Path(__file__).resolve().parents[2] / "launch" / "infer.py"
_NEW_TOKENS = 8
_LOOK_S = 3.0  # between two looks at the memory
# What run.sh heeds, and a user may have set for jobs of their own.
_OF_USERS_JOBS = {"MODEL", "MASTER_ADDR", "MASTER_PORT", "SURVEY", "PDSH_SSH_ARGS_APPEND"}
_TAIL_LINES = 30
_GIB = 1 << 30
# Of the bring-up, as infer.py shows it.
_PHASE = re.compile(r"\[\d/\d\] .*: (?:pass|warn) \([\d.]+ s\)")
_EXPERTS = re.compile(r"pass  experts +(.*)")
# Some for each rank and host that is ended: they would push what ranks have said out of the tail.
_OF_LAUNCHERS = re.compile(r"\[launch\.py:\d+:|^pdsh@\S+: ")


@dataclass(frozen=True)
class _Stage:
    """Where the ranks are started, and how.

    Attributes:
        cluster: As the ranks see it.
        command: Makes a command run there.
        memory_bytes: What all ranks take together now; it is given the session of the job.
    """

    cluster: Cluster
    command: Callable[[list[str]], list[str]]
    memory_bytes: Callable[[int], int]


def rehearse(
    model: Path,
    cluster: Cluster,
    plan: ParallelPlan,
    folder: Path,
    *,
    options: Sequence[str] = (),
    tell: Callable[[str], None],
) -> None:
    """Rehearses a job, telling of each phase when it has worked.

    Args:
        model: The model directory or config.json.
        cluster: The hosts, to be made on this machine.
        plan: The parallel sizes that fill them.
        folder: Where to write; it is the caller's to remove, and so are processes if this ends
            early. See `guard.go_on_guarded`.
        options: More of infer.py's.
        tell: Gets a line for each phase.

    Raises:
        DsMoeEpError: A phase did not work; it says which and why.
    """
    if not _INFER.exists():
        raise ConfigError(f"{_INFER} is not there: rehearse from a checkout of ds_moe_ep.")
    spec = read_model_spec(model)
    tell(f"plan     {plan} on {cluster.describe()}")
    small = _make_model(model, spec, folder / "model", tell)
    modules = "ds_moe_ep.infer_job", f"transformers.models.{spec.model_type}"
    script, variables = shared_start(_INFER, *modules)
    with _stage(cluster, variables, tell) as stage:
        write_bundle(small, stage.cluster, plan, read_model_spec(small), folder / "config")
        tell(f"files    written, as `ds-moe-ep config` does; started by run.sh and {HOSTFILE}")
        prompts = _write_prompts(folder / "prompts.jsonl", plan.world_size)
        tell(f"launch   {_launch(stage, folder, script, options)}")
    tell(f"outputs  {_compare(_expected(small, prompts), folder / 'outputs.jsonl')}")


def _make_model(model: Path, spec: ModelSpec, folder: Path, tell: Callable[[str], None]) -> Path:
    from ds_moe_ep.rehearsal.small_model import write_small_model  # torch: seconds

    quiet_libraries()
    config = model / "config.json" if model.is_dir() else model
    num_params = write_small_model(config, folder)
    small = read_model_spec(folder)
    if (small.moe_layers, small.num_experts, small.top_k) != (
        spec.moe_layers,
        spec.num_experts,
        spec.top_k,
    ):
        raise ConfigError(f"{config}: made small, its experts are others: a bug of the rehearsal.")
    tell(
        f"model    {len(spec.moe_layers)} of {spec.num_layers} layers with {spec.num_experts} "
        f"experts, top-{spec.top_k}, as they are; hidden size {spec.hidden_size} -> "
        f"{small.hidden_size}, {spec.num_params / 1e6:,.0f} M -> {num_params / 1e6:,.1f} M "
        "parameters, random, float32"
    )
    return folder


@contextlib.contextmanager
def _stage(
    cluster: Cluster, variables: Mapping[str, str], tell: Callable[[str], None]
) -> Iterator[_Stage]:
    """Makes the hosts; without what that takes, the same number of ranks on this machine."""
    if reason := why_no_hosts():
        tell(f"hosts    none made: {reason} Instead: {cluster.num_gpus} ranks on one host")
        settings = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **variables}
        enter = ["env", *(f"{name}={value}" for name, value in settings.items())]
        local = replace(local_cluster(cluster.num_gpus), source=cluster.source)

        def memory_of(session: int) -> int:
            return memory_bytes(lambda pid: os.getsid(pid) == session)

        yield _Stage(local, lambda argv: [*enter, *argv], memory_of)
        return
    start_s = time.monotonic()
    with simulate_hosts(cluster, variables) as hosts:
        tell(
            f"hosts    {len(cluster.hosts)} made in {time.monotonic() - start_s:.0f} s: network "
            "namespaces, each answers ssh by its name"
        )
        yield _Stage(cluster, hosts.command, lambda session: hosts.memory_bytes())


def _write_prompts(path: Path, num_ranks: int) -> list[list[int]]:
    """Writes prompts of different lengths, three more than there are ranks."""
    chance = random.Random(0)
    prompts = [
        [chance.randrange(512) for _ in range(chance.randint(2, 9))] for _ in range(num_ranks + 3)
    ]
    lines = (json.dumps({"id": str(i), "prompt_token_ids": ids}) for i, ids in enumerate(prompts))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return prompts


def _launch(stage: _Stage, folder: Path, script: Path, options: Sequence[str]) -> str:
    """Runs the generated run.sh and returns what there is to tell of it."""
    job = ["--input", folder / "prompts.jsonl", "--output", folder / "outputs.jsonl"]
    job += ["--max-new-tokens", _NEW_TOKENS, *options]
    command = stage.command(["bash", str(folder / "config" / "run.sh"), *map(str, job)])
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    env = {name: value for name, value in os.environ.items() if name not in _OF_USERS_JOBS}
    env |= {"PATH": path, "INFER": str(script)}
    start_s, most_bytes = time.monotonic(), 0
    log = folder / "launch.log"
    with log.open("w", encoding="utf-8") as output:
        running = subprocess.Popen(
            command, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    while running.poll() is None:
        most_bytes = max(most_bytes, stage.memory_bytes(running.pid))
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(_LOOK_S)
    shown = log.read_text(encoding="utf-8", errors="replace")
    if running.returncode != 0:
        lines = [line for line in shown.splitlines() if not _OF_LAUNCHERS.search(line)]
        raise DistributedError(
            f"launch: run.sh ended with exit code {running.returncode}; its last lines:\n"
            + "\n".join(lines[-_TAIL_LINES:])
        )
    verdicts = ", ".join([*_PHASE.findall(shown), *_EXPERTS.findall(shown)])
    memory = f", {most_bytes / _GIB:.1f} GiB for all ranks together at most" if most_bytes else ""
    took = f"exit code 0 after {time.monotonic() - start_s:.0f} s{memory}"
    return f"{took}; bring-up: {verdicts}"


def _expected(model: Path, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Returns the new tokens of each prompt by transformers, in this process."""
    import torch
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    sequences = [
        whole.generate(torch.tensor([ids]), max_new_tokens=_NEW_TOKENS, do_sample=False)[0]
        for ids in prompts
    ]
    return [tokens[len(ids) :].tolist() for tokens, ids in zip(sequences, prompts, strict=True)]


def _compare(expected: Sequence[Sequence[int]], output: Path) -> str:
    """Compares what all ranks have written with the tokens that each prompt is to have."""
    results = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    written = [result["id"] for result in results]
    asked = [str(number) for number in range(len(expected))]
    if written != asked:
        faults = {
            "missing": [name for name in asked if name not in written],
            "not asked for": [name for name in written if name not in asked],
        }
        told = [f"{what}: {some(names)}" for what, names in faults.items() if names]
        raise DistributedError(
            f"outputs: {len(written)} results for {len(asked)} prompts; "
            f"{'; '.join(told) or 'in another order, or some twice'}."
        )
    different = [
        result["id"]
        for result, tokens in zip(results, expected, strict=True)
        if result["token_ids"] != list(tokens)
    ]
    if different:
        raise DistributedError(
            f"outputs: {len(different)} of {len(asked)} prompts have other tokens than "
            f"transformers' in one process: ids {some(different)}."
        )
    return f"all {len(asked)} equal those of transformers in one process"
