"""A headless Chromium, spoken to by its own protocol (https://chromedevtools.github.io/devtools-protocol)."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--hide-scrollbars", "--remote-debugging-port=0",
)  # fmt: skip


class Navigated(Exception):
    """The page has gone to another one in the middle of a command."""


class Page:
    """One tab. `complaints` are what the browser's console said."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self.complaints: list[str] = []
        self.received = 0

    async def listen(self) -> None:
        """Sort what the browser says, until it is gone."""
        async for message in self._socket:
            told = json.loads(message.data)
            if "id" in told:
                self._answers.pop(told["id"]).set_result(told)
            elif told["method"] in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(json.dumps(told["params"])[:400])
            elif told["method"] == "Network.loadingFinished":
                self.received += told["params"]["encodedDataLength"]

    async def do(self, method: str, **params: Any) -> Any:
        """Give a command and return its result."""
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        told = await asyncio.wait_for(answer, 20)
        if "navigated" in told.get("error", {}).get("message", ""):
            raise Navigated
        assert "error" not in told, told
        return told["result"]

    async def see(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise's is awaited."""
        found = await self.do("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, expression: str, seconds: float = 10) -> None:
        """Wait until an expression is true."""
        async with asyncio.timeout(seconds):
            while not await self._holds(expression):
                await asyncio.sleep(0.02)

    async def _holds(self, expression: str) -> bool:
        try:
            return bool(await self.see(f"!!({expression})"))
        except Navigated:
            return False

    async def open(self, url: str) -> None:
        """Go there, and wait until the console has drawn its page."""
        await self.do("Page.navigate", url="about:blank")
        await self.do("Page.navigate", url=url)
        await self.until("document.querySelector('#main')?.dataset.ready === 'true'")

    async def show(self, width: int, *, height: int = 900, dark: bool = False) -> None:
        """The size of the screen, and what its owner prefers."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        await self.do("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.do("Emulation.setEmulatedMedia", features=[scheme])

    async def picture(self, path: Path) -> None:
        """Save what is seen, all of the page."""
        shot = await self.do("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        await asyncio.to_thread(path.write_bytes, base64.b64decode(shot["data"]))


@asynccontextmanager
async def browser(folder: Path) -> AsyncIterator[Page]:
    """A tab of a browser that ends with the block."""
    assert CHROMIUM
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: ASYNC220
    try:
        port = await _port(folder / "DevToolsActivePort")
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as found:
                (target,) = [one for one in await found.json() if one["type"] == "page"]
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket)
                listening = asyncio.create_task(page.listen())
                for domain in ("Page", "Runtime", "Log", "Network"):
                    await page.do(f"{domain}.enable")
                yield page
                listening.cancel()
                await asyncio.gather(listening, return_exceptions=True)
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait, 10)


async def _port(file: Path) -> int:
    async with asyncio.timeout(30):
        while not (lines := _lines(file)):
            await asyncio.sleep(0.05)
    return int(lines[0])


def _lines(file: Path) -> list[str]:
    """The file's lines, once it is there and whole."""
    text = file.read_text() if file.exists() else ""
    return text.split("\n") if "\n" in text else []
