"""What one tenant's adapter or a killed process does to all others: nothing wrong, nothing lost."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from engine.client import AsyncClient, RequestError
from engine.errors import NotFinite
from engine.runtime.engine import LoadedAdapter
from engine.server.app import App
from tests.e2e.conftest import ADAPTERS, computing, heldout
from tests.engine_suite import ask, loaded, until_nothing_runs

pytestmark = [
    pytest.mark.model,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning"),  # vLLM leaves ZeroMQ to the collector
]


def huge(folder: Path, value: float) -> Path:
    """The support adapter with every B matrix set to `value`."""
    from safetensors.torch import load_file, save_file

    source = ADAPTERS["support@v1"]
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    tensors = load_file(source / "adapter_model.safetensors")
    changed = {n: t.fill_(value) if "lora_B" in n else t for n, t in tensors.items()}
    save_file(changed, folder / "adapter_model.safetensors")
    return folder


async def test_poison(app: App, tmp_path: Path) -> None:
    """50 requests to adapters that compute NaN give nobody a wrong answer: they are ended, and others do not notice.

    Blocks of keys and values are zeroed before they are used again, so that what NaN is left in them reaches nobody, and the
    engine need not be replaced.
    """
    engine = app.engine
    questions = [heldout("support@v1", 12)[at][0] for at in range(12)]
    right = [(await ask(engine, text, max_tokens=8)).tokens for text in questions]
    folders = [huge(tmp_path / "nan", float("nan")), huge(tmp_path / "huge", 1e30)]
    poison = [LoadedAdapter(600_001 + n, f"{at.name}@v1#{n}", at, 8) for n, at in enumerate(folders)]
    engines = engine._life
    async with loaded(engine, *poison):
        asked = [ask(engine, f"{questions[n % 12]} {n}", poison[n % 2], max_tokens=8) for n in range(50)]
        meanwhile = [ask(engine, text, max_tokens=8) for text in questions]
        results = await asyncio.gather(*asked, *meanwhile, return_exceptions=True)
    assert {type(result) for result in results[:50]} == {NotFinite}
    assert [getattr(reply, "tokens", reply) for reply in results[50:]] == right
    await until_nothing_runs(engine)
    assert [(await ask(engine, text, max_tokens=8)).tokens for text in questions] == right
    assert engine._life == engines


def residents(app: App) -> set[tuple[str, bool]]:
    """What is in the engine, and whether it is pinned."""
    assert app.generator
    return {(each.manifest.ref, each.pinned) for each in app.generator.residency.residents()}


async def test_killed_engine(app: App, client: AsyncClient, published: list[str]) -> None:
    """The engine is killed under load: every request gets a right answer or a typed end, and everything comes back."""
    await client.adapters.pin("legal@v1")
    work = [(prompt, asker) for prompt, _ in heldout("support@v1", 8) for asker in ("", "support@v1", "legal@v1")]

    async def answer(prompt: str, asker: str) -> tuple[int, ...]:
        made = await client.generate(adapter=asker, prompt=prompt, temperature=0, max_tokens=16, ignore_eos=True)
        return made.token_ids

    streamed = 0

    async def stream() -> None:
        nonlocal streamed
        async for chunk in client.stream(prompt="Go on", temperature=0, max_tokens=400, ignore_eos=True):
            streamed += len(chunk.token_ids)

    right = await asyncio.gather(*(answer(*each) for each in work))
    before = residents(app)
    streaming = asyncio.create_task(stream())
    asking = [asyncio.create_task(answer(*each)) for each in work * 2]
    await asyncio.sleep(1.5)
    computing()[-1].send_signal(signal.SIGKILL)
    with pytest.raises(RequestError, match="tokens of this answer were sent") as ended:
        await streaming
    assert ended.value.reason == "ENGINE_DIED"
    assert f"{streamed} tokens" in str(ended.value)
    assert streamed
    assert not app.engine.ready
    assert app.engine.alive
    assert await asyncio.gather(*asking) == right * 2
    assert app.engine.ready
    assert residents(app) == before
    await client.adapters.pin("legal@v1", pinned=False)


async def test_stopped_engine(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that neither works nor dies is noticed and replaced, and who waited for it is answered."""
    question, _ = heldout("support@v1", 1)[0]
    right = (await ask(app.engine, question, max_tokens=8)).tokens
    monkeypatch.setattr(app.engine._stall, "limit_s", 2.0)
    computing()[-1].send_signal(signal.SIGSTOP)
    assert (await ask(app.engine, question, max_tokens=8)).tokens == right
    assert app.engine.ready
