"""A pytest fixture for applications that call Loraplex: the real server over a real socket, with made-up answers.

Installed with `loraplex[server]`, the fixture needs no import:

    async def test_my_service(loraplex_server):
        loraplex_server.publish("support")
        async with AsyncClient(loraplex_server.target) as client:
            answer = await client.generate(adapter="support", prompt="hello", temperature=0)
        assert answer.text == "support@v1 heard: hello"

The server is `loraplex serve --engine fake`: every check, limit and error is the real one, and only the tokens are not.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from engine.client.aio import AsyncClient

if TYPE_CHECKING:
    from engine.server.app import App

T = TypeVar("T")
LAYERS, WIDTH, RANK = 1, 8, 2  # of the tiny base model that the fake server pretends to serve


class FakeServer:
    """A running fake server: `target` for clients, `publish` to have an adapter."""

    def __init__(self, app: App, loop: asyncio.AbstractEventLoop, scratch: Path) -> None:
        self.app = app
        self._loop = loop
        self._scratch = scratch
        self._published = 0
        self.api_key = ""  # that `publish` and `promote` use, if the server asks for one

    @property
    def target(self) -> str:
        """Where clients reach it: host:port."""
        return f"{self.app.settings.host}:{self.app.port}"

    @property
    def http_url(self) -> str:
        """Where its HTTP port is; OpenAI clients take this and "/v1" as their base_url."""
        return f"http://{self.app.settings.host}:{self.app.http_port}"

    def publish(self, name: str, **about: Any) -> str:
        """Publish a valid adapter under `name` and return its version; each call makes another. `about`: notes and the like."""
        self._published += 1
        folder = self._scratch / f"adapter-{self._published}"
        write_adapter(folder, seed=self._published)
        return self.run(self._publish(folder, name, about))

    def promote(self, name: str, version: str, alias: str = "current") -> None:
        """Point an alias at a version."""
        self.run(self._promote(name, version, alias))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the server's own event loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=60)

    async def _publish(self, folder: Path, name: str, about: dict[str, Any]) -> str:
        async with AsyncClient(self.target, api_key=self.api_key) as client:
            return (await client.adapters.publish(folder, name, **about)).version

    async def _promote(self, name: str, version: str, alias: str) -> None:
        async with AsyncClient(self.target, api_key=self.api_key) as client:
            await client.adapters.promote(name, version, alias)


@contextmanager
def fake_server(**settings: Any) -> Iterator[FakeServer]:
    """Run a fake server in a thread for the time of the block; `settings` are those of engine.config.Settings."""
    from engine.config import Settings
    from engine.server.app import App

    with tempfile.TemporaryDirectory(prefix="loraplex-fake-") as folder:
        scratch = Path(folder)
        write_base(scratch / "fake-base")
        given: dict[str, Any] = {
            "model": scratch / "fake-base",
            "registry": str(scratch / "registry"),
            "cache": scratch / "cache",
            "port": 0,
            "http_port": 0,
            "drain_s": 1,
        }
        app = App(Settings(engine="fake", **(given | settings)))
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="loraplex-fake", daemon=True)
        thread.start()
        server = FakeServer(app, loop, scratch)
        try:
            server.run(app.start())
            yield server
        finally:
            server.run(app.stop())
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()


@pytest.fixture
def loraplex_server() -> Iterator[FakeServer]:
    """A fake Loraplex server of this test's own."""
    with fake_server() as server:
        yield server


def write_base(folder: Path) -> None:
    """Write the smallest folder that passes for a base model: one layer, eight wide."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    (folder / "tokenizer.json").write_text("{}")
    save_file(
        {f"model.{name}.weight": np.ones((WIDTH, WIDTH), np.float32) for name in _modules()},
        folder / "model.safetensors",
    )


def write_adapter(folder: Path, seed: int = 0) -> None:
    """Write a valid rank-2 adapter for the tiny base; another seed makes another adapter."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    random = np.random.default_rng(seed)
    shapes = {"lora_A": (RANK, WIDTH), "lora_B": (WIDTH, RANK)}
    tensors = {
        f"base_model.model.model.{name}.{half}.weight": random.standard_normal(shape).astype(np.float32)
        for name in _modules()
        for half, shape in shapes.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")


def _modules() -> list[str]:
    return [f"layers.{layer}.self_attn.{name}" for layer in range(LAYERS) for name in ("q_proj", "v_proj")]
