"""Starts the ranks of a host as forks of one process, which has imported what they all need.

To import torch, transformers and DeepSpeed takes each rank seconds and a quarter of a GiB; 64 of
them on one small machine take minutes, and more memory than it may have. DeepSpeed's launcher
starts this file in place of a rank. It hands over its files, variables and arguments to the host's
server, which forks the rank, passes signals on to it and gives its exit code back.

Use: DS_MOE_EP_RANKS=SCRIPT:MODULE,... deepspeed ... shared_start.py ARGS (MODULE: what to import)
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

__all__ = ["shared_start"]

_VARIABLE = "DS_MOE_EP_RANKS"
_CONNECT_S = 60.0
_FILES = (0, 1, 2)
_MESSAGE_BYTES = 1 << 18


def shared_start(script: Path, *modules: str) -> tuple[Path, dict[str, str]]:
    """Returns what to launch in place of a script, and the environment variable it needs.

    Args:
        script: What every rank runs, as ``__main__``.
        modules: What is imported once for all ranks of a host.
    """
    return Path(__file__).resolve(), {_VARIABLE: f"{script}:{','.join(modules)}"}


def main() -> int:
    """Asks for a rank and waits for its end; returns its exit code."""
    # An abstract address: there is one for each network namespace, that is, for each host.
    address = f"\0ds_moe_ep-ranks-{os.environ['MASTER_PORT']}"
    if os.environ["LOCAL_RANK"] == "0" and os.fork() == 0:
        _serve(address)
    with _connect(address) as server:
        asked = {"argv": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ)}
        socket.send_fds(server, [json.dumps(asked).encode()], list(_FILES))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda caught, frame: server.send(bytes([caught])))
        answer = b""
        with contextlib.suppress(ConnectionResetError):  # it has ended before it heard
            answer = server.recv(_MESSAGE_BYTES)
    code = int(answer) if answer else 1  # no answer: the server has said why
    if code < 0:  # by a signal: end by it too
        with contextlib.suppress(OSError):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def _connect(address: str) -> socket.socket:
    until_s = time.monotonic() + _CONNECT_S
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    while True:
        try:
            server.connect(address)
            return server
        except ConnectionRefusedError:  # it does not listen yet
            if time.monotonic() > until_s:
                raise
            time.sleep(0.01)


def _serve(address: str) -> None:
    """Forks a rank for each that asks, and stays until all have ended."""
    script, modules = os.environ[_VARIABLE].split(":")
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
        selectors.DefaultSelector() as events,
    ):
        listener.bind(address)
        listener.listen(int(os.environ["LOCAL_SIZE"]))
        for module in filter(None, modules.split(",")):
            importlib.import_module(module)
        # Shared pages stay so as long as nobody writes to them, and the collector would.
        gc.collect()
        gc.freeze()
        listener.settimeout(_CONNECT_S)
        for _ in range(int(os.environ["LOCAL_SIZE"])):
            client, _ = listener.accept()
            asked, files, _, _ = socket.recv_fds(client, _MESSAGE_BYTES, len(_FILES))
            pid = os.fork()
            if pid == 0:
                _run_rank(script, json.loads(asked), files)
            for descriptor in files:
                os.close(descriptor)
            rank = _Rank(pid, os.pidfd_open(pid), client)
            events.register(rank.ended, selectors.EVENT_READ, rank)
            events.register(client, selectors.EVENT_READ, rank)
        while events.get_map():
            (key, _), *_ = events.select()  # one at a time: the end of a rank closes its client
            rank = key.data
            if key.fd == rank.ended:
                events.unregister(rank.ended)
                with contextlib.suppress(KeyError):
                    events.unregister(rank.client)
                rank.tell_its_end()
            elif not rank.pass_signal_on():
                events.unregister(rank.client)
    os._exit(0)


@dataclass(frozen=True)
class _Rank:
    """A forked rank, a descriptor that tells its end, and who asked for it."""

    pid: int
    ended: int
    client: socket.socket

    def tell_its_end(self) -> None:
        _, status = os.waitpid(self.pid, 0)
        with contextlib.suppress(OSError):  # its client may be gone
            self.client.send(str(os.waitstatus_to_exitcode(status)).encode())
        self.client.close()
        os.close(self.ended)

    def pass_signal_on(self) -> bool:
        """Signals the rank as its client was; returns whether the client is still there."""
        try:
            caught = self.client.recv(1)
        except OSError:
            caught = b""
        os.kill(self.pid, caught[0] if caught else signal.SIGKILL)  # only a killed one says nothing
        return bool(caught)


def _run_rank(script: str, asked: dict, files: list[int]) -> None:
    """Becomes the rank that was asked for, and ends with it."""
    code = 1
    try:
        for descriptor, own in zip(files, _FILES, strict=True):
            os.dup2(descriptor, own)
        os.environ.clear()
        os.environ.update(asked["env"])
        os.chdir(asked["cwd"])
        sys.argv = [script, *asked["argv"]]
        sys.path[0] = str(Path(script).parent)
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
