"""Headless Chromium for the tests, controlled over a pipe."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
"""Path of the browser; None if there is none, and then the tests that need it are skipped."""

QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
"""Options for a browser that shows no window and makes no connections of its own."""


class Browser:
    """One page of a browser, controlled by the DevTools protocol: JSON messages, each ended by a
    zero byte."""

    def __init__(self, profile: Path, *, width: int = 1200, dark: bool = False) -> None:
        to_read, self._out = os.pipe()
        self._in, to_write = os.pipe()

        def connect() -> None:
            # Chromium reads from descriptor 3 and writes to 4, so the pipes must get these numbers.
            ours = os.dup(to_read), os.dup(to_write)
            os.dup2(ours[0], 3)
            os.dup2(ours[1], 4)

        self._process = subprocess.Popen(
            [str(CHROMIUM), *QUIET, f"--user-data-dir={profile}", "--remote-debugging-pipe"],
            preexec_fn=connect,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._number, self._rest, self._session = 0, b"", ""
        made = self._ask("Target.createTarget", url="about:blank")
        attached = self._ask("Target.attachToTarget", targetId=made["targetId"], flatten=True)
        self._session = attached["sessionId"]
        self.appear(width, dark=dark)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait(30)
        os.close(self._in)
        os.close(self._out)

    def appear(self, width: int, height: int = 900, *, dark: bool = False) -> None:
        """Set the size of the page, and whether the user prefers dark colours."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._ask("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url: str) -> None:
        """Go to a URL. Does not wait until the page is loaded."""
        self._ask("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression."""
        answer = self._ask("Runtime.evaluate", expression=script, returnByValue=True)
        return answer["result"].get("value")

    def wait_for(self, text: str, *, timeout_s: float = 60) -> str:
        """Wait until the page shows `text`. Returns all visible text."""
        deadline, shown = time.monotonic() + timeout_s, ""
        while time.monotonic() < deadline:
            shown = self.run("document.body ? document.body.innerText : ''") or ""
            if text in shown:
                return shown
            time.sleep(0.1)
        raise TimeoutError(f"{text!r} is not shown: {shown}")

    def picture(self, path: Path) -> None:
        """Write a screenshot of the whole page as PNG."""
        taken = self._ask("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken["data"]))

    def _ask(self, method: str, **given: Any) -> dict[str, Any]:
        self._number += 1
        asked = {"id": self._number, "method": method, "params": given}
        asked |= {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps(asked).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                came = os.read(self._in, 1 << 20)
                assert came, "the browser has ended"
                self._rest += came
            message, _, self._rest = self._rest.partition(b"\0")
            answer = json.loads(message)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
