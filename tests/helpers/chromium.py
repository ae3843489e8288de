# SPDX-License-Identifier: Apache-2.0
"""A headless Chromium of the system, driven through a pipe: a page at a given size, JavaScript in
it, its picture.

Protocol: https://chromedevtools.github.io/devtools-protocol/, messages of JSON that end in a zero
byte, on file descriptors 3 and 4.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "chrome")
TIMEOUT_S = 60


def find() -> str | None:
    """The path of a Chromium; None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One tab."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = write, read
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.requests: list[str] = []  # URLs that the page asked for, those of data left out
        self.errors: list[str] = []  # exceptions of the page, and what its console calls an error
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result

    def open(self, path: Path, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Load a file in a window of this size and wait until it is complete."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.requests.clear()
        self.errors.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        deadline = time.monotonic() + TIMEOUT_S
        while (
            self.js("document.readyState + location.href") != "complete" + path.resolve().as_uri()
        ):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{path}: not loaded within {TIMEOUT_S} s")
            time.sleep(0.05)

    def js(self, expression: str) -> Any:
        """The value of an expression, which must be JSON."""
        result = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def picture(self, path: Path) -> None:
        """The whole page as a PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], TIMEOUT_S)[0]:
                raise TimeoutError(f"Chromium was silent for {TIMEOUT_S} s")
            data = os.read(self._read, 1 << 16)
            if not data:
                raise RuntimeError("Chromium ended")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        answer: dict[str, Any] = json.loads(message)
        method, told = answer.get("method"), answer.get("params", {})
        if method == "Runtime.exceptionThrown" or (
            method == "Runtime.consoleAPICalled" and told["type"] == "error"
        ):
            self.errors.append(json.dumps(told)[:500])
        if method == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.errors.append(told["entry"]["text"])
        if answer.get("method") == "Network.requestWillBeSent":
            url = answer["params"]["request"]["url"]
            if not url.startswith("data:"):
                self.requests.append(url)
        return answer


@contextmanager
def open_page(executable: str, profile: Path) -> Iterator[Page]:
    """Start Chromium with a profile folder of its own; it ends with the block."""
    to_read, write = os.pipe()
    read, to_write = os.pipe()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    options += ["--no-first-run", "--disable-background-networking", "--hide-scrollbars"]
    command = [executable, *options, f"--user-data-dir={profile}", "--remote-debugging-pipe"]
    # It reads from 3 and writes to 4. Copies above 9 first, as the pipe's own numbers may be these.
    copies = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (to_read, to_write)]
    actions: list[tuple[Any, ...]] = [
        (os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(copies, 3)
    ]
    actions.append((os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0))
    pid = os.posix_spawn(executable, command, os.environ, file_actions=actions)
    for fd in (to_read, to_write, *copies):
        os.close(fd)
    try:
        yield Page(write, read)
    finally:
        os.close(write)  # Chromium ends with its pipe
        os.close(read)
        _end(pid)


def _end(pid: int) -> None:
    """Wait for a child; make it end where it does not do so by itself."""
    for seconds, after in ((10, signal.SIGTERM), (10, signal.SIGKILL)):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if os.waitpid(pid, os.WNOHANG)[0]:
                return
            time.sleep(0.05)
        os.kill(pid, after)
    os.waitpid(pid, 0)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A tab for the tests of a module; skips where there is no Chromium."""
    executable = find()
    if executable is None:
        pytest.skip("needs a Chromium: apt-get install chromium-headless-shell")
    with open_page(executable, tmp_path_factory.mktemp("profile")) as opened:
        yield opened
