"""A headless Chromium for tests of pages, driven over its DevTools pipe: no driver, no port, no extra package."""

import base64
import contextlib
import json
import os
import shutil
import subprocess

import pytest

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-pipe"
).split()


class Browser:
    """One page. Every method waits for its answer; a script's exception is raised."""

    def __init__(self, write_end, read_end):
        self.write_end, self.read_end, self.session, self.last_id, self.buffer = write_end, read_end, None, 0, b""
        self.requests = []  # every address that the page asked for

    def send(self, method, **parameters):
        self.last_id += 1
        message = {"id": self.last_id, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self.last_id:
            if answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
        assert "error" not in answer, answer
        return answer["result"]

    def _receive(self):
        while b"\0" not in self.buffer:
            chunk = os.read(self.read_end, 1 << 20)
            assert chunk, "Chromium ended"
            self.buffer += chunk
        line, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(line)

    def open(self, path, fragment="", width=1280, height=900, dark=False):
        """Load a file from the disk and wait until it is complete."""
        if self.session is None:
            target = self.send("Target.createTarget", url="about:blank")["targetId"]
            self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            self.send("Network.enable")
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url="about:blank")  # a new fragment alone would not load the page again
        self.send("Page.navigate", url=path.absolute().as_uri() + fragment)
        wait = "new Promise(r => document.readyState === 'complete' ? r() : addEventListener('load', r))"
        self.run(f"{wait}.then(() => 0)")

    def run(self, expression):
        """Value of a JavaScript expression; a promise is awaited."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def click(self, selector):
        """A real mouse click in the middle of an element."""
        x, y = self.run(
            f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'center'}});"
            "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, path, whole_page=True):
        """PNG of the page."""
        answer = self.send("Page.captureScreenshot", captureBeyondViewport=whole_page)
        path.write_bytes(base64.b64decode(answer["data"]))


@contextlib.contextmanager
def headless_browser(profile):
    """Context manager -> Browser, with an empty `profile` folder. Skips where Chromium is missing, fails in CI."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        reason = "no Chromium here (apt-get install chromium): the page is not driven"
        if os.environ.get("CI"):
            pytest.fail(f"{reason}, and CI must have it")
        pytest.skip(reason)
    to_browser, from_us = os.pipe()
    from_browser, to_us = os.pipe()

    def place_pipes():  # Chromium reads descriptor 3 and writes descriptor 4
        spare_in, spare_out = os.dup(to_browser), os.dup(to_us)
        os.dup2(spare_in, 3)
        os.dup2(spare_out, 4)

    process = subprocess.Popen(
        [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        preexec_fn=place_pipes,
        close_fds=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser)
    os.close(to_us)
    try:
        yield Browser(from_us, from_browser)
    finally:
        process.terminate()
        process.wait(timeout=20)
        os.close(from_us)
        os.close(from_browser)
