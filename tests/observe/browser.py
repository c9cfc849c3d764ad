"""A real browser, driven over the DevTools protocol through a pipe: no port, no further package."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Everything that a browser does on its own account is switched off, and so is its sandbox, which the super-user cannot have.
ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--force-device-scale-factor=1", "--remote-debugging-pipe",
)  # fmt: skip
PATIENCE = 60.0  # seconds for anything that a browser is asked
# Key codes of keys without a sign of their own.
CODES = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9, "Enter": 13, "Home": 36, "End": 35}

type Message = dict[str, Any]


def find_browser() -> str:
    """The browser's program. Tests of pages cannot do without one."""
    for name in NAMES:
        if (found := shutil.which(name)) is not None:
            return found
    raise AssertionError(
        f"no browser is installed ({', '.join(NAMES)}). On Debian: apt-get install chromium; launch/test.sh does it."
    )


class Refused(AssertionError):
    """The browser would not. While a page loads, it will not evaluate."""


class Browser:
    """One process, which ends with the `with` block."""

    def __init__(self, profile: Path) -> None:
        to_browser, from_browser = os.pipe(), os.pipe()
        theirs = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 20) for descriptor in (to_browser[0], from_browser[1])]

        def wire() -> None:
            os.dup2(theirs[0], 3)  # where Chromium reads
            os.dup2(theirs[1], 4)  # where it writes

        self._process = subprocess.Popen(
            [find_browser(), *ARGUMENTS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(3, 4), preexec_fn=wire, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for descriptor in (*theirs, to_browser[0], from_browser[1]):
            os.close(descriptor)
        self._write, self._read = to_browser[1], from_browser[0]
        self._buffer, self._number = b"", 0
        self._target: str | None = None  # the page that is open
        self.listeners: dict[str, Callable[[Message], None]] = {}  # by session

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def open(self, url: str, width: int = 1280, height: int = 900, *, dark: bool = False) -> "Page":
        """A new page of this size, loaded. The one before it is closed: pages in the background are not drawn."""
        if self._target is not None:
            self.call("Target.closeTarget", {"targetId": self._target})
        self._target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": self._target, "flatten": True})["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log"):
            page.call(f"{domain}.enable")
        page.call("Page.bringToFront")
        page.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme, {"name": "prefers-reduced-motion", "value": "reduce"}])
        page.go(url)
        return page

    def call(self, method: str, parameters: Mapping[str, Any], session: str | None = None) -> Message:
        """Ask, and wait for the answer; what else arrives meanwhile goes to the listeners."""
        self._number += 1
        message: Message = {"id": self._number, "method": method, "params": dict(parameters)}
        if session is not None:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(method)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise Refused(f"{method}: {answer['error']}")
                return dict(answer["result"])
            if (listener := self.listeners.get(answer.get("sessionId", ""))) is not None:
                listener(answer)

    def _next(self, method: str) -> Message:
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"the browser did not answer {method} within {PATIENCE:.0f} s"
            data = os.read(self._read, 1 << 20)
            assert data, f"the browser ended before it answered {method}"
            self._buffer += data
        first, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(first))


class Page:
    """A page in a browser. `complaints` collects what its console holds against it."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session
        self.complaints: list[str] = []
        browser.listeners[session] = self._listen

    def call(self, method: str, **parameters: Any) -> Message:
        return self._browser.call(method, parameters, self._session)

    def go(self, url: str) -> None:
        """Load, and wait until the page says that it is drawn."""
        self.call("Page.navigate", url=url)
        self.until("document.body?.dataset.ready === ''")

    def evaluate(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, f"{expression}: {answer['exceptionDetails']}"
        return answer["result"].get("value")

    def until(self, expression: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not self._holds(expression):
            assert time.monotonic() < deadline, f"it did not come to: {expression}; the console says {self.complaints}"
            time.sleep(0.05)

    def _holds(self, expression: str) -> bool:
        try:
            return bool(self.evaluate(f"Boolean({expression})"))
        except Refused:
            return False

    def press(self, key: str, *, shift: bool = False) -> None:
        """A key, as from a keyboard."""
        about: dict[str, Any] = {"key": key, "modifiers": 8 if shift else 0}
        about |= {"windowsVirtualKeyCode": CODES[key], "code": key} if key in CODES else {"text": key}
        self.call("Input.dispatchKeyEvent", type="keyDown", **about)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(picture["data"]))

    def _listen(self, message: Message) -> None:
        details = message.get("params", {})
        match message["method"]:
            case "Runtime.exceptionThrown":
                self.complaints.append(str(details["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if details["type"] in ("error", "warning", "assert"):
                self.complaints.append(str(details["args"]))
            case "Log.entryAdded" if details["entry"]["level"] in ("error", "warning"):
                self.complaints.append(str(details["entry"]))
