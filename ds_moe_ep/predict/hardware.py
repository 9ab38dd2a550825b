"""What devices and links do, as published, and the share of it that programs were seen to reach.

Figures that were measured take their place in calibration.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ds_moe_ep.errors import ConfigError, nearest
from ds_moe_ep.hostfile import Cluster
from ds_moe_ep.moe.cost_model import GroupPrices, LinkPrices, Price

__all__ = [
    "DEVICES",
    "LINKS",
    "NUM_OPERATIONS_A_LAYER",
    "Device",
    "Launches",
    "Link",
    "find_device",
    "find_link",
    "num_operations",
    "price_links",
]

NUM_OPERATIONS_A_LAYER = 77
"""Operations of a decode step in one layer that a device is told of, counted by torch's dispatcher
in a Qwen3-MoE layer with allgather; views are left out. 18 more stand around the layers."""

_NUM_OPERATIONS_AROUND = 18
_GB = 10**9
# Rows are copied by rank, packed, and summed when they come back: each time read and written.
_LOCAL_PASSES = 4


@dataclass(frozen=True)
class Launches:
    """Seconds that a program takes to tell a device what to do, however little that is.

    Attributes:
        layer_s: Of one layer.
        step_s: Of what stands around the layers of a pass: embedding, head, choosing a token.
        start_s: Of a first pass more than of others, the call of ``generate`` among it.
    """

    layer_s: float = 0.0
    step_s: float = 0.0
    start_s: float = 0.0

    @classmethod
    def of_operations(cls, operation_s: float) -> Launches:
        """Returns what counted operations take that cost so many seconds each."""
        return cls(NUM_OPERATIONS_A_LAYER * operation_s, _NUM_OPERATIONS_AROUND * operation_s)


def num_operations(num_layers: int) -> int:
    """Returns the operations of a pass through so many layers, each a kernel on a GPU."""
    return num_layers * NUM_OPERATIONS_A_LAYER + _NUM_OPERATIONS_AROUND


@dataclass(frozen=True)
class Device:
    """What one rank computes on. Rates are those reached, not those printed.

    Attributes:
        name: As on the command line.
        flops_16bit: Operations a second of large matrix products in bfloat16 or float16.
        flops_32bit: The same in float32, without TF32, as PyTorch does by default.
        bytes_per_s: Bytes a second read from memory.
        launches: What telling it costs.
        memory_bytes: Its memory; None if it is not known.
        reserved_bytes: Memory that is not for tensors: the driver's context, communication buffers.
        overlaps: Whether it reads, multiplies and is told what comes next at the same time, as a
            GPU does; a CPU core does one thing after the other.
        source: Where the figures come from.
        is_shared: Whether ranks share it, so that an idle rank leaves its time to the others.
        wait_s: Seconds that a rank waits after work for others that have not been given a core, on
            average, at the first message; 0 where each rank has a device of its own.
        kernel_s: Seconds that an operation takes the device however little it reads, and however
            early it was told: kernels start and end one after the other. On a CPU core this is
            measured as launching.
    """

    name: str
    flops_16bit: float
    flops_32bit: float
    bytes_per_s: float
    launches: Launches
    memory_bytes: int | None
    reserved_bytes: int
    overlaps: bool
    source: str
    is_shared: bool = False
    wait_s: float = 0.0
    kernel_s: float = 0.0

    def flops(self, element_bytes: int) -> float:
        """Returns operations a second with numbers of so many bytes."""
        return self.flops_16bit if element_bytes == 2 else self.flops_32bit


@dataclass(frozen=True)
class Link:
    """What connects ranks, in one direction.

    Attributes:
        name: As on the command line.
        bytes_per_s: Bytes a second that one rank sends while it receives as many, as reached.
        latency_s: Seconds of a collective without bytes.
        source: Where the figures come from.
    """

    name: str
    bytes_per_s: float
    latency_s: float
    source: str


def _gpu(
    name: str,
    *,
    bf16_tflops: float,
    fp32_tflops: float,
    tb_per_s: float,
    memory_gb: int,
    source: str,
) -> Device:
    """Returns a GPU by its printed figures, of which 80% and 90% are reached.

    791 of 989 TFLOP/s and 4.2 of 4.8 TB/s were measured on an H200, and a kernel's time in a CUDA
    graph of one token (docs/benchmarks/replay.json).
    """
    return Device(
        name,
        flops_16bit=0.8 * bf16_tflops * 1e12,
        flops_32bit=0.8 * fp32_tflops * 1e12,
        bytes_per_s=0.9 * tb_per_s * 1e12,
        launches=Launches.of_operations(6e-6),
        memory_bytes=memory_gb * _GB,
        reserved_bytes=2 * _GB,
        overlaps=True,
        source=source,
        kernel_s=2.5e-6,
    )


DEVICES = {
    device.name: device
    for device in (
        _gpu(
            "h200",
            bf16_tflops=989,
            fp32_tflops=67,
            tb_per_s=4.8,
            memory_gb=141,
            source="NVIDIA H200 SXM data sheet; 80% of products, 90% of bandwidth",
        ),
        _gpu(
            "h100",
            bf16_tflops=989,
            fp32_tflops=67,
            tb_per_s=3.35,
            memory_gb=80,
            source="NVIDIA H100 SXM data sheet; 80% of products, 90% of bandwidth",
        ),
        _gpu(
            "a100-80g",
            bf16_tflops=312,
            fp32_tflops=19.5,
            tb_per_s=2.039,
            memory_gb=80,
            source="NVIDIA A100 80GB SXM data sheet; 80% of products, 90% of bandwidth",
        ),
        Device(
            "cpu",
            flops_16bit=65e9,
            flops_32bit=65e9,
            bytes_per_s=6.5e9,
            launches=Launches(layer_s=0.6e-3, step_s=2e-3),
            memory_bytes=None,
            reserved_bytes=0,
            overlaps=False,
            source="one core of AMD EPYC, measured with float32 (docs/performance.md)",
        ),
    )
}
"""By name."""

LINKS = {
    link.name: link
    for link in (
        Link("nvlink4", 0.5 * 450 * _GB, 10e-6, "450 GB/s a direction (H100, H200 SXM), half used"),
        Link("nvlink3", 0.5 * 300 * _GB, 10e-6, "300 GB/s a direction (A100 SXM), half used"),
        Link("pcie5", 0.8 * 64 * _GB, 20e-6, "64 GB/s a direction (x16), 80% used"),
        Link("pcie4", 0.8 * 32 * _GB, 20e-6, "32 GB/s a direction (x16), 80% used"),
        Link("ib-400g", 0.9 * 50 * _GB, 40e-6, "400 Gb/s a GPU, 90% used"),
        Link("ib-200g", 0.9 * 25 * _GB, 40e-6, "200 Gb/s a GPU, 90% used"),
        Link("ib-100g", 0.9 * 12.5 * _GB, 40e-6, "100 Gb/s a GPU, 90% used"),
        Link("tcp-100g", 0.5 * 12.5 * _GB, 200e-6, "100 Gb/s Ethernet a GPU, half used"),
        Link("tcp-25g", 0.5 * 3.125 * _GB, 200e-6, "25 Gb/s Ethernet a GPU, half used"),
        Link("shm", 1.5 * _GB, 0.1e-3, "2 ranks on 2 cores (docs/benchmarks/collectives.json)"),
    )
}
"""By name; what the shares and latencies rest on is told in docs/planning.md."""

_LINK_WITHIN_HOST = {"h200": "nvlink4", "h100": "nvlink4", "a100-80g": "nvlink3", "cpu": "shm"}


def find_device(name: str) -> Device:
    """Returns a device by its name.

    Raises:
        ConfigError: There is none of this name.
    """
    if name not in DEVICES:
        raise _unknown("--gpu", name, DEVICES)
    return DEVICES[name]


def find_link(option: str, name: str | None, device: Device) -> Link:
    """Returns a link by its name, or that within a host of such devices.

    Raises:
        ConfigError: There is none of this name.
    """
    name = _LINK_WITHIN_HOST[device.name] if name is None else name
    if name not in LINKS:
        raise _unknown(option, name, LINKS)
    return LINKS[name]


def price_links(
    cluster: Cluster, ranks: Iterable[int], device: Device, *, within: Link, between: Link
) -> LinkPrices:
    """Returns what messages cost in a group of ranks, in one level and in two.

    In one level, bytes for ranks of the same host travel by one link while those for others travel
    by the other; all wait for the slower.

    Args:
        cluster: Where ranks are.
        ranks: Those of the group.
        device: What they compute on.
        within: What connects the ranks of a host.
        between: What connects hosts.
    """
    hosts = [cluster.locate(rank)[0] for rank in ranks]
    size, on_host = len(hosts), [hosts.count(host) for host in dict.fromkeys(hosts)]
    local = _LOCAL_PASSES / device.bytes_per_s
    if len(on_host) == 1:
        return LinkPrices(_group(size, within, 1.0), local_s_per_byte=local)
    share_out = (size - min(on_host)) / (size - 1)
    slower = max(share_out / between.bytes_per_s, (1 - share_out) / within.bytes_per_s)
    flat = _group(size, between, slower * between.bytes_per_s)
    if len(set(on_host)) > 1 or on_host[0] == 1:
        return LinkPrices(flat, local_s_per_byte=local)
    return LinkPrices(
        flat,
        across=_group(len(on_host), between, 1.0),
        within=_group(on_host[0], within, 1.0),
        local_s_per_byte=local,
    )


def _group(size: int, link: Link, share: float) -> GroupPrices:
    price = Price(link.latency_s, share / link.bytes_per_s)
    return GroupPrices(size, link.latency_s, exchange=price, gather=price, reduce=price)


def _unknown(option: str, name: str, known: Iterable[str]) -> ConfigError:
    names = list(known)
    close = nearest(name, names)
    hint = f" Did you mean {close}?" if close else ""
    return ConfigError(
        f"{option} {name}: not one of {', '.join(names)}.{hint} For other hardware measure it: "
        "--calibration FILE, written by launch/bench.py predict, replay or collectives."
    )
