"""A page in a real headless Chromium, over its debugging pipe: what it asks for and complains of, and how it lies."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--remote-debugging-pipe",
)


@dataclass
class View:
    """One page at one width."""

    session: str | None = None
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    """Expression -> its value on the page."""
    screenshot: bytes = b""


class Browser:
    """Chromium, with an empty profile; ends with the block."""

    def __enter__(self) -> "Browser":
        assert CHROMIUM is not None
        # Chromium's helpers outlive it for a moment, and write in the profile while it is being removed.
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        commands, self._out = os.pipe()
        self._in, events = os.pipe()

        def to_3_and_4() -> None:
            spare = os.dup(events)
            os.dup2(commands, 3)
            os.dup2(spare, 4)

        self._process = subprocess.Popen(
            [CHROMIUM, *_QUIET, f"--user-data-dir={self._profile.name}"],
            pass_fds=(3, 4),
            preexec_fn=to_3_and_4,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(events)
        self._number, self._rest = 0, b""
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)
        self._profile.cleanup()

    def view(self, page: Path, width: int, height: int, expressions: list[str]) -> View:
        """Load a page at a width, evaluate expressions in it, and take its picture."""
        view = View()
        target = self._call("Target.createTarget", {"url": "about:blank"}, view)["targetId"]
        attached = self._call("Target.attachToTarget", {"targetId": target, "flatten": True}, view)
        view.session = attached["sessionId"]
        for domain in ("Network", "Page", "Runtime", "Log"):
            self._call(f"{domain}.enable", {}, view)
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._call("Emulation.setDeviceMetricsOverride", metrics, view)
        self._call("Page.navigate", {"url": page.as_uri()}, view)
        while self._read(view).get("method") != "Page.loadEventFired":
            pass
        for expression in expressions:
            answer = self._call("Runtime.evaluate", {"expression": expression, "returnByValue": True}, view)
            view.values[expression] = answer["result"].get("value")
        view.screenshot = base64.b64decode(self._call("Page.captureScreenshot", {}, view)["data"])
        view.session = None
        self._call("Target.closeTarget", {"targetId": target}, view)
        return view

    def _call(self, method: str, params: dict[str, Any], view: View) -> dict[str, Any]:
        self._number += 1
        session = {"sessionId": view.session} if view.session else {}
        os.write(
            self._out, json.dumps({"id": self._number, "method": method, "params": params} | session).encode() + b"\0"
        )
        while (answer := self._read(view)).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def _read(self, view: View) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._in, 65536)
            assert more, "the browser has ended"
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if message.get("sessionId") != view.session:  # a last word of a page that was closed
            return {}
        match message.get("method"):
            case "Network.requestWillBeSent":
                view.requests.append(message["params"]["request"]["url"])
            case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown" | "Log.entryAdded":
                view.complaints.append(json.dumps(message["params"]))
        return message
