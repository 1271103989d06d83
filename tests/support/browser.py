"""A real browser for tests of pages, by the DevTools protocol over pipes: a Chromium of any kind, and no package.

LEMO_TEST_BROWSER names one; otherwise those on the PATH are tried.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell", "headless_shell")
_OPTIONS = (
    "--headless=shell --remote-debugging-pipe --no-sandbox --disable-setuid-sandbox --no-zygote --single-process "
    "--in-process-gpu --use-gl=angle --use-angle=swiftshader --enable-unsafe-swiftshader --disable-dev-shm-usage "
    "--disable-features=AudioServiceOutOfProcess,IsolateOrigins,site-per-process"
)
_SECONDS = 60.0


class Browser:
    """One page of one browser process."""

    def __init__(self, folder: Path) -> None:
        program = os.environ.get("LEMO_TEST_BROWSER") or next((p for n in _NAMES if (p := shutil.which(n))), None)
        if program is None:
            pytest.skip(f"no browser: none of {', '.join(_NAMES)} is on the PATH, and LEMO_TEST_BROWSER is not set")
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        redirect = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'
        self._process = subprocess.Popen(
            ["bash", "-c", redirect, program, *_OPTIONS.split(), f"--user-data-dir={folder}", "about:blank"],
            pass_fds=(to_read, to_write),
            env={**os.environ, "HOME": str(folder)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read), os.close(to_write)
        self._number, self._buffer = 0, b""
        self.errors: list[Any] = []
        self._events: list[dict[str, Any]] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Page", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write), os.close(self._read)

    def call(self, method: str, **parameters: Any) -> Any:
        return self._call(method, self._session, **parameters)

    def open(self, page: Path) -> list[str]:
        """Opens a file. Returns the addresses that were asked for."""
        self._events.clear()
        self.call("Page.navigate", url=page.as_uri())
        while not any(e["method"] == "Page.loadEventFired" for e in self._events):
            self._receive()
        sent = [e["params"]["request"]["url"] for e in self._events if e["method"] == "Network.requestWillBeSent"]
        self.errors = [e["params"] for e in self._events if e["method"] == "Runtime.exceptionThrown"]
        return sent

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def _call(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        os.write(self._write, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        """The next message; events are kept."""
        end = time.monotonic() + _SECONDS
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            if not ready or not (part := os.read(self._read, 1 << 16)):
                pytest.skip(f"the browser does not answer by the DevTools protocol (exit code {self._process.poll()})")
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        if "method" in message:
            self._events.append(message)
        return message
