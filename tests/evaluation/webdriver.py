"""A headless Chromium by the WebDriver protocol: what the tests of a page need, and no more."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import tempfile
import urllib.request
from pathlib import Path

CHROMIUM = shutil.which("chromium")
DRIVER = shutil.which("chromedriver")
_ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
)  # fmt: skip


class Browser:
    """One window; used as a context, which ends the processes it started."""

    def __enter__(self):
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        self._process = subprocess.Popen(
            [DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True, env=environment
        )
        for line in self._process.stdout:
            if found := re.search(r"started successfully on port (\d+)", line):
                break
        else:
            raise RuntimeError("chromedriver has not started")
        self._root = f"http://127.0.0.1:{found[1]}/session"
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        chrome = {
            "binary": CHROMIUM,
            "args": [*_ARGUMENTS, f"--user-data-dir={self._profile.name}"],
        }
        wanted = {"goog:chromeOptions": chrome, "goog:loggingPrefs": {"browser": "ALL"}}
        try:
            session = self._post("", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        except BaseException:
            self._stop()
            raise
        self._root += f"/{session}"
        return self

    def __exit__(self, *exception):
        try:
            self._open(urllib.request.Request(self._root, method="DELETE"), timeout=30).close()
        finally:
            self._stop()

    def _stop(self):
        self._process.terminate()
        self._process.wait(30)
        self._process.stdout.close()
        self._profile.cleanup()

    def _post(self, path, body):
        request = urllib.request.Request(
            self._root + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with self._open(request, timeout=90) as answer:
            return json.load(answer)["value"]

    def devtools(self, command, **parameters):
        """A command of the DevTools protocol."""
        return self._post("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def resize(self, width, height, *, dark=False):
        """The size of the page in CSS pixels (a phone's below 600), and the colour scheme."""
        self.devtools("Emulation.setDeviceMetricsOverride", width=width, height=height,
                      deviceScaleFactor=1, mobile=width < 600)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, path):
        """A file from disk, offline."""
        self.devtools("Network.enable")
        self.devtools("Network.emulateNetworkConditions", offline=True, latency=0,
                      downloadThroughput=0, uploadThroughput=0)  # fmt: skip
        self._post("/url", {"url": Path(path).resolve().as_uri()})

    def run(self, script):
        """What the body of a function returns."""
        return self._post("/execute/sync", {"script": script, "args": []})

    def press(self, key):
        """A key as a keyboard sends it ("Enter" and " " make text too)."""
        words = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        code = {"Enter": 13, " ": 32}.get(key, 0)
        for kind in ("keyDown", "keyUp"):
            more = {"text": words} if kind == "keyDown" and words else {}
            self.devtools("Input.dispatchKeyEvent", type=kind, key=key,
                          windowsVirtualKeyCode=code, **more)  # fmt: skip

    def console(self):
        """Messages of the page since the last call."""
        return self._post("/se/log", {"type": "browser"})

    def screenshot(self, path):
        """The whole page as PNG."""
        size = self.devtools("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "scale": 1, "width": size["width"], "height": size["height"]}
        made = self.devtools("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        Path(path).write_bytes(base64.b64decode(made["data"]))
