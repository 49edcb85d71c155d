"""A headless Chromium or Chrome driven through its debugging pipe, which needs no driver and no package."""

import base64
import fcntl
import functools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)  # fmt: skip


@functools.cache
def find_browser():
    """The browser's path: of the variable CHROMIUM, or the first on PATH that runs; None where there is none."""
    named = [os.environ["CHROMIUM"]] if "CHROMIUM" in os.environ else map(shutil.which, NAMES)
    return next(filter(_runs, filter(None, named)), None)


def _runs(path):
    # Ubuntu's package chromium-browser is a script that asks for a snap.
    try:
        return subprocess.run([path, "--version"], capture_output=True, timeout=60, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


class Page:
    """One tab. `problems` holds errors and messages of its console, `requests` what it asked a network for."""

    def __init__(self, executable, profile, timeout=60.0):
        self.timeout, self.problems, self.requests = timeout, [], []
        self._count, self._rest, self._session, self._answers = 0, b"", None, {}
        (theirs_in, self._out), (self._in, theirs_out) = os.pipe(), os.pipe()
        # The browser reads from 3 and writes to 4, wherever the pipes' ends are.
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (theirs_in, theirs_out)]
        self.process = subprocess.Popen(
            [executable, *OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, close_fds=False,
            preexec_fn=lambda: [os.dup2(fd, at) for fd, at in zip(ends, (3, 4), strict=True)],
        )  # fmt: skip
        for fd in (theirs_in, theirs_out, *ends):
            os.close(fd)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """The result of one command of the DevTools protocol."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        number, end = self._count, time.monotonic() + self.timeout
        while number not in self._answers:
            self._receive(end)
        answer = self._answers.pop(number)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def evaluate(self, expression):
        """The value of JavaScript on the page."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, f"{expression}: {done['exceptionDetails']}"
        return done["result"].get("value")

    def wait(self, expression):
        """Wait until JavaScript is true."""
        end = time.monotonic() + self.timeout
        while not self.evaluate(expression):
            assert time.monotonic() < end, f"still not: {expression}; {self.problems}"
            time.sleep(0.02)

    def open(self, file, *, width=1280, height=900, dark=False, fragment=""):
        """Load a file, in a window of this size, and wait until it says that it is ready."""
        self.problems.clear()
        self.requests.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        calm = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.call("Emulation.setEmulatedMedia", features=[scheme, calm])
        # By way of a blank page: with another fragment alone a browser does not load again.
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=Path(file).resolve().as_uri() + fragment)
        self.wait("document.documentElement?.dataset.ready === 'yes'")

    def press(self, key, code=0, text=""):
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, text=text)

    def screenshot(self, file, *, whole=True):
        """Save what the page looks like, all of it or the window."""
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        Path(file).write_bytes(base64.b64decode(picture["data"]))

    def close(self):
        """End the browser."""
        self._session = None
        self.call("Browser.close")
        self.process.wait(self.timeout)
        os.close(self._in)
        os.close(self._out)

    def _receive(self, end):
        ready, _, _ = select.select([self._in], [], [], max(0, end - time.monotonic()))
        assert ready, "the browser does not answer"
        data = os.read(self._in, 1 << 20)
        assert data, f"the browser ended with {self.process.wait()}"
        *messages, self._rest = (self._rest + data).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self._answers[message["id"]] = message
            else:
                self._note(message["method"], message["params"])

    def _note(self, event, params):
        if event == "Runtime.exceptionThrown":
            self.problems.append(params["exceptionDetails"])
        elif event == "Runtime.consoleAPICalled" or event == "Log.entryAdded":
            self.problems.append(params)
        elif event == "Network.requestWillBeSent" and not params["request"]["url"].startswith(
            ("data:", "file:", "blob:")
        ):
            self.requests.append(params["request"]["url"])
