"""Starts Python commands as forks of one process that has imported the libraries once.

An import of torch, transformers and DeepSpeed takes seconds, and a launch of N ranks has N + 2 of
them. A fork is, but for that, what a new interpreter would be: a process of its own with the
command's words, variables, files and folder. What a forked command starts is forked too: the
`deepspeed` command, its launcher and the ranks keep their places above and below each other.

Tests of the start itself run commands as users do, without this.
"""

import contextlib
import ctypes
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["ForkedCommand"]

_REPO = Path(__file__).resolve().parents[2]
# Room in which a fork writes its own words, for those who look a process up by its command.
_WORDS_BYTES = 1 << 16
_MESSAGE_BYTES = 1 << 18
_FIRST_OTHER_FILE, _END_OF_FILES = 3, 4096


class _Fork(subprocess.Popen[str]):
    """A command: if it is Python's, a fork of the process that starts it."""

    def _execute_child(  # one of subprocess's own: it starts the process that __init__ describes
        self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any, *rest: Any
    ) -> None:
        cwd, env, *_ = rest
        pipes, others = rest[5:11], rest[11:]
        words = [] if isinstance(args, str | bytes) else [os.fsdecode(word) for word in args]
        if not words or words[0] != sys.executable:
            super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, *rest)  # type: ignore[misc]
            return
        stdin, _, _, stdout, _, stderr = pipes
        variables = os.environ if env is None else env
        asked = {
            "words": words,
            "variables": {os.fsdecode(k): os.fsdecode(v) for k, v in variables.items()},
            "folder": os.getcwd() if cwd is None else os.fsdecode(cwd),
            "leads_session": bool(others[5]),
        }
        own = enumerate((stdin, stdout, stderr))
        self.pid = self._fork(asked, [number if given == -1 else given for number, given in own])
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    def _fork(self, asked: dict[str, Any], files: Sequence[int]) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _become(asked, files)
        return pid


class ForkedCommand(_Fork):
    """A Python command as a fork of the process that has imported the libraries.

    It is used as a `subprocess.Popen` is, and takes its arguments.
    """

    def _fork(self, asked: dict[str, Any], files: Sequence[int]) -> int:
        self._end, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            message = json.dumps(asked).encode()
            assert len(message) < _MESSAGE_BYTES
            socket.send_fds(_server(), [message], [theirs.fileno(), *files])
        return int(self._end.recv(_MESSAGE_BYTES))

    # The process is not a child of this one: its end is told.

    def _internal_poll(self, *args: Any, **kwargs: Any) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._wait(0)
        return self.returncode

    def _wait(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            self._end.settimeout(timeout)
            try:
                told = self._end.recv(_MESSAGE_BYTES)
            except (TimeoutError, BlockingIOError):
                assert timeout is not None
                raise subprocess.TimeoutExpired(self.args, timeout) from None
            self.returncode = int(told)
            self._end.close()
        return self.returncode


_lock = threading.Lock()
_started: list[tuple[socket.socket, subprocess.Popen[bytes]]] = []


def _server() -> socket.socket:
    """Returns what to ask for forks; the process that makes them is started the first time."""
    with _lock:
        if not _started:
            own, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                number = theirs.fileno()
                command = [sys.executable, "-u", __file__, str(number), " " * _WORDS_BYTES]
                path = os.pathsep.join(filter(None, [str(_REPO), os.environ.get("PYTHONPATH")]))
                env = {**os.environ, "PYTHONPATH": path}
                server = subprocess.Popen(
                    command, env=env, pass_fds=[number], start_new_session=True
                )
            _started.append((own, server))
        return _started[0][0]


def _serve(requests: socket.socket) -> None:
    """Forks whatever is asked for, tells its end, and ends with who asks."""
    from tests.helpers import imported_once  # noqa: F401

    gc.collect()
    gc.freeze()
    running: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as events:
        events.register(requests, selectors.EVENT_READ)
        while True:
            for key, _ in events.select():
                if key.fd == requests.fileno():
                    message, files, _, _ = socket.recv_fds(requests, _MESSAGE_BYTES, 4)
                    if not message:
                        return
                    teller = socket.socket(fileno=files[0])
                    pid = os.fork()
                    if pid == 0:
                        _become(json.loads(message), files[1:])
                    for number in files[1:]:
                        os.close(number)
                    teller.send(str(pid).encode())
                    ended = os.pidfd_open(pid)
                    running[ended] = teller
                    events.register(ended, selectors.EVENT_READ, pid)
                else:
                    events.unregister(key.fd)
                    os.close(key.fd)
                    _, status = os.waitpid(key.data, 0)
                    with running.pop(key.fd) as teller, contextlib.suppress(OSError):
                        teller.send(str(os.waitstatus_to_exitcode(status)).encode())


def _become(asked: dict[str, Any], files: Sequence[int]) -> NoReturn:
    """Becomes the command, and ends with it."""
    code = 1
    try:
        if asked["leads_session"]:
            os.setsid()
        for number, given in enumerate([os.dup(each) for each in files]):
            os.dup2(given, number)
        os.closerange(_FIRST_OTHER_FILE, _END_OF_FILES)
        os.environ.clear()
        os.environ.update(asked["variables"])
        os.chdir(asked["folder"])
        _show_words(asked["words"])
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGCHLD):
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        subprocess.Popen = _Fork  # type: ignore[assignment,misc]
        _run(asked["words"][1:])
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code & 0xFF)


def _run(words: list[str]) -> None:
    """Does what Python does with the words after its name: options, then a script or a module."""
    if words[0] == "-u":  # as the server is
        words = words[1:]
    sys.path[0] = os.getcwd()
    if words[0] == "-m":
        sys.argv = words[1:]
        # It may have been imported, on purpose.
        warnings.filterwarnings("ignore", ".* found in sys.modules", RuntimeWarning)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(words[1], {"__name__": "__main__"})
    else:
        assert not words[0].startswith("-"), f"a fork cannot run python {words}"
        sys.argv = words
        sys.path[0] = str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")


def _show_words(words: Sequence[str]) -> None:
    """Writes the words to where the kernel reads a process's command from."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    text = b"".join(os.fsencode(word) + b"\0" for word in words)[: end - start - 1]
    ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


if __name__ == "__main__":
    # Forks are to find this module under its own name.
    from tests.helpers import forks

    forks._serve(socket.socket(fileno=int(sys.argv[1])))
