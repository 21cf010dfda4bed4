"""The audit log, and secrets: the one holds every act, and none of the others is anywhere."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import structlog
from grpc import aio

from engine.api.loraplex.v1 import adapters_pb2 as apb
from engine.client import AsyncClient, Credentials, RequestError
from engine.client.testing import write_adapter
from engine.runtime.fake import FakeEngine
from engine.server.app import App
from engine.server.call import Call
from engine.server.identity.audit import AuditLog
from engine.server.identity.keys import new_key
from engine.server.identity.tls import Tls
from tests.unit.cli.calls import call
from tests.unit.identity.conftest import TENANTS, Authority, Keys, jwks, make_keys, signing_key, token
from tests.unit.server.conftest import all_of, ask, running, settings_in, stubs_to, until


def lines(path: Path) -> list[dict[str, Any]]:
    """The audit log's lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def keys() -> Keys:
    """Keys of this test's own server."""
    return make_keys(TENANTS)


@pytest.fixture
async def app(tmp_path: Path, keys: Keys) -> AsyncIterator[App]:
    """A server that writes an audit log."""
    settings = settings_in(tmp_path, policy=keys.write(tmp_path / "policy.yaml"), audit_log=tmp_path / "audit.jsonl")
    async with running(App(settings, FakeEngine())) as started:
        yield started


async def test_every_act_is_written_down(app: App, keys: Keys, tmp_path: Path) -> None:
    """Each act has a line with who, what, from where and what became of it, refused ones too; reading has none."""
    write_adapter(tmp_path / "a")
    log = tmp_path / "audit.jsonl"
    target = f"127.0.0.1:{app.port}"
    async with AsyncClient(target, api_key=keys.of["rival"]) as client, stubs_to(target) as stubs:
        version = (await client.adapters.publish(tmp_path / "a", "rival-bot")).version
        await client.adapters.promote("rival-bot", version, reason='it is "better"\n{"tenant": "ops"}')
        for refused in (client.adapters.unload("rival-bot"), client.adapters.promote("acme-bot", "v1")):
            with pytest.raises(RequestError):
                await refused
        with pytest.raises(RequestError):
            await client.adapters.promote("rival-bot", "v9")
        await client.adapters.list()
        with suppress(aio.AioRpcError):  # nobody is known: it is in the server's log, and does not fill this one
            await all_of(stubs.adapters.SetAlias(apb.SetAliasRequest(name="a", alias="b", version="v1")))
    await until(lambda: len(lines(log)) >= 5)  # of a stream, the end comes after the last message
    told = {(one["method"], one["result"]): one for one in lines(log) if one.get("adapter") != "acme-bot"}
    assert {key: one.get("adapter") for key, one in told.items()} == {
        ("PublishAdapter", "OK"): "rival-bot",
        ("SetAlias", "OK"): "rival-bot",
        ("UnloadAdapter", "PERMISSION_DENIED"): None,
        ("SetAlias", "NOT_FOUND"): "rival-bot",
    }
    assert [one["result"] for one in lines(log) if one.get("adapter") == "acme-bot"] == ["PERMISSION_DENIED"]
    act = told["SetAlias", "OK"]
    assert act["tenant"] == "rival"
    assert act["credential"] == f"key:{keys.of['rival'].split('_')[1]}"
    assert act["peer"].startswith("ipv4:127.0.0.1:")
    assert act["request_id"]
    assert act["time"].endswith("+00:00")
    assert act["detail"] == {"alias": "current", "version": "v1", "reason": 'it is "better"\n{"tenant": "ops"}'}
    assert told["SetAlias", "NOT_FOUND"]["reason"] == "ADAPTER_NOT_FOUND"
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_rotation(tmp_path: Path) -> None:
    """A log that was moved away is followed by a new one, and one that was there is gone on with."""
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.write(act=1)
    path.rename(tmp_path / "audit.jsonl.1")
    log.write(act=2)
    log.close()
    again = AuditLog(path)
    again.write(act=3)
    again.close()
    assert [one["act"] for one in lines(tmp_path / "audit.jsonl.1")] == [1]
    assert [one["act"] for one in lines(path)] == [2, 3]


def test_a_line_after_the_end(tmp_path: Path) -> None:
    """A call that ends after the log was closed is in it, and in no other file that was opened meanwhile."""
    log = AuditLog(tmp_path / "audit.jsonl")
    log.close()
    with (tmp_path / "other").open("wb", buffering=0) as other:  # it has the number that the log had
        log.write(method="Late")
        log.close()
        assert other.write(b"mine") == 4
    assert (tmp_path / "other").read_bytes() == b"mine"
    assert json.loads((tmp_path / "audit.jsonl").read_text())["method"] == "Late"


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that cannot be written is counted, and stands in the server's log at least."""
    failed: list[int] = []
    log = AuditLog(tmp_path / "audit.jsonl", lambda: failed.append(1))

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with structlog.testing.capture_logs() as logged:
        log.write(method="SetAlias", tenant="acme")
    monkeypatch.undo()
    log.close()
    assert failed == [1]
    assert '"tenant": "acme"' in logged[0]["line"]


async def test_no_secret_is_anywhere(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a session with keys, tokens, certificates and mistakes, no secret is in any file, log, metric, error or repr."""
    keys = make_keys(TENANTS, issuers=[{"issuer": "https://login.test", "audience": "loraplex", "jwks": "jwks.json"}])
    (tmp_path / "jwks.json").write_text(jwks(k1=signing_key("k1")))
    pair = Authority().issue("one")
    for name, data in zip(("tls.crt", "tls.key"), pair, strict=True):
        (tmp_path / name).write_bytes(data)
    good, stale, prompt = token(), token(exp=1), "the-prompt-is-nobodys-business"
    work = tmp_path / "work"
    work.mkdir()
    settings = settings_in(
        work, policy=keys.write(tmp_path / "policy.yaml"), audit_log=work / "audit.jsonl", log_level="debug"
    )
    structlog_before = structlog.get_config()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG), cache_logger_on_first_use=False
    )
    tls = Tls(tmp_path / "tls.crt", tmp_path / "tls.key", None)
    said: list[str] = [repr(settings), repr(tls), str(vars(tls)), str(vars(tls.files))]
    app = App(settings)
    try:
        async with running(app):
            await _session(app, keys, [good, stale], prompt, work, said)
            (tmp_path / "policy.yaml").write_text(f"version: 1\ntenants: {{a: {{keys: [{keys.of['ops']}]}}}}")
            await app.identity.refresh()
            said.append(app.metrics.text().decode())
            said += [repr(app.identity.policy), str(vars(app.identity)), str(vars(app))]
    finally:
        structlog.configure(**structlog_before)
    monkeypatch.setenv("LORAPLEX_API_KEY", keys.of["ops"])
    said += [
        repr(Credentials.from_environment()),
        *(f"{one.out}{one.err}" for one in await asyncio.to_thread(_commands)),
    ]
    captured = capfd.readouterr()
    said += [captured.out, captured.err]
    said += [path.read_bytes().decode(errors="replace") for path in work.rglob("*") if path.is_file()]
    everything = "\n".join(said)
    secrets = [*(key.split("_", 2)[2] for key in keys.of.values()), *(one.rpartition(".")[2] for one in (good, stale))]
    secrets += [pair[1].decode().splitlines()[1], prompt]
    assert "key:" in everything  # the session was written about
    assert "a changed file is broken" in everything
    assert [secret for secret in secrets if secret in everything] == []


async def _session(app: App, keys: Keys, tokens: list[str], prompt: str, work: Path, said: list[str]) -> None:
    write_adapter(work / "a")
    target = f"127.0.0.1:{app.port}"
    credentials = [*keys.of.values(), *tokens, keys.of["acme"][:-3] + "xyz", f"lpx_{'a' * 300}", new_key()[0]]
    for credential in credentials:
        async with AsyncClient(target, api_key=credential, retries=0) as client:
            said.append(repr(client) + str(vars(client)))
            for work_ in (
                client.adapters.publish(work / "a", "rival-bot"),
                client.generate(prompt=prompt, adapter="acme-bot"),
                client.generate(prompt=prompt, max_tokens=10**9),
            ):
                try:
                    await work_
                except RequestError as error:
                    said.append(f"{error!r} {error} {error.fix} {vars(error)}")
    async with stubs_to(target) as stubs:
        for value in (f"Basic {keys.of['ops']}", keys.of["ops"], f"Bearer  {keys.of['ops']}"):
            try:
                await stubs.generation.Generate(ask(), metadata=(("authorization", value),))
            except aio.AioRpcError as error:
                said.append(str(error))


def _commands() -> list[Any]:
    return [
        call("generate", "hi", "--server", "127.0.0.1:1"),
        call("generate", "hi", "--server", "10.0.0.1:1"),
        call("generate", "--help"),
        call("serve", "--help"),
        call("policy", "check", "/dev/null"),
    ]


_BUG = """
import sys
import urllib.error
import urllib.request
from pathlib import Path
import grpc
from engine.api.loraplex.v1 import generation_pb2, generation_pb2_grpc
from engine.client.testing import fake_server
from engine.config import RouterSettings
from engine.server import logs
from engine.server.identity import identity

def broken(*_):
    raise ValueError("a bug")

folder, key, prompt = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
logs.configure(RouterSettings(replicas="127.0.0.1:1", log_format="console"))
with fake_server(policy=folder / "policy.yaml", audit_log=folder / "audit.jsonl") as server:
    identity.authenticate_key = broken
    with grpc.insecure_channel(server.target) as channel:
        request = generation_pb2.GenerateRequest(text=prompt)
        try:
            generation_pb2_grpc.GenerationServiceStub(channel).Generate(
                request, metadata=(("authorization", f"Bearer {key}"),)
            )
        except grpc.RpcError as error:
            print(error.code().name)
    page = urllib.request.Request(f"{server.http_url}/console/me", headers={"Authorization": f"Bearer {key}"})
    try:
        urllib.request.urlopen(page)
    except urllib.error.HTTPError as error:
        print(error.code)
"""


def test_no_secret_is_in_a_bugs_traceback(tmp_path: Path) -> None:
    """What a bug leaves on a console is where it happened, not what the variables held: keys and prompts are in them."""
    keys, prompt = make_keys(TENANTS), "nobodys-business"
    keys.write(tmp_path / "policy.yaml")
    done = subprocess.run(
        [sys.executable, "-c", _BUG, tmp_path, keys.of["ops"], prompt], check=False, capture_output=True, text=True,
        cwd=Path(__file__).parents[3], env={"HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout.split() == ["INTERNAL", "500"], done.stderr
    assert [secret for secret in (keys.of["ops"].split("_", 2)[2], prompt) if secret in done.stderr] == []
    assert done.stderr.count("ValueError: a bug") == 2


def test_what_is_written_of_a_call_that_is_gone() -> None:
    """GRPC's context is not asked for the peer at a call's end: when the call has been freed, that ends the process."""

    class Context:
        gone = False

        def peer(self) -> str:
            assert not self.gone
            return "ipv4:10.0.0.1:5"

        def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
            return ()

    context = Context()
    call = Call("/loraplex.v1.AdapterService/SetAlias", context)  # type: ignore[arg-type]
    context.gone = True
    assert call.audit()["peer"] == "ipv4:10.0.0.1:5"
