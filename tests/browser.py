"""A headless Chromium, driven through a pipe by the DevTools protocol; nothing between the test and the browser."""
from __future__ import annotations

import base64
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Self

import pytest

# The browser reads messages from file 3 and writes to file 4, whatever their numbers are here
_AT_3_AND_4 = """
import os, sys
from fcntl import F_DUPFD, fcntl
for at, free in enumerate([fcntl(int(each), F_DUPFD, 10) for each in sys.argv[1:3]], 3): os.dup2(free, at)
os.execvp(sys.argv[3], sys.argv[3:])
"""


def chromium() -> str:
    "The program; a skip where there is none."
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    return found or pytest.skip("chromium is not there")


class Page:
    "One page of a browser of its own."

    def __init__(self, folder: Path, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        to_browser, self._to = os.pipe()
        self._from, from_browser = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars", "--disable-background-networking",
                 "--remote-debugging-pipe", f"--user-data-dir={folder}", f"--window-size={width},{height}", "--no-proxy-server", "about:blank"]
        command = [sys.executable, "-c", _AT_3_AND_4, str(to_browser), str(from_browser), chromium(), *flags]
        self.process = subprocess.Popen(command, pass_fds=(to_browser, from_browser), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_browser), os.close(from_browser)
        self.said: list[dict[str, Any]] = []  # Events: what the page logged, requested, refused
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self._number, self._session = 0, ""
        threading.Thread(target=self._read, daemon=True).start()
        [target] = [one for one in self("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        self._session = self("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"): self(f"{domain}.enable")
        self.look(width, height, scheme)

    def _read(self) -> None:
        held = b""
        while more := os.read(self._from, 1 << 16):
            *whole, held = (held + more).split(b"\0")
            for text in whole:
                message = json.loads(text)
                self._answers.put(message) if "id" in message else self.said.append(message)

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        "A command, and its result."
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **({"sessionId": self._session} if self._session else {})}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._answers.get(timeout=30))["id"] != self._number: pass
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def look(self, width: int, height: int, scheme: str = "light") -> None:
        "How large the window is, and whether its reader likes it dark."
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def go(self, url: str) -> None:
        self("Page.navigate", url=url)
        self.until(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def js(self, expression: str) -> Any:
        "What an expression is worth in the page."
        result = self("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in result, (expression, result)
        return result["result"].get("value")

    def until(self, expression: str, seconds: float = 20) -> Any:
        "Wait until an expression is true, but not for ever."
        end = time.monotonic() + seconds
        while not (value := self.js(expression)):
            assert time.monotonic() < end, f"waited {seconds} s for {expression}; the page says: {self.js('document.body.innerText')}"
            time.sleep(0.05)
        return value

    def text(self, selector: str) -> str: return str(self.js(f"document.querySelector({json.dumps(selector)}).innerText"))

    def events(self, method: str) -> list[dict[str, Any]]: return [one["params"] for one in self.said if one["method"] == method]

    def shot(self, path: Path) -> None:
        "A picture of the whole page."
        size = self("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]))

    def __enter__(self) -> Self: return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._to)
