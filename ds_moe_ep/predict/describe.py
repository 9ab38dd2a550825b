"""Tells people what is predicted, in headings and lines of 78 characters at most."""

from __future__ import annotations

import textwrap

from ds_moe_ep.predict.alternatives import Alternative
from ds_moe_ep.predict.prediction import Prediction
from ds_moe_ep.predict.targets import Targets, Verdict
from ds_moe_ep.predict.throughput import Memory, Sequences, SequenceTimes

__all__ = ["describe_prediction"]

_WIDTH = 78
_GIB, _MIB, _KIB = 1 << 30, 1 << 20, 1 << 10
_Section = tuple[str, list[str]]


def describe_prediction(prediction: Prediction, num_gpus: int) -> list[_Section]:
    """Returns headings, each with its lines.

    Args:
        prediction: What to tell.
        num_gpus: Ranks of the plan.
    """
    sections = []
    if prediction.memory is not None:
        heading = f"Prompts on each GPU ({_sequences(prediction.sequences)})"
        sections.append((heading, _memory(prediction.memory)))
    if any(prediction.sent_bytes_per_token.values()):
        sections.append(("What each token makes all GPUs send", _sent(prediction)))
    if prediction.batches:
        sections.append(("Prediction (projected, not measured)", _times(prediction)))
    elif prediction.hardware:
        told = "not one prompt fits: see the alternatives, or use a shorter --context-len"
        sections.append(("Prediction", [told]))
    elif prediction.memory is not None:
        told = "add --gpu h200 (h100, a100-80g, cpu) [--link ib-400g], or --calibration FILE"
        sections.append(("Prediction of time and throughput", [told]))
    if prediction.alternative is not None:
        heading = f"The alternative: {num_gpus} independent copies of the whole model"
        sections.append((heading, _alternative(prediction.alternative)))
    if prediction.targets is not None:
        heading = f"Targets ({_read(prediction.targets)})"
        sections.append((heading, _verdicts(prediction)))
    return sections


def _sequences(sequences: Sequences) -> str:
    new = f" + {sequences.new_tokens:,} new" if sequences.new_tokens else ", scored"
    return f"{sequences.prompt_tokens:,} tokens{new}"


def _memory(memory: Memory) -> list[str]:
    lines = [
        f"KV cache       {_size(memory.needs.kv_bytes)} a prompt "
        f"({_size(memory.kv_bytes_per_token)} a token)",
        f"pass           {_size(memory.needs.pass_bytes)} a prompt while it is read, about",
    ]
    if memory.room_bytes is not None:
        room = _size(max(0, memory.room_bytes))
        lines.append(f"largest batch  {_prompts(memory.largest_batch or 0)}, in {room} of room")
    return lines


def _sent(prediction: Prediction) -> list[str]:
    about = {"alltoall": "rows only where they are wanted", "allgather": "every row to every GPU"}
    return [
        f"{name:<10} {_size(num_bytes):>10}  {about[name]}"
        for name, num_bytes in prediction.sent_bytes_per_token.items()
    ]


def _times(prediction: Prediction) -> list[str]:
    lines = [line for text in prediction.hardware for line in _wrap(text)]
    generates = prediction.sequences.new_tokens > 0
    titles: tuple[str, ...] = (
        "batch a GPU",
        "step, ms",
        "device alone",
        "tokens/s",
        "prefill, ms",
        "sequences/s",
    )
    cells = [titles, *(_row(times) for times in prediction.batches)]
    if not generates:
        cells = [(row[0], *row[4:]) for row in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        aligned = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join(aligned))
    for times in dict.fromkeys((prediction.batches[0], prediction.batches[-1])):
        kind, shown = ("step", times.step) if generates else ("pass", times.prefill)
        shares = ", ".join(
            f"{name} {share:.0%}" for name, share in shown.shares().items() if share >= 0.005
        )
        lines += _wrap(f"{kind} with {times.batch:,}: {shares}")
    if generates and prediction.batches[0].deployment.device.overlaps:
        lines += _wrap(
            "device alone: a step if telling it what to do cost nothing, as in a CUDA graph "
            "(`infer.py --cuda-graphs`)"
        )
    return lines


def _row(times: SequenceTimes) -> tuple[str, ...]:
    return (
        f"{times.batch:,}",
        f"{times.step.seconds * 1e3:,.2f}",
        f"{times.step.device_s * 1e3:,.2f}",
        _rate(times.tokens_per_s),
        f"{times.prefill.seconds * 1e3:,.1f}",
        _rate(times.sequences_per_s),
    )


def _alternative(alternative: Alternative) -> list[str]:
    weights = f"{_size(alternative.weight_bytes)} of weights each"
    if alternative.replicas is None:
        return _wrap(f"{weights}: a copy and one prompt do not fit on one GPU")
    fits = "fit on one GPU" if alternative.fits else "whether they fit is not known"
    lines = _wrap(
        f"{weights}: {fits}; {_best(alternative.replicas)}, this plan {_spread(alternative)}"
    )
    quicker = alternative.quicker_batches
    with_batches = f"with {', '.join(map(str, quicker))}" if quicker else "with no number of"
    lines += _wrap(f"a step of this plan is quicker {with_batches} prompts a GPU")
    if alternative.wins_from_params is not None:
        lines += _wrap(
            "this plan serves more sequences a second where experts are so wide that the model "
            f"has {_rate(alternative.wins_from_params / 1e9)} B parameters or more"
        )
    return lines


def _spread(alternative: Alternative) -> str:
    return "does not fit" if alternative.spread is None else _best(alternative.spread)


def _best(times: SequenceTimes) -> str:
    return f"{_rate(times.sequences_per_s)} sequences/s with {_prompts(times.batch)} a GPU"


def _read(targets: Targets) -> str:
    if targets.new_tokens:
        return f"sequences of {targets.seq_len:,} tokens, {targets.new_tokens:,} of them generated"
    return f"sequences of {targets.seq_len:,} tokens, read in one pass"


def _verdicts(prediction: Prediction) -> list[str]:
    return [line for verdict in prediction.verdicts for line in _wrap(_verdict(verdict))]


def _verdict(verdict: Verdict) -> str:
    told = f"{verdict.target}: {'met' if verdict.is_met else 'not met'}"
    if verdict.predicted is not None:
        is_latency = verdict.target.startswith("latency")
        unit = " ms" if is_latency else ""
        number = f"{verdict.predicted:,.2f}" if is_latency else _rate(verdict.predicted)
        told += f", {number}{unit} with {_prompts(verdict.batch)} a GPU"
    elif verdict.is_met:
        told += f" with {_prompts(verdict.batch)} a GPU"
    up_to = verdict.met_up_to_tokens
    told += f"; met up to {up_to:,} tokens" if up_to else "; with no length of a sequence"
    return f"{told} (limit: {verdict.limit})"


def _prompts(number: int) -> str:
    return f"{number:,} prompt" + ("" if number == 1 else "s")


def _rate(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:,.3g}"


def _size(num_bytes: float) -> str:
    for unit, unit_bytes in (("GiB", _GIB), ("MiB", _MIB), ("KiB", _KIB)):
        if num_bytes >= 0.95 * unit_bytes:
            return f"{num_bytes / unit_bytes:,.2f} {unit}"
    return f"{num_bytes:,.0f} B"


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, width=_WIDTH, subsequent_indent="  ")
