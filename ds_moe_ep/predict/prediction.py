"""Everything that is predicted of one plan, for people and for programs.

What it is made of is computed by the other modules here; this one chooses hardware and workload.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.hostfile import Cluster
from ds_moe_ep.model_spec import ModelSpec
from ds_moe_ep.moe.cost_model import LinkPrices
from ds_moe_ep.plan import ParallelPlan
from ds_moe_ep.predict.alternatives import Alternative, compare_with_replicas
from ds_moe_ep.predict.calibration import Calibration, read_calibration
from ds_moe_ep.predict.hardware import Device, find_device, find_link, price_links
from ds_moe_ep.predict.passes import Deployment, bytes_sent_per_token
from ds_moe_ep.predict.targets import Targets, Verdict, judge_targets, parse_targets
from ds_moe_ep.predict.throughput import Memory, Sequences, SequenceTimes, whole_batches

__all__ = ["Prediction", "Question", "predict"]

_DEFAULT_CONTEXT, _DEFAULT_NEW, _GIB = 2048, 128, 1 << 30
_DEFAULT_BETWEEN = "ib-400g"


@dataclass(frozen=True)
class Question:
    """What the user asked for, as spelt on the command line.

    Attributes:
        gpu: Name of a device.
        link: Name of what connects hosts.
        host_link: Name of what connects the devices of a host.
        calibration: Files of measurements; what they have of the plan goes before names.
        memory_gib: Memory of a device, in place of what is known of it.
        context_len: Tokens of a prompt and its completion.
        new_tokens: Tokens of a completion.
        batch_size: A batch to predict besides.
        targets: What shall be reached.
    """

    gpu: str | None = None
    link: str | None = None
    host_link: str | None = None
    calibration: Sequence[Path] = ()
    memory_gib: float | None = None
    context_len: int | None = None
    new_tokens: int | None = None
    batch_size: int | None = None
    targets: str | None = None


@dataclass(frozen=True)
class Prediction:
    """What is predicted.

    Attributes:
        sequences: For what prompts.
        memory: Bytes of a device, tp_size = pp_size = 1; None for other plans.
        sent_bytes_per_token: Bytes a token makes all ranks send, by dispatcher.
        hardware: Device, links and where their figures come from, for people; empty if none was
            named, and then there are no times.
        batches: Times for batches of one size each.
        alternative: What copies of the whole model would do; None without times, or if the plan is
            such copies.
        targets: What the user wants; None without a wish.
        verdicts: Whether it is reached.
    """

    sequences: Sequences
    memory: Memory | None
    sent_bytes_per_token: dict[str, float]
    hardware: tuple[str, ...] = ()
    batches: tuple[SequenceTimes, ...] = ()
    alternative: Alternative | None = None
    targets: Targets | None = None
    verdicts: tuple[Verdict, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns what JSON can hold; its keys are listed in `PlanReport.to_json`."""
        memory, targets = self.memory, self.targets
        return {
            "prompt_tokens": self.sequences.prompt_tokens,
            "new_tokens": self.sequences.new_tokens,
            "memory": memory
            and {
                "weight_bytes": memory.weight_bytes,
                "kv_bytes_per_token": memory.kv_bytes_per_token,
                "kv_bytes_per_sequence": memory.needs.kv_bytes,
                "pass_bytes_per_sequence": memory.needs.pass_bytes,
                "largest_batch": memory.largest_batch,
            },
            "sent_bytes_per_token": self.sent_bytes_per_token,
            "hardware": list(self.hardware),
            "batches": [_times_to_json(times) for times in self.batches],
            "alternative": self.alternative and _alternative_to_json(self.alternative),
            "targets": targets and vars(targets),
            "verdicts": [vars(verdict) for verdict in self.verdicts],
        }


def predict(
    plan: ParallelPlan, spec: ModelSpec, cluster: Cluster, question: Question
) -> Prediction:
    """Predicts what a plan does on the hardware that was named or measured.

    Raises:
        ConfigError: A name, file or number cannot be used; with those that can.
    """
    sequences = _sequences(spec, question)
    sent = bytes_sent_per_token(spec, plan)
    if plan.tp_size * plan.pp_size > 1:
        return Prediction(sequences, None, sent)
    calibration = read_calibration(question.calibration) if question.calibration else None
    device = _device(question, calibration, plan)
    memory = Memory.of(spec, plan, sequences, device)
    if device is None:
        return Prediction(sequences, memory, sent)
    links, told = None, [f"{device.name}: {device.source}"]
    if plan.ep_size > 1:
        links, of_links = _links(question, calibration, device, plan, cluster)
        told += of_links
    deployment = Deployment(spec, plan, device, links)
    targets = None
    if question.targets is not None:
        targets = parse_targets(question.targets, sequences.length)
        _check_length("--targets: seq_len", targets.seq_len, spec)
    return Prediction(
        sequences,
        memory,
        sent,
        hardware=tuple(told),
        batches=tuple(_batches(deployment, sequences, question.batch_size)),
        alternative=compare_with_replicas(deployment, sequences) if plan.ep_size > 1 else None,
        targets=targets,
        verdicts=tuple(judge_targets(deployment, targets)) if targets else (),
    )


def _sequences(spec: ModelSpec, question: Question) -> Sequences:
    length = question.context_len
    if length is None:
        length = min(_DEFAULT_CONTEXT, spec.max_position_embeddings)
    if length < 1:
        raise ConfigError(f"--context-len {length}: at least 1 token is needed.")
    _check_length("--context-len", length, spec)
    new_tokens = question.new_tokens
    if new_tokens is None:
        new_tokens = min(_DEFAULT_NEW, length // 2)
    if not 0 <= new_tokens < length:
        raise ConfigError(
            f"--new-tokens {new_tokens} of --context-len {length}: use 0 (prompts are scored) to "
            f"{length - 1}."
        )
    if question.batch_size is not None and question.batch_size < 1:
        raise ConfigError(f"--batch-size {question.batch_size}: at least 1 is needed.")
    return Sequences(length - new_tokens, new_tokens)


def _check_length(name: str, length: int, spec: ModelSpec) -> None:
    if length > spec.max_position_embeddings:
        raise ConfigError(
            f"{name} {length} is more than max_position_embeddings="
            f"{spec.max_position_embeddings} of {spec.name}, its longest context."
        )


def _device(
    question: Question, calibration: Calibration | None, plan: ParallelPlan
) -> Device | None:
    if question.memory_gib is not None and not 0 < question.memory_gib < float("inf"):
        raise ConfigError(f"--memory-gib {question.memory_gib}: a positive number is needed.")
    device = find_device(question.gpu) if question.gpu is not None else None
    if calibration is not None:
        device = calibration.device(device, plan.world_size)
    if device is None:
        options = {
            "--link": question.link,
            "--host-link": question.host_link,
            "--memory-gib": question.memory_gib,
            "--batch-size": question.batch_size,
            "--targets": question.targets,
            "--calibration": question.calibration or None,
        }
        for option, value in options.items():
            if value is not None:
                raise ConfigError(
                    f"{option} needs to know what the ranks compute on. Add --gpu h200 (or h100, "
                    "a100-80g, cpu), or --calibration FILE of launch/bench.py predict or replay."
                )
        return None
    if question.memory_gib is not None:
        device = replace(device, memory_bytes=int(question.memory_gib * _GIB))
    return device


def _links(
    question: Question,
    calibration: Calibration | None,
    device: Device,
    plan: ParallelPlan,
    cluster: Cluster,
) -> tuple[LinkPrices, list[str]]:
    """Returns what messages cost in the first expert group, and where the figures come from."""
    ranks = plan.ep_group(0)
    num_hosts = len({cluster.locate(rank)[0] for rank in ranks})
    # A device that was measured, not named, has no link of its own within a host.
    is_named = question.host_link is not None or bool(question.gpu and question.link)
    if calibration is not None:
        links = calibration.links(plan.ep_size, num_hosts, is_needed=not is_named)
        if links is not None:
            return links, [f"links: measured, {', '.join(calibration.sources)}"]
    if question.gpu is None and question.host_link is None:
        raise ConfigError(
            "--calibration: there are no links in it, which ep_size > 1 needs. Add a file of "
            "launch/bench.py collectives, or name what connects the ranks: --host-link, --link."
        )
    within = find_link("--host-link", question.host_link, device)
    between = find_link("--link", question.link or _DEFAULT_BETWEEN, device)
    told = [f"{within.name} within a host: {within.source}"]
    if num_hosts > 1:
        assumed = "" if question.link else " (assumed; --link names another)"
        told.append(f"{between.name} between hosts{assumed}: {between.source}")
    return price_links(cluster, ranks, device, within=within, between=between), told


def _batches(
    deployment: Deployment, sequences: Sequences, asked: int | None
) -> list[SequenceTimes]:
    """Returns a few batches: each fourth power of two, the one asked for, the largest that fits."""
    every = list(whole_batches(deployment, sequences))
    found = {times.batch: times for times in (*every[::3], *every[-1:])}
    if asked is not None:
        found[asked] = SequenceTimes(deployment, sequences, asked)
    return [found[batch] for batch in sorted(found)]


def _times_to_json(times: SequenceTimes) -> dict[str, Any]:
    return {
        "batch_per_gpu": times.batch,
        "step_s": times.step.seconds,
        "step_device_s": times.step.device_s,
        "step_shares": times.step.shares(),
        "step_bound": times.step.bound,
        "step_dispatcher": times.step.dispatcher,
        "prefill_s": times.prefill.seconds,
        "prefill_shares": times.prefill.shares(),
        "prefill_bound": times.prefill.bound,
        "tokens_per_s": times.tokens_per_s,
        "sequences_per_s": times.sequences_per_s,
    }


def _alternative_to_json(alternative: Alternative) -> dict[str, Any]:
    def best(times: SequenceTimes | None) -> dict[str, Any] | None:
        if times is None:
            return None
        return {
            "batch_per_gpu": times.batch,
            "sequences_per_s": times.sequences_per_s,
            "tokens_per_s": times.tokens_per_s,
        }

    return {
        "weight_bytes": alternative.weight_bytes,
        "fits_one_gpu": alternative.fits,
        "replicas": best(alternative.replicas),
        "expert_parallel": best(alternative.spread),
        "expert_parallel_quicker_with_batches_per_gpu": list(alternative.quicker_batches),
        "expert_parallel_wins_from_params": alternative.wins_from_params,
    }
