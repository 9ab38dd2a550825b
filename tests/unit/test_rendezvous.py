"""What a rank on another host finds where rank 0 should listen, and how long it takes to say so."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from ds_moe_ep.dist import rendezvous
from ds_moe_ep.errors import DistributedError, PlanError
from ds_moe_ep.local_machine import free_port

_STRANGER = "what listens there does not answer as rank 0 of this job does"


@contextlib.contextmanager
def _listener(answer: bytes | None) -> Iterator[int]:
    """Something else on a port: it answers this and hangs up, or (None) takes calls in silence."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    caller, _ = listener.accept()
                    with caller, contextlib.suppress(OSError):
                        caller.sendall(answer or b"")

        if answer is not None:
            threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # ends the waiting of `accept`


@contextlib.contextmanager
def _store_of_another_job() -> Iterator[int]:
    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    store.set("arrived/0", b"")
    yield store.port


def _refusal(port: int, monkeypatch, **patience: float) -> tuple[str, float]:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    start_s = time.monotonic()
    with pytest.raises(DistributedError) as refused:
        rendezvous.join_process_group(1, 2, backend="gloo", timeout_s=1, **patience)
    return str(refused.value), time.monotonic() - start_s


@pytest.mark.parametrize(
    "found",
    [
        pytest.param(lambda: _listener(None), id="silent"),
        pytest.param(lambda: _listener(b""), id="hangs-up"),
        pytest.param(lambda: _listener(b"HTTP/1.1 400 Bad Request\r\n\r\n"), id="http"),
        pytest.param(_store_of_another_job, id="another-job"),
    ],
)
def test_a_stranger_on_the_port_is_told_long_before_the_start_timeout(found, monkeypatch):
    monkeypatch.setattr(rendezvous, "_RANK_0_S", 1.0)
    with found() as port:
        told, took_s = _refusal(port, monkeypatch, start_timeout_s=60)
    assert f"the 2 ranks did not meet at 127.0.0.1:{port}: {_STRANGER}." in told
    ways = "deepspeed --master_port P, or MASTER_PORT=P for run.sh and run.sbatch"
    assert f"a port in use ({ways})" in told
    assert took_s < 30


def test_nobody_is_waited_for_as_long_as_ranks_may_take_to_start(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and nobody listens
        port = free.getsockname()[1]
        told, took_s = _refusal(port, monkeypatch, start_timeout_s=1.2)
    assert f"{port}: nobody has listened there for 1 s (Connection refused)." in told
    assert 1.2 < took_s < 30


def test_rank_0_may_come_late(monkeypatch):
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    stores = []
    late = threading.Timer(1.0, lambda: stores.append(rendezvous._open_store(0, 2, 60, "")))
    late.start()
    store = rendezvous._open_store(1, 2, 60, "")
    late.join()
    store.wait(["arrived/0", "arrived/1"], timedelta(seconds=30))
    rendezvous._wait_for_all(stores[0], 2, 30)


def test_what_all_ranks_have_told_is_checked_before_their_group_starts(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    heard = []

    def refuse(told: list[str]) -> None:
        heard.append(told)
        raise PlanError("b has no GPU")

    def join(rank: int) -> None:
        with pytest.raises(PlanError, match="b has no GPU"):
            rendezvous.join_process_group(
                rank,
                2,
                backend="gloo",
                start_timeout_s=30,
                timeout_s=1,
                told=f"rank {rank}",
                check=refuse,
            )

    with ThreadPoolExecutor(2) as ranks:
        list(ranks.map(join, range(2)))
    assert heard == [["rank 0", "rank 1"]] * 2
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("own", "rank_0", "towards_rank_0", "named"),
    [
        ("127.0.1.1", "rank-0", "10.0.0.7", "eth7"),  # Debian's
        (None, "rank-0", "10.0.0.7", "eth7"),  # a name that nobody knows
        ("10.0.0.7", "rank-0", "10.0.0.7", None),  # gloo finds it by itself
        ("127.0.1.1", "rank-0", "127.0.1.1", "eth0"),  # rank 0 is here, by a name
        ("127.0.1.1", "127.0.0.1", "127.0.0.1", None),  # all ranks are on this machine
    ],
)
def test_gloo_is_told_the_interface_where_the_hosts_name_leads_to_itself(
    monkeypatch, own, rank_0, towards_rank_0, named
):
    def resolve(name: str) -> str:
        if name[0].isdigit():
            return name
        if own is None:
            raise socket.gaierror("unknown")
        return own

    class Towards:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def connect(self, where):
            self.address = towards_rank_0 if where == (rank_0, 1) else "10.0.0.1"

        def getsockname(self):
            return self.address, 12345

    # Set, so that it is put back; then taken away.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setenv("MASTER_ADDR", rank_0)
    monkeypatch.setattr(rendezvous.socket, "gethostbyname", resolve)
    monkeypatch.setattr(rendezvous.socket, "socket", lambda type: Towards())
    monkeypatch.setattr(
        rendezvous, "_interface_of", {"10.0.0.7": "eth7", "10.0.0.1": "eth0"}.__getitem__
    )
    rendezvous._name_interface()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == named


def test_an_address_has_its_interface():
    assert rendezvous._interface_of("127.0.0.1") == "lo"
    with pytest.raises(OSError, match=r"no interface has 192\.0\.2\.1"):
        rendezvous._interface_of("192.0.2.1")


def test_the_interface_is_named_before_the_group_starts(monkeypatch):
    def named() -> None:
        raise LookupError("before the group")

    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setattr(rendezvous, "_name_interface", named)
    with pytest.raises(LookupError, match="before the group"):
        rendezvous.join_process_group(0, 1, backend="gloo", start_timeout_s=30, timeout_s=1)
    assert not dist.is_initialized()
