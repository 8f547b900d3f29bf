"""A headless Chromium for tests: opens a page at some width and colour scheme, runs scripts, collects complaints."""

import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--remote-debugging-port=0",
    "--remote-allow-origins=*", "--disable-dev-shm-usage",
    "--disable-features=IsolateSandboxedIframes",  # so that a sandboxed frame can be looked into
)  # fmt: skip


def executable() -> str | None:
    """Path of a Chromium or Chrome; None: there is none."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One browser with one page, driven through the DevTools protocol."""

    def __init__(self, folder: Path) -> None:
        import websocket

        self.process = subprocess.Popen(
            [executable(), *FLAGS, f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.complaints: list[str] = []
        self._count = 0
        try:
            port = self._port(folder / "DevToolsActivePort")
            targets = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json"))
            page = next(target for target in targets if target["type"] == "page")
            self._socket = websocket.create_connection(page["webSocketDebuggerUrl"], timeout=120)
        except BaseException:
            self.close()
            raise
        for domain in ("Runtime", "Log", "Page"):
            self.call(f"{domain}.enable")

    def _port(self, path: Path) -> str:
        for _ in range(1200):
            if path.exists() and (lines := path.read_text().splitlines()):
                return lines[0]
            time.sleep(0.1)
        raise RuntimeError("the browser did not start within two minutes")

    def call(self, method: str, **parameters):
        """One command and its result; what the page complains of meanwhile is kept."""
        self._count += 1
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == self._count:
                assert "error" not in message, message
                return message["result"]
            self._listen(message)

    def _listen(self, message) -> None:
        details = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(details["exceptionDetails"])[:500])
        if message.get("method") == "Log.entryAdded" and details["entry"]["level"] in ("error", "warning"):
            self.complaints.append(details["entry"]["text"])
        if message.get("method") == "Runtime.consoleAPICalled" and details["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(details["args"])[:500])

    def open(self, url: str, *, width: int, height: int = 900, scheme: str = "light") -> None:
        """Loads a page and waits until its own script has run."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=url)
        for _ in range(2400):
            if self.run("document.documentElement?.dataset.ready === 'true'"):
                return
            time.sleep(0.05)
        raise AssertionError(f"the page's script did not finish: {self.complaints}")

    def run(self, script: str):
        """Value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def close(self) -> None:
        """Ends the browser."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
