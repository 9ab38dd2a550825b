"""Rows by shared memory: more than fit at once, a rank that does not come, slots used again."""

import time

import pytest
import torch
import torch.distributed as dist

from ds_moe_ep.dist import shared_memory
from ds_moe_ep.dist.collectives import Communicator
from ds_moe_ep.dist.shared_memory import SharedMemory
from ds_moe_ep.errors import DistributedError
from tests.helpers import run_ranks

_WORLD_SIZE = 3


def _open(total_bytes: int = 3 * 2 * 4096, timeout_s: float = 60.0) -> SharedMemory | None:
    return SharedMemory.open(dist.group.WORLD, total_bytes=total_bytes, timeout_s=timeout_s)


def _rounds(rank: int, memory: SharedMemory) -> None:
    """Ranks that come early and late in turn read what was meant for the round."""
    for round_ in range(60):
        if round_ % _WORLD_SIZE == rank:
            time.sleep(0.001)
        rows = torch.full((1 + rank, 4), 100 * round_ + rank)
        gathered = memory.gather(rows, [1, 2, 3])
        assert gathered[:, 0].tolist() == [100 * round_ + r for r in (0, 1, 1, 2, 2, 2)]


def _results_stay(rank: int, memory: SharedMemory) -> None:
    """What came is not what later exchanges write over."""
    row, ones = torch.full((1, 2), rank), [1, 1, 1]
    came = [memory.gather(row, ones), memory.exchange(row.repeat(3, 1), ones, ones)]
    came += [memory.gather(row.repeat(3, 1), [3, 3, 3])[::3], memory.sum(row)]
    for _ in range(4):
        memory.gather(torch.full((3, 2), -1), [3, 3, 3])
    assert [rows[:, 1].tolist() for rows in came] == [[0, 1, 2]] * 3 + [[3]]


def _many_rows(rank: int, memory: SharedMemory) -> None:
    """They go slot by slot, 512 rows of two numbers each; what is done meanwhile is done once."""
    counts, done = [1, 1300, 512], []
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    rows = torch.arange(2.0 * sum(counts)).view(-1, 2)
    gathered = memory.gather(rows[own], counts, lambda: done.append("gather"))
    torch.testing.assert_close(gathered, rows, rtol=0, atol=0)
    summed = memory.reduce(rows * (rank + 1), counts, lambda: done.append("reduce"))
    torch.testing.assert_close(summed, 6 * rows[own], rtol=0, atol=0)
    # So many rows from each rank to each: next to none, parts of slots, more than a slot.
    sends = [[0, 3, 700], [600, 0, 0], [511, 2, 1030]]
    recvs = [send[rank] for send in sends]
    sent = [torch.arange(2.0 * sum(send)).view(-1, 2) + 10_000 * r for r, send in enumerate(sends)]
    received = memory.exchange(sent[rank], sends[rank], recvs, lambda: done.append("exchange"))
    parts = [rows_of.split(send)[rank] for rows_of, send in zip(sent, sends, strict=True)]
    torch.testing.assert_close(received, torch.cat(parts), rtol=0, atol=0)
    nothing = memory.exchange(rows[:0], [0, 0, 0], [0, 0, 0])
    assert nothing.shape == (0, 2)
    assert done == ["gather", "reduce", "exchange"]
    assert memory.gather(rows[rank : rank + 1], [1, 1, 1])[:, 0].tolist() == [0.0, 2.0, 4.0]


def _rows_wider_than_a_slot(rank: int, memory: SharedMemory) -> None:
    """They go by gloo, on all ranks alike."""
    wide = torch.full((1, 1025), float(rank))
    assert memory.holds(wide[:, :1024]) and not memory.holds(wide)
    comm = Communicator(dist.group.WORLD, shared=memory)
    assert comm.sum_over_ranks(wide).unique().tolist() == [3.0]
    (gathered,) = comm.gather_rows((wide,), [1, 1, 1])
    assert gathered[:, -1].tolist() == [0.0, 1.0, 2.0]
    assert comm.reduce_rows(gathered, [1, 1, 1]).unique().tolist() == [3.0 * rank]
    (received,) = comm.exchange_rows((wide.repeat(3, 1),), [1, 1, 1], [1, 1, 1])
    assert received[:, -1].tolist() == [0.0, 1.0, 2.0]


def _modes_change(rank: int, memory: SharedMemory) -> None:
    """A dtype that came first in inference mode comes again with gradients recorded."""
    rows = torch.full((1, 2), float(rank), dtype=torch.float64)
    with torch.inference_mode():
        assert memory.gather(rows, [1, 1, 1])[:, 1].tolist() == [0.0, 1.0, 2.0]
    with torch.enable_grad():
        assert memory.sum(rows).tolist() == [[3.0, 3.0]]


def _sums_are_of_float32(rank: int, memory: SharedMemory) -> None:
    partial = torch.tensor([[256.0, 1.0]] * 3, dtype=torch.bfloat16) if rank == 0 else None
    partial = torch.full((3, 2), 1.0, dtype=torch.bfloat16) if partial is None else partial
    total = memory.reduce(partial, [1, 1, 1])
    assert total.dtype == torch.bfloat16
    assert total.tolist() == [[258.0, 3.0]]  # bfloat16 cannot add 1 to 256
    assert memory.sum(partial).tolist() == [[258.0, 3.0]] * 3


def _a_clock_that_is_set_ends_no_wait(rank: int, memory: SharedMemory) -> None:
    now_s = time.time
    time.time = lambda: now_s() - 3600.0
    if rank == 2:
        time.sleep(0.5)
    assert memory.gather(torch.full((1, 1), rank), [1, 1, 1])[:, 0].tolist() == [0, 1, 2]
    time.time = now_s


def _run(rank: int, world_size: int) -> list[str]:
    memory = _open()
    for case in (
        _rounds,
        _results_stay,
        _many_rows,
        _rows_wider_than_a_slot,
        _modes_change,
        _sums_are_of_float32,
        _a_clock_that_is_set_ends_no_wait,
    ):
        case(rank, memory)
    shared_memory._FOLDER = "/nowhere" if rank == 0 else shared_memory._FOLDER
    assert _open() is None
    shared_memory._FOLDER = "/dev/shm"
    assert _open(total_bytes=2**50) is None  # no room
    return [_message_of_late_ranks(rank), _message_of_a_rank_that_ends_with_the_lock(rank)]


def _message_of_late_ranks(rank: int) -> str:
    impatient = _open(timeout_s=0.2)
    if rank != 0:
        return ""
    with pytest.raises(DistributedError) as late:
        impatient.gather(torch.ones(1, 1), [1, 1, 1])
    return str(late.value)


def _message_of_a_rank_that_ends_with_the_lock(rank: int) -> str:
    memory = _open(timeout_s=0.5)
    if rank == 1:
        memory._meeting._wait_for(memory._meeting._lock)
    dist.barrier()
    if rank != 0:
        return ""
    with pytest.raises(DistributedError) as held:
        memory.sum(torch.ones(1, 1))
    return str(held.value)


def test_exchanges_of_three_ranks(tmp_path):
    late, held = run_ranks(_run, _WORLD_SIZE, tmp_path)[0]
    assert late.startswith("rank 1, rank 2 of 3 on ")
    assert "did not come to an exchange of rows within 0.2 s" in late
    assert held.startswith("rank 1, rank 2 of 3 on ")
