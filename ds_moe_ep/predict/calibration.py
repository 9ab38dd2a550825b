"""Reads what launch/bench.py measured, to predict with it in place of published figures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.moe.cost_model import GroupPrices, LinkPrices, Price
from ds_moe_ep.predict.hardware import Device, Launches, num_operations

__all__ = ["Calibration", "device_from_result", "links_from_result", "read_calibration"]

_TABLES = ("predict", "replay", "collectives")
_HOW = "Write one with launch/bench.py predict, replay or collectives"


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    Attributes:
        results: Results by table; of "predict" a device and links for each number of ranks, of
            "replay" a device, of "collectives" links.
        sources: The files, for people.
    """

    results: Mapping[str, Sequence[dict[str, Any]]]
    sources: tuple[str, ...]

    def device(self, base: Device | None, world_size: int) -> Device | None:
        """Returns the measured device.

        Args:
            base: What the user named; it gives what was not measured.
            world_size: Ranks of the plan: those of one machine may share its cores.

        Raises:
            ConfigError: Devices were measured for other numbers of ranks alone.
        """
        if measured := self.results.get("replay"):
            return _replayed(measured, base)
        measured = self.results.get("predict", ())
        found = [result for result in measured if result["world_size"] == world_size]
        if measured and not found and base is None:
            raise self._missing("a device", "ranks", world_size, measured)
        return device_from_result(found[0]) if found else base

    def links(
        self, world_size: int, num_nodes: int, *, is_needed: bool = True
    ) -> LinkPrices | None:
        """Returns the measured links of so many ranks on so many hosts; None without any.

        Args:
            world_size: Ranks of the expert group.
            num_nodes: Hosts that they are on.
            is_needed: Whether nothing else tells what connects them.

        Raises:
            ConfigError: Links were measured for other numbers alone, and they are needed.
        """
        measured = [*self.results.get("predict", ()), *self.results.get("collectives", ())]
        for result in measured:
            if (result["world_size"], result["num_nodes"]) == (world_size, num_nodes):
                return links_from_result(result)
        if not measured or not is_needed:
            return None
        raise self._missing("links", "ranks on hosts", f"{world_size} on {num_nodes}", measured)

    def _missing(
        self, what: str, unit: str, wanted: object, measured: Iterable[dict[str, Any]]
    ) -> ConfigError:
        with_hosts = "hosts" in unit
        options = "--host-link, --link" if with_hosts else "--gpu, --link"
        known = sorted({(result["world_size"], result["num_nodes"]) for result in measured})
        told = ", ".join(f"{size} on {nodes}" if with_hosts else f"{size}" for size, nodes in known)
        return ConfigError(
            f"--calibration {', '.join(self.sources)}: has {what} of {told} {unit}, but the plan "
            f"needs {wanted}. Measure those, or name the hardware: {options}."
        )


def read_calibration(paths: Sequence[Path]) -> Calibration:
    """Reads the files of ``docs/benchmarks/`` or like them.

    Raises:
        ConfigError: A file cannot be read, or is of another table.
    """
    results: dict[str, list[dict[str, Any]]] = {}
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            table, found = content["table"], list(content["results"])
        except OSError as error:
            raise ConfigError(f"--calibration {path}: {error.strerror}. {_HOW}.") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ConfigError(f"--calibration {path}: not a file of results. {_HOW}.") from None
        table = str(table).removesuffix("-hosts")
        if table not in _TABLES:
            raise ConfigError(
                f"--calibration {path}: is of the table {table!r}, not of {', '.join(_TABLES)}. "
                f"{_HOW}."
            )
        results.setdefault(table, []).extend(found)
    calibration = Calibration(results, tuple(map(str, paths)))
    _check(calibration)
    return calibration


def device_from_result(result: Mapping[str, Any]) -> Device:
    """Returns the device of a result of ``bench predict``."""
    fields = dict(result["device"])
    return Device(**{**fields, "launches": Launches(**fields["launches"])})


def links_from_result(result: Mapping[str, Any]) -> LinkPrices:
    """Returns the links of a result of ``bench predict`` or ``bench collectives``."""

    def group(prices: Mapping[str, Any]) -> GroupPrices:
        kinds = {kind: Price(**prices[kind]) for kind in ("exchange", "gather", "reduce")}
        return GroupPrices(size=prices["size"], counts_s=prices["counts_s"], **kinds)

    level = {name: group(prices) for name, prices in result["fit"].items()}
    return LinkPrices(
        level["flat"], level.get("across"), level.get("within"), result["local_s_per_byte"]
    )


def _replayed(results: Sequence[dict[str, Any]], base: Device | None) -> Device:
    """Returns the device that one rank of a job was replayed on."""
    one = results[0]
    is_gpu = one["dtype"] == "bfloat16"
    rates = {"flops_16bit" if is_gpu else "flops_32bit": one["flops"]}
    if base is None:
        base = Device(
            name="measured",
            flops_16bit=one["flops"],
            flops_32bit=one["flops"],
            bytes_per_s=one["bytes_per_s"],
            launches=Launches(),
            memory_bytes=None,
            reserved_bytes=0,
            overlaps=is_gpu,
            source="",
        )
    launches, kernel_s = base.launches, base.kernel_s
    if "num_layers" in one:
        if eager := _fewest_tokens(results, "eager"):
            seconds = eager["seconds"]["median"]
            # A GPU works meanwhile; a CPU has read the weights in this time too.
            told_s = seconds if base.overlaps else max(0.0, seconds - eager["floor_s"])
            launches = Launches(layer_s=told_s / one["num_layers"])
        if graph := _fewest_tokens(results, "eager, CUDA graph"):
            busy_s = max(0.0, graph["seconds"]["median"] - graph["floor_s"])
            kernel_s = busy_s / num_operations(one["num_layers"])
    return replace(
        base,
        bytes_per_s=one["bytes_per_s"],
        launches=launches,
        kernel_s=kernel_s,
        source=f"one rank of {one['world_size']}, replayed",
        **rates,
    )


def _fewest_tokens(results: Sequence[dict[str, Any]], mode: str) -> dict[str, Any] | None:
    """Returns the decode step in which a device has least to do; None if there is none."""
    found = [each for each in results if (each["phase"], each["mode"]) == ("decode", mode)]
    return min(found, key=lambda each: int(each["tokens"]), default=None)


def _check(calibration: Calibration) -> None:
    """Refuses results without the fields that predictions need, before they are used."""
    try:
        for result in calibration.results.get("predict", ()):
            device_from_result(result)
        for table in ("predict", "collectives"):
            for result in calibration.results.get(table, ()):
                links_from_result(result)
                int(result["world_size"]), int(result["num_nodes"])
        if measured := calibration.results.get("replay"):
            _replayed(measured, None)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ConfigError(
            f"--calibration {', '.join(calibration.sources)}: results are not as expected "
            f"({error!r}). {_HOW} of this version."
        ) from None
