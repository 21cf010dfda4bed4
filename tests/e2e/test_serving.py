"""The whole server with the real engine: each adapter does its own task, whatever happens around it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from pathlib import Path

import pytest

from engine.client import AsyncClient, FailedPrecondition, InvalidArgument, RequestError
from engine.registry.fingerprint import read_base
from engine.server.app import App
from engine.server.identity import TENANT_KEY
from engine.server.identity.policy import Policy
from engine.server.identity.quotas import Quotas
from tests.e2e.conftest import ADAPTERS, MODEL, heldout

pytestmark = [
    pytest.mark.model,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning"),  # vLLM leaves ZeroMQ to the collector
]


async def classify(client: AsyncClient, prompt: str, adapter: str = "") -> str:
    """The first line of a greedy answer."""
    answer = await client.generate(adapter=adapter, prompt=prompt, temperature=0, max_tokens=28, stop="\n")
    return answer.text.strip()


async def accuracy(client: AsyncClient, ref: str, asker: str, count: int = 20) -> float:
    """How many of an adapter's held-out rows `asker` answers rightly."""
    rows = heldout(ref, count)
    answers = await asyncio.gather(*(classify(client, prompt, asker) for prompt, _ in rows))
    return sum(answer.lower() == right.lower() for answer, (_, right) in zip(answers, rows, strict=True)) / count


async def test_published(client: AsyncClient, published: list[str]) -> None:
    """The four shipped adapters pass every check, with the numbers that their training wrote down."""
    assert published == list(ADAPTERS)
    found = await client.adapters.get("support")
    assert [version.version for version in found.versions] == ["v1", "v2"]
    assert dict(found.adapter.aliases) == {"current": "v1"}
    assert all(json.loads(version.evaluation_json)["adapter"] >= 0.9 for version in found.versions)
    assert not any(version.warnings for version in found.versions)


async def test_fingerprint(client: AsyncClient, published: list[str]) -> None:
    """Folder, server and adapters agree on what the base is."""
    base = read_base(MODEL).fingerprint
    assert (await client.engine()).base.fingerprint == base
    for name in ("support", "legal", "code"):
        versions = (await client.adapters.get(name)).versions
        assert {version.base_fingerprint for version in versions} == {base}


@pytest.mark.parametrize("ref", ADAPTERS)
async def test_does_its_task(client: AsyncClient, published: list[str], ref: str) -> None:
    """An adapter answers at least nine in ten held-out rows rightly."""
    assert await accuracy(client, ref, ref) >= 0.9


@pytest.mark.parametrize("ref", ["support@v1", "legal@v1", "code@v1"])
async def test_base_does_not(client: AsyncClient, published: list[str], ref: str) -> None:
    """The base model alone does not know these tasks: whoever answers well is the adapter."""
    assert await accuracy(client, ref, "", count=10) <= 0.3


async def test_own_adapter_only(client: AsyncClient, published: list[str]) -> None:
    """Alone or mixed with all the others in one batch, every request gets the same tokens."""

    async def tokens(prompt: str, asker: str) -> tuple[int, ...]:
        answer = await client.generate(adapter=asker, prompt=prompt, temperature=0, max_tokens=8)
        return answer.token_ids

    prompts = [heldout(ref, 21)[20][0] for ref in ("support@v1", "legal@v1", "code@v1")]
    work = [(prompt, asker) for prompt in prompts for asker in ("", *published)]
    alone = [await tokens(*each) for each in work]
    mixed = await asyncio.gather(*(tokens(*each) for each in work))
    assert mixed == alone
    assert len(set(alone)) > len(prompts)


async def test_stream_adds_up(client: AsyncClient, published: list[str]) -> None:
    """A stream's pieces are the whole answer, and the version that answers is named."""
    ((prompt, _),) = heldout("code@v1", 1)
    options = {"adapter": "code", "prompt": prompt, "temperature": 0, "max_tokens": 16}
    chunks = [chunk async for chunk in client.stream(**options)]
    whole = await client.generate(**options)
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [token for chunk in chunks for token in chunk.token_ids] == list(whole.token_ids)
    assert chunks[-1].usage is not None
    assert str(whole.adapter) == "code@v1"


async def test_chat(client: AsyncClient) -> None:
    """A conversation goes through the model's own template."""
    messages = [{"role": "user", "content": "Say hello."}]
    counted = await client.count_tokens(messages=messages)
    answer = await client.generate(messages=messages, temperature=0, max_tokens=8)
    assert answer.usage.prompt_tokens == counted.prompt_tokens > 4
    assert answer.text


async def test_structured_with_an_adapter(client: AsyncClient, published: list[str]) -> None:
    """A constraint and an adapter go together."""
    ((prompt, right),) = heldout("legal@v1", 1)
    kinds = ["confidentiality", "governing law", "liability", "payment", "termination"]
    options = [f" {kind}" for kind in kinds]
    answer = await client.generate(adapter="legal", prompt=prompt, temperature=0, choice=options)
    assert answer.text.strip() == right
    assert answer.finish_reason == "stop"


@pytest.mark.parametrize(
    "regex", ["(.*a.{2000}|.*b.{3000})c", "(a|b)*a(a|b){300}", r"(\w+ ?)*[!?](\w+ ?){1000}", "((a{1,99}){1,99}){1,99}z"]
)
async def test_constraint_that_explodes(client: AsyncClient, regex: str) -> None:
    """A regular expression whose automaton explodes ends its own request only, and soon."""
    options = {"prompt": "Answer:", "max_tokens": 40, "temperature": 0, "timeout_s": 30}
    alone = asyncio.create_task(client.generate(regex=regex, **options))
    other = await client.generate(prompt="Once upon a time", temperature=0, max_tokens=4, timeout_s=30)
    assert other.token_ids
    with contextlib.suppress(RequestError):
        await alone
    assert (await client.generate(prompt="x", max_tokens=1, timeout_s=10)).token_ids


async def test_rollback_under_traffic(client: AsyncClient, published: list[str]) -> None:
    """While `current` goes back and forth, every request is answered, by the version that it names."""
    ((prompt, _),) = heldout("support@v1", 1)
    expected = {
        version: (await client.generate(adapter=f"support@{version}", prompt=prompt, temperature=0, max_tokens=3)).text
        for version in ("v1", "v2")
    }
    stop = asyncio.Event()
    answered: list[str] = []

    async def ask() -> None:
        while not stop.is_set():
            answer = await client.generate(adapter="support", prompt=prompt, temperature=0, max_tokens=3)
            assert answer.text == expected[answer.adapter.version]
            answered.append(answer.adapter.version)

    async def until_answered_by(version: str) -> None:
        answered.clear()
        async with asyncio.timeout(60):
            while version not in answered and not any(task.done() for task in tasks):
                await asyncio.sleep(0.02)

    tasks = [asyncio.create_task(ask()) for _ in range(4)]
    for _ in range(5):
        await client.adapters.promote("support", "v2")
        await until_answered_by("v2")
        await client.adapters.rollback("support")
        await until_answered_by("v1")
    stop.set()
    await asyncio.gather(*tasks)


async def test_cancel_frees_the_cache(client: AsyncClient, published: list[str]) -> None:
    """A request that is cancelled gives its keys and values back."""
    stream = client.stream(adapter="support", prompt="Once upon a time", max_tokens=900, ignore_eos=True)
    await anext(stream)
    await anext(stream)
    assert (await client.engine()).load.kv_cache_usage > 0
    await stream.aclose()
    async with asyncio.timeout(5):
        while (await client.engine()).load.kv_cache_usage:
            await client.generate(prompt="x", max_tokens=1)  # vLLM reports its load when it takes a step
    load = (await client.engine()).load
    assert (load.running, load.waiting) == (0, 0)


async def test_deadline_frees_the_engine(client: AsyncClient) -> None:
    """So does one whose deadline passes."""
    with pytest.raises(Exception, match=r"(?i)deadline"):
        await client.generate(prompt="Once upon a time", max_tokens=900, ignore_eos=True, timeout_s=1)
    async with asyncio.timeout(5):
        while (await client.engine()).load.running:
            await asyncio.sleep(0.05)
    assert (await client.generate(prompt="x", max_tokens=1)).token_ids


async def test_wrong_base(client: AsyncClient, published: list[str], tmp_path: Path) -> None:
    """An adapter that was trained on another base is refused, naming both."""
    folder = tmp_path / "foreign"
    shutil.copytree(ADAPTERS["legal@v1"], folder)
    run = json.loads((folder / "run.json").read_text())
    run["base"]["fingerprint"] = "sha256:" + "0" * 64
    (folder / "run.json").write_text(json.dumps(run))
    with pytest.raises(FailedPrecondition, match="sha256:0000") as refusal:
        await client.adapters.publish(folder, "foreign")
    assert refusal.value.reason == "WRONG_BASE"
    assert "foreign" not in {adapter.name for adapter in await client.adapters.list()}


async def test_adapter_without_effect(client: AsyncClient, published: list[str], tmp_path: Path) -> None:
    """An adapter whose weights do nothing never gets into service."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "empty"
    shutil.copytree(ADAPTERS["legal@v1"], folder)
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.mul_(1e-12)
    save_file(tensors, weights)
    await client.adapters.publish(folder, "empty")
    with pytest.raises(InvalidArgument, match="changes nothing"):
        await client.adapters.preload("empty")
    assert (await client.generate(prompt="x", max_tokens=1)).token_ids


async def test_files_that_vanish(app: App, client: AsyncClient, published: list[str]) -> None:
    """The engine lives on, and answers with a loaded adapter, when every file of it is deleted under it."""
    ((prompt, right),) = heldout("legal@v1", 1)
    assert await classify(client, prompt, "legal") == right
    shutil.rmtree(app.settings.cache / "adapters")
    legal = Path(app.settings.registry) / "adapters" / "legal"
    hidden = legal.with_name("legal-hidden")
    legal.rename(hidden)
    try:
        answers = await asyncio.gather(*(classify(client, prompt, "legal@v1") for _ in range(3)))
    finally:
        hidden.rename(legal)
    assert answers == [right] * 3
    assert app.engine.alive
    assert await client.adapters.unload("legal@v1")
    assert await classify(client, prompt, "legal") == right  # fetched and checked anew


async def test_unload_everything(client: AsyncClient, published: list[str]) -> None:
    """Everything can be taken out, and the base answers on."""
    for resident in (await client.engine()).resident:
        assert await client.adapters.unload(f"{resident.name}@{resident.version}")
    assert not (await client.engine()).resident
    assert (await client.generate(prompt="Hello", max_tokens=2, ignore_eos=True)).finish_reason == "length"


@pytest.mark.parametrize("adapter", ["", "legal@v1"])
async def test_tenants_share_no_cached_prefixes(
    app: App, published: list[str], adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenant finds its own prompt's keys and values again, and never another one's: not even by the time that it takes."""
    quotas = Quotas(lambda *_: None)
    tenants = {"acme": {}, "rival": {}, "left": {"cache_group": "team"}, "right": {"cache_group": "team"}}
    quotas.adopt(Policy.model_validate({"version": 1, "tenants": tenants}))
    monkeypatch.setattr(app.generator, "_allowances", quotas.of)
    prompt = f"{adapter} " + "The contract between the two parties ends at noon. " * 40

    async def cached(tenant: str) -> int:
        async with AsyncClient(f"127.0.0.1:{app.port}", timeout_s=60, metadata=[(TENANT_KEY, tenant)]) as client:
            answer = await client.generate(adapter=adapter, prompt=prompt, max_tokens=1, temperature=0)
            return answer.usage.cached_tokens

    found = [(tenant, await cached(tenant) > 0) for tenant in ("acme", "acme", "rival", "rival", "left", "right")]
    assert found == [
        ("acme", False),
        ("acme", True),
        ("rival", False),
        ("rival", True),
        ("left", False),
        ("right", True),
    ]
