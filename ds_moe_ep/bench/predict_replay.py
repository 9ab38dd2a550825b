"""`bench predict-replay`: what is predicted of one rank without messages, and what a replay took.

It is computed from ``docs/benchmarks/replay.json``; nothing is measured here.
"""

from __future__ import annotations

from pathlib import Path

from ds_moe_ep.bench.predict import TIME_BAR, off_by, within
from ds_moe_ep.bench.report import markdown_table, read_recorded, with_range
from ds_moe_ep.bench.table import Result
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.model_spec import ModelSpec, read_model_spec
from ds_moe_ep.moe.cost_model import GroupPrices, LinkPrices, Price
from ds_moe_ep.plan import ParallelPlan
from ds_moe_ep.predict.calibration import read_calibration
from ds_moe_ep.predict.hardware import DEVICES, Device
from ds_moe_ep.predict.passes import Deployment, Pass, predict_pass

__all__ = ["DOCUMENT", "HEADING", "NAME", "to_markdown"]

NAME, HEADING = "predict-replay", "Predicted, and one rank replayed"
DOCUMENT = "planning.md"
"""The file in docs/ that the table stands in."""

_MS = 1000.0
_CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# No formula tells of "compiled" without a graph: launching is that of eager torch.
_MODES = ("eager", "eager, CUDA graph", "compiled, CUDA graph")


def to_markdown(folder: Path) -> str:
    """Returns the table.

    Args:
        folder: Where ``replay.json`` is.

    Raises:
        ConfigError: It is not there, or is of a model or a GPU that nothing is known of.
    """
    recorded, path = read_recorded(folder, "replay"), folder / "replay.json"
    results = [each for each in recorded["results"] if each["mode"] in _MODES]
    named = _find_device(recorded["machine"]["gpus"], path)
    spec = _read_spec(results[0]["model"])
    measured = read_calibration([path]).device(named, results[0]["world_size"]) or named
    pairs = [
        [(_predict_s(spec, device, each), _median(each)) for each in results]
        for device in (named, measured)
    ]
    titles = ["pass", "tokens a rank", "mode", "measured, ms"]
    titles += [f"--gpu {named.name}, ms", "off by", "--calibration, ms", "off by"]
    rows = []
    for index, each in enumerate(results):
        cells = [each["phase"], f"{each['tokens']:,}", each["mode"]]
        cells.append(with_range(each["seconds"], scale=_MS))
        for of_device in pairs:
            predicted_s, measured_s = of_device[index]
            cells += [f"{predicted_s * _MS:.2f}", f"{off_by(predicted_s, measured_s):+.0%}"]
        rows.append(cells)
    first = min(each["tokens"] for each in results)
    checks = [i for i, each in enumerate(results) if not _is_a_start(each, first)]
    counted = [within(TIME_BAR, [of_device[i] for i in checks]) for of_device in pairs]
    return (
        f"## {HEADING}\n\n{markdown_table(titles, rows)}\n\n"
        f"{counted[0]} times by the figures of `--gpu {named.name}`. {counted[1]} by those of "
        "`--calibration docs/benchmarks/replay.json`: both rates, launching, and the time of a "
        "kernel. Not counted are the two rows that figures were taken from: launching of "
        f"`--calibration` from {first} token a rank, eager; the time of a kernel, in both columns, "
        "from its CUDA graph. "
        f"Without messages, on {recorded['machine']['gpus']}, replayed on "
        f"{recorded['measured_on']}. An eager row is compared with the time of a pass, one of a "
        "graph with that of the device alone; the cache is written in place.\n\n"
        f"```bash\npython launch/bench.py {NAME}\n```"
    )


def _find_device(gpus: str, path: Path) -> Device:
    for name, device in DEVICES.items():
        if name.split("-")[0] in gpus.lower():
            return device
    raise ConfigError(f"{path} was recorded with {gpus}, not with one of {', '.join(DEVICES)}.")


def _read_spec(model: str) -> ModelSpec:
    if not (_CONFIGS / model).is_dir():
        raise ConfigError(
            f"replay.json is of the model {model}, which has no folder in {_CONFIGS}. Record it "
            "with one of those."
        )
    return read_model_spec(_CONFIGS / model)


def _is_a_start(row: Result, first: int) -> bool:
    """Tells whether figures were taken from a row, which is then no check of them."""
    return row["tokens"] == first and row["mode"] in ("eager", "eager, CUDA graph")


def _predict_s(spec: ModelSpec, device: Device, row: Result) -> float:
    """Predicts a rank of a job whose messages take no time."""
    asked = Pass(row["tokens"], context=row["context"], in_place=True)
    if row["phase"] == "prefill":
        asked = Pass(1, row["tokens"], is_first=True, in_place=True)
    num_ranks, nothing = row["world_size"], Price(0.0, 0.0)
    links = LinkPrices(GroupPrices(num_ranks, 0.0, nothing, nothing, nothing))
    times = predict_pass(Deployment(spec, ParallelPlan(num_ranks), device, links), asked)
    return times.device_s if row["mode"].endswith("CUDA graph") else times.seconds


def _median(row: Result) -> float:
    return float(row["seconds"]["median"])
