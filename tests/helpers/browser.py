"""A page in headless Chromium: seen in a size and colour scheme, asked, and heard complaining."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["CHROMIUM_MISSING", "Browser", "find_chromium", "open_browser"]

CHROMIUM_MISSING = "needs Chromium: sudo apt-get install -y chromium"

_ANSWER_BYTES = 1 << 16
_PATIENCE_S = 60.0


def find_chromium() -> str | None:
    """Returns the browser's path, or None if there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


class Browser:
    """A tab, told what to do over Chromium's debugging pipe.

    Attributes:
        complaints: What the console showed, exceptions, and requests that failed or were made to
            anything but the page's own file.
    """

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._unread = b""
        self._last_id = 0
        self._session: str | None = None
        self._events: list[str] = []
        self._allowed = ""
        self.complaints: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, path: Path, *, width: int, height: int = 900, is_dark: bool = False) -> None:
        """Shows a file, and waits until it is drawn."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self.resize(width, height)
        self._allowed = path.absolute().as_uri()
        self._events.clear()
        self._call("Page.navigate", url=self._allowed)
        while "Page.loadEventFired" not in self._events:
            self._read()

    def resize(self, width: int, height: int) -> None:
        """Gives the page a size, in CSS pixels; narrow ones are those of a phone."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def ask(self, expression: str) -> Any:
        """Returns the value of a JavaScript expression on the page."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self) -> bytes:
        """Returns the page as it is seen, as PNG."""
        return base64.b64decode(self._call("Page.captureScreenshot")["data"])

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._last_id += 1
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._last_id:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            assert select.select([self._from], [], [], _PATIENCE_S)[0], "the browser says nothing"
            new = os.read(self._from, _ANSWER_BYTES)
            assert new, "the browser has ended"
            self._unread += new
        text, _, self._unread = self._unread.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if "method" in message:
            self._hear(message["method"], message["params"])
        return message

    def _hear(self, event: str, params: dict[str, Any]) -> None:
        self._events.append(event)
        if event in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.complaints.append(f"{event}: {params}")
        elif event == "Network.loadingFailed":
            self.complaints.append(f"not loaded: {params}")
        elif event == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if url != self._allowed and not url.startswith("data:"):
                self.complaints.append(f"asked for {url}")


@contextlib.contextmanager
def open_browser(executable: str, profile: Path) -> Iterator[Browser]:
    """Starts the browser with an empty profile, and ends it.

    Args:
        executable: What `find_chromium` found.
        profile: A folder for its files.
    """
    commands_read, commands_write = os.pipe()
    answers_read, answers_write = os.pipe()
    options = ["--headless", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}"]
    options += ["--remote-debugging-pipe", "--hide-scrollbars", "--disable-dev-shm-usage"]
    if os.geteuid() == 0:
        options.append("--no-sandbox")  # root has no sandbox there
    # The pipes are to be its files 3 and 4.
    script = f'exec "$@" 3<&{commands_read} 4>&{answers_write}'
    process = subprocess.Popen(
        ["bash", "-c", script, "bash", executable, *options],
        pass_fds=(commands_read, answers_write),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(commands_read)
    os.close(answers_write)
    try:
        yield Browser(commands_write, answers_read)
    finally:
        os.close(commands_write)  # it ends when nobody can tell it anything any more
        os.close(answers_read)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
