"""How the ranks of a job find each other, within a bound, and who is named if some do not come.

Ranks of a large job come up minutes apart (64 Python processes on a few cores), so this wait has a
bound of its own, longer than that of any later one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from ds_moe_ep.errors import DistributedError

__all__ = ["RollCall", "join_process_group", "told_if_not_met"]

T = TypeVar("T")

_SHOWN = 8
_ANSWER_S = 4.0  # the store answers within milliseconds, or its rank has ended or was stopped
_LOOK_S = 0.1
_KNOCK_S = 0.5
# Rank 0 says that it is there as soon as it listens; it may have to wait for a core to do so.
_RANK_0_S = 20.0
# An address that nobody has (RFC 5737): the way there is the default route.
_ANYWHERE = "192.0.2.1"
_SIOCGIFADDR = 0x8915  # of Linux: the IPv4 address of an interface


def join_process_group(
    rank: int,
    world_size: int,
    *,
    backend: str,
    start_timeout_s: float,
    timeout_s: float,
    told: str = "",
    check: Callable[[list[str]], None] = lambda told: None,
) -> RollCall:
    """Waits for all ranks at MASTER_ADDR:MASTER_PORT, then starts the default process group.

    Args:
        rank: This rank.
        world_size: How many there are.
        backend: ``gloo`` or ``nccl``.
        start_timeout_s: How long to wait for the last rank to come up.
        timeout_s: How long any later wait in the group may last.
        told: What this rank tells the others when it comes.
        check: Is given what each has told before the group starts, on every rank.

    Returns:
        What tells the ranks of each other if the job breaks.

    Raises:
        DistributedError: Some ranks did not come; it names them. Or something else listens there.
    """
    with told_if_not_met(rank, world_size):
        store = _open_store(rank, world_size, start_timeout_s, told)
        _wait_for_all(store, world_size, start_timeout_s)
        check(_hear_all(store, rank, world_size))
        _name_interface()
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    return RollCall(store, rank, world_size)


@contextlib.contextmanager
def told_if_not_met(rank: int, world_size: int) -> Iterator[None]:
    """Makes of what keeps ranks from connecting to each other an error that says where to look.

    Raises:
        DistributedError: They did not.
    """
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        yield
    except (dist.DistError, RuntimeError, _NotMetError) as error:
        raise DistributedError(
            f"[rank {rank} {os.uname().nodename}] the {world_size} ranks did not meet at "
            f"{where}: {str(error).rstrip('.')}. Look for a rank that did not start, a port in "
            "use (deepspeed --master_port P, or MASTER_PORT=P for run.sh and run.sbatch) or a "
            "wrong network (deepspeed --master_addr A, or MASTER_ADDR=A for run.sh; "
            "GLOO_SOCKET_IFNAME=I and NCCL_SOCKET_IFNAME=I as lines of ~/.deepspeed_env)."
        ) from error


class RollCall:
    """Who is still there, above all when a job breaks, asked through the store of the rendezvous.

    Every rank that finds the job broken answers. The store lives in rank 0 and may be gone too, so
    no question waits for it for long.

    Attributes:
        store: That store.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self.store = store
        self._rank = rank
        self._world_size = world_size

    def with_own_client(self) -> RollCall:
        """Returns one for another thread: a client of the store answers one question at a time."""
        return RollCall(self.store.clone(), self._rank, self._world_size)

    def tell(self, words: str) -> None:
        """Leaves words of this rank for the others; waits for the store for as long as it takes."""
        self.store.set(_arrived(self._rank), words.encode())

    def hear(self, ranks: Sequence[int]) -> dict[int, str]:
        """Returns the last words of each, "" of one that has only arrived; waits as `tell` does."""
        told = self.store.multi_get([_arrived(rank) for rank in ranks])
        return {rank: words.decode() for rank, words in zip(ranks, told, strict=True)}

    def has_rank_failed(self) -> bool:
        """Returns whether any has answered; waits as `tell` does."""
        return self.store.add("num_failed", 0) > 0

    def answer(self) -> bool | None:
        """Says that this rank is there, and has failed.

        Returns:
            Whether it is the first; None if the store cannot be reached.
        """

        def tell() -> bool:
            self.store.set(f"failed/{self._rank}", b"")
            return self.store.add("num_failed", 1) == 1

        return _within(_ANSWER_S, tell)

    def silent_ranks(self, wait_s: float) -> list[int] | None:
        """Waits for all ranks to answer, and returns those that do not; None without a store."""
        deadline_s = time.monotonic() + wait_s
        while True:
            silent = _within(_ANSWER_S, self._not_answered)
            if not silent or time.monotonic() > deadline_s:
                return silent
            time.sleep(_LOOK_S)

    def _not_answered(self) -> list[int]:
        keys = [f"failed/{rank}" for rank in range(self._world_size)]
        return [rank for rank, key in enumerate(keys) if not self.store.check([key])]


def _within(timeout_s: float, ask: Callable[[], T]) -> T | None:
    """Returns what the store answers; None if it fails or takes too long.

    A client of the store waits for ever for a server that was stopped.
    """
    answers: list[T] = []

    def run() -> None:
        try:
            answers.append(ask())
        except (dist.DistError, RuntimeError):
            pass

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return answers[0] if answers else None


class _NotMetError(Exception):
    """Some ranks did not come, or somebody else was there."""


def _open_store(rank: int, world_size: int, timeout_s: float, told: str) -> dist.Store:
    """Opens the store that torch's own rendezvous would, but one that can say who is missing."""
    # Under torch's elastic agent, which accelerate uses, the agent holds the store.
    agent_holds_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_master = rank == 0 and not agent_holds_it
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])

    def connect() -> dist.Store:
        store = dist.TCPStore(
            host,
            port,
            world_size,
            is_master=is_master,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        own = dist.PrefixStore(f"ds_moe_ep/{_command_digest()}/{attempt}", store)
        own.set(_told(rank), told.encode())
        own.set(_arrived(rank), b"")
        if not agent_holds_it:
            own.wait([_arrived(0)], timedelta(seconds=_RANK_0_S))
        return own

    if is_master:
        return connect()
    _wait_for_listener(host, port, timeout_s)
    # Rank 0 can be nowhere else. A client of torch's waits for ever for what takes its connection
    # and keeps silent.
    store = _within(_RANK_0_S, connect)
    if store is None:
        raise _NotMetError("what listens there does not answer as rank 0 of this job does")
    return store


def _wait_for_listener(host: str, port: int, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host, port), timeout=_ANSWER_S).close()
            return
        except OSError as error:
            if time.monotonic() > deadline_s:
                raise _NotMetError(
                    f"nobody has listened there for {timeout_s:.0f} s ({error.strerror or error})"
                ) from error
        time.sleep(_KNOCK_S)


def _arrived(rank: int) -> str:
    return f"arrived/{rank}"


def _told(rank: int) -> str:
    return f"told/{rank}"


def _hear_all(store: dist.Store, rank: int, world_size: int) -> list[str]:
    """Returns what each rank has told, on rank 0 once all have heard it: the store is there."""
    told = store.multi_get([_told(each) for each in range(world_size)])
    store.set(f"heard/{rank}", b"")
    if rank == 0:
        heard = [f"heard/{each}" for each in range(world_size)]
        with contextlib.suppress(dist.DistStoreError):
            store.wait(heard, timedelta(seconds=_RANK_0_S))
    return [words.decode() for words in told]


def _command_digest() -> str:
    """Tells this job from another one that has taken the port and is still gathering its ranks."""
    words = [word for word in sys.argv if not word.startswith("--local_rank=")]
    return hashlib.sha256("\0".join(words).encode(errors="surrogateescape")).hexdigest()


def _wait_for_all(store: dist.Store, world_size: int, timeout_s: float) -> None:
    arrived = [_arrived(rank) for rank in range(world_size)]
    try:
        store.wait(arrived, timedelta(seconds=timeout_s))
    except dist.DistStoreError as error:
        missing = [each for each, key in enumerate(arrived) if not store.check([key])]
        shown = ", ".join(map(str, missing[:_SHOWN])) + (" ..." if len(missing) > _SHOWN else "")
        raise _NotMetError(
            f"{len(missing)} of {world_size} ranks did not come within {timeout_s:.0f} s: {shown}"
        ) from error


def _name_interface() -> None:
    """Tells gloo by which interface other hosts reach this one, where its name does not.

    gloo takes the address that the host's own name has, which on Debian is 127.0.1.1. Where rank 0
    is reached by such a name and is here, others come by the default route.
    """
    rank_0 = os.environ["MASTER_ADDR"]
    are_all_here = rank_0 == "localhost" or rank_0.startswith("127.")
    if are_all_here or "GLOO_SOCKET_IFNAME" in os.environ or not _is_loopback(socket.gethostname()):
        return
    for place in (rank_0, _ANYWHERE):
        with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as towards_it:
            towards_it.connect((place, 1))  # nothing is sent
            address = towards_it.getsockname()[0]
            if not _is_loopback(address):
                os.environ["GLOO_SOCKET_IFNAME"] = _interface_of(address)
                return


def _is_loopback(name: str) -> bool:
    """Returns whether a name has an address of this machine alone, or none."""
    try:
        return socket.gethostbyname(name).startswith("127.")
    except OSError:
        return True


def _interface_of(address: str) -> str:
    """Returns the interface that has an IPv4 address; OSError if none has."""
    with socket.socket(type=socket.SOCK_DGRAM) as asks:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has none
                found = fcntl.ioctl(asks, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    raise OSError(errno.ENODEV, f"no interface has {address}")
