"""A headless Chromium that opens pages, waits for their words, takes pictures, and tells what
the console complained of.
"""

import base64
import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
PATIENCE_S = 120.0
PORT_NOTE = "DevToolsActivePort"  # written by Chromium into its profile
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-proxy-server",
)


class Browser:
    """One tab, driven by Chromium's own protocol."""

    def __init__(self, connection: ClientConnection, size: Sequence[int]) -> None:
        self.connection, self.complaints, self._number = connection, list[str](), 0
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=size[0],
            height=size[1],
            deviceScaleFactor=1,
            mobile=False,
        )

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        self._number += 1
        self.connection.send(
            json.dumps({"id": self._number, "method": method, "params": parameters})
        )
        while True:
            message = json.loads(self.connection.recv(timeout=PATIENCE_S))
            self._note(message)
            if message.get("id") == self._number:
                assert "error" not in message, message
                return dict(message["result"])

    def _note(self, message: dict[str, Any]) -> None:
        shown = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(
                str(shown["exceptionDetails"].get("exception", shown["exceptionDetails"]))
            )
        elif message.get("method") == "Log.entryAdded" and shown["entry"]["level"] == "error":
            self.complaints.append(f"{shown['entry']['text']} {shown['entry'].get('url', '')}")
        elif message.get("method") == "Runtime.consoleAPICalled" and shown["type"] in (
            "error",
            "assert",
        ):
            self.complaints.append(
                str([part.get("value", part.get("description")) for part in shown["args"]])
            )

    def ask(self, expression: str) -> Any:
        """What the expression is worth in the page."""
        return self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )["result"].get("value")

    def wait(self, expression: str, *, seconds: float = PATIENCE_S) -> None:
        """Return when the expression is true in the page."""
        limit = time.monotonic() + seconds
        while not self.ask(f"Boolean({expression})"):
            assert time.monotonic() < limit, (
                f"{expression} did not come true; the page shows: {self.text()[:2000]}"
            )
            time.sleep(0.2)

    def text(self) -> str:
        return str(self.ask("document.body.innerText"))

    def open(self, url: str, *words: str) -> None:
        """Load the page and return when it shows all these words."""
        self.call("Page.navigate", url=url)
        self.wait_for(*words)

    def wait_for(self, *words: str) -> None:
        for word in words:
            self.wait(f"document.body && document.body.innerText.includes({json.dumps(word)})")

    def click(self, text: str) -> None:
        """Click on the innermost element with exactly this text."""
        found = (
            "[...document.body.querySelectorAll('*')]"
            f".filter(it => it.innerText?.trim() === {json.dumps(text)})"
        )
        self.wait(f"{found}.length")
        self.ask(f"{found}.pop().click()")

    def settle(self) -> None:
        """Return when the page has shown the same for two seconds."""
        shown = ""
        while shown != (shown := self.text()):
            time.sleep(2)

    def picture(self, path: Path) -> None:
        path.write_bytes(
            base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        )


@contextlib.contextmanager
def browser(profile: Path, *, size: Sequence[int] = (1280, 900)) -> Iterator[Browser]:
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-port=0"]
    profile.mkdir(parents=True, exist_ok=True)
    (profile / PORT_NOTE).unlink(missing_ok=True)
    with (profile / "log").open("wb") as log:
        process = subprocess.Popen([*command, "about:blank"], stdout=log, stderr=log)
    try:
        port = _port(profile / PORT_NOTE)
        pages = httpx.get(
            f"http://127.0.0.1:{port}/json/list", timeout=PATIENCE_S, trust_env=False
        ).json()
        url = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
        with connect(url, max_size=None, proxy=None, open_timeout=PATIENCE_S) as connection:
            yield Browser(connection, size)
    finally:
        process.terminate()
        process.wait(30)


def _port(note: Path) -> int:
    """Chromium writes the port that it chose into this file."""
    limit = time.monotonic() + PATIENCE_S
    while not (note.exists() and note.read_text().strip()):
        assert time.monotonic() < limit, "the browser did not start"
        time.sleep(0.1)
    return int(note.read_text().splitlines()[0])
