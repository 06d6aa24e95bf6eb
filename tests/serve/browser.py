"""A real browser, driven over the DevTools protocol: Debian's chromium, and aiohttp, which Faust brings along."""

from __future__ import annotations

import asyncio
import base64
import itertools
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars", "--mute-audio")
KEYS = {"Tab": 9, "Enter": 13}


class Browser:
    """One tab. Methods return once the browser has done it."""

    def __init__(self, address: str):
        self._loop = asyncio.new_event_loop()
        self._numbers = itertools.count(1)
        self.problems: list[str] = []  # what the page's console reported: exceptions, errors, refusals of the content security policy
        self._loop.run_until_complete(self._connect(address))
        for domain in ("Page", "Runtime", "Log"):
            self.do(f"{domain}.enable")

    async def _connect(self, address: str) -> None:
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"{address}/json/list") as answer:
            (tab,) = [tab for tab in await answer.json(content_type=None) if tab["type"] == "page"]
        self._socket = await self._session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=64 << 20)

    def do(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._loop.run_until_complete(asyncio.wait_for(self._do(method, parameters), 20))

    async def _do(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            said = await self._socket.receive_json()
            if said.get("id") == number:
                assert "error" not in said, said
                result: dict[str, Any] = said["result"]
                return result
            if said.get("method") == "Runtime.exceptionThrown":
                self.problems.append(said["params"]["exceptionDetails"].get("exception", {}).get("description", "an exception"))
            if said.get("method") == "Log.entryAdded" and said["params"]["entry"]["level"] == "error":
                self.problems.append(said["params"]["entry"]["text"])

    def look_like(self, width: int, height: int, scheme: str = "light", scale: float = 1, motion: str = "no-preference") -> None:
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=width < 600)
        features = [{"name": "prefers-color-scheme", "value": scheme}, {"name": "prefers-reduced-motion", "value": motion}]
        self.do("Emulation.setEmulatedMedia", features=features)

    def open(self, url: str) -> None:
        self.do("Page.navigate", url=url)

    def run(self, expression: str) -> Any:
        """The value of some JavaScript."""
        said = self.do("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in said, said["exceptionDetails"]
        return said["result"].get("value")

    def wait(self, expression: str, seconds: float = 20) -> None:
        """Until some JavaScript is true; as long as the page is loading it may throw."""
        deadline = time.monotonic() + seconds
        while not self.run(f"(() => {{ try {{ return Boolean({expression}) }} catch {{ return false }} }})()"):
            assert time.monotonic() < deadline, f"never true: {expression}\n{self.run('document.body.innerText')}\n{self.problems}"
            time.sleep(0.05)

    def press(self, key: str) -> None:
        text = {"text": "\r"} if key == "Enter" else {}
        self.do("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=KEYS[key], **text)
        self.do("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=KEYS[key])

    def type(self, text: str) -> None:
        self.do("Input.insertText", text=text)

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """A PNG of the whole page, or of what is in sight: for people; docs/page.png is one."""
        path.write_bytes(base64.b64decode(self.do("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]))

    def close(self) -> None:
        async def end() -> None:
            await self._socket.close()
            await self._session.close()

        self._loop.run_until_complete(end())
        self._loop.close()


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser with a profile of its own."""
    assert CHROMIUM
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "--remote-debugging-port=0", "about:blank"]
    with (folder.parent / f"{folder.name}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HOME": str(folder)}, start_new_session=True)
    try:
        port, deadline = folder / "DevToolsActivePort", time.monotonic() + 20
        while not (port.exists() and port.read_text().count("\n")):
            assert process.poll() is None and time.monotonic() < deadline, "chromium does not start"
            time.sleep(0.05)
        tab = Browser(f"http://127.0.0.1:{port.read_text().split()[0]}")
        try:
            yield tab
        finally:
            tab.close()
    finally:
        process.terminate()
        process.wait(10)
