"""Going on with an answer over the wire, and who may not."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from engine.api.loraplex.v1 import generation_pb2 as pb
from engine.client.testing import FakeServer
from tests.unit.server.conftest import Stubs, all_of, ask, refused


def going_on(request: pb.GenerateRequest, messages: list[Any]) -> pb.GenerateStreamRequest:
    """The request again, with what has arrived."""
    resume = pb.Resume(
        token_ids=[token for message in messages for token in message.token_ids],
        text_length=sum(len(message.text) for message in messages),
        digest=messages[0].adapter.digest,
        base_fingerprint=messages[0].adapter.base_fingerprint,
    )
    again = pb.GenerateRequest()
    again.CopyFrom(request)
    again.resume.CopyFrom(resume)
    return pb.GenerateStreamRequest(request=again)


async def test_goes_on(stubs: Stubs, server: FakeServer, name: str) -> None:
    """What comes after the cut is what would have come, usage counts all of it, and the prompt's probabilities stay away."""
    await asyncio.to_thread(server.publish, name)
    request = ask("größe", f"{name}@v1", logprobs=1, prompt_logprobs=1)
    whole = await all_of(stubs.generation.GenerateStream(pb.GenerateStreamRequest(request=request)))
    rest = await all_of(stubs.generation.GenerateStream(going_on(request, whole[:9])))
    assert [message.token_ids for message in rest] == [message.token_ids for message in whole[9:]]
    assert [message.logprobs for message in rest] == [message.logprobs for message in whole[9:]]
    assert "".join(message.text for message in rest) == "".join(message.text for message in whole[9:])
    assert rest[-1].usage == whole[-1].usage
    assert not rest[0].prompt_logprobs
    assert rest[0].adapter == whole[0].adapter


async def test_another_version_is_refused(stubs: Stubs, server: FakeServer, name: str) -> None:
    """Neither another version nor the base model nor another base goes on with a version's answer."""
    for _ in range(2):
        await asyncio.to_thread(server.publish, name)
    request = ask("hello", f"{name}@v1")
    whole = await all_of(stubs.generation.GenerateStream(pb.GenerateStreamRequest(request=request)))
    for wrong in ({"adapter": f"{name}@v2"}, {"adapter": ""}, {"base": "sha256:other"}):
        again = going_on(request, whole[:3])
        again.request.adapter = wrong.get("adapter", again.request.adapter)
        again.request.resume.base_fingerprint = wrong.get("base", again.request.resume.base_fingerprint)
        refusal = await refused(all_of(stubs.generation.GenerateStream(again)))
        assert (refusal.code.name, refusal.reason) == ("FAILED_PRECONDITION", "OTHER_VERSION")


@pytest.mark.parametrize(
    ("sampling", "field"),
    [({"max_tokens": 3}, "resume.token_ids"), ({"n": 2, "temperature": 1.0}, "resume")],
)
async def test_nothing_to_go_on_with(stubs: Stubs, sampling: dict[str, Any], field: str) -> None:
    """An answer that has all its tokens, or several answers at once, are refused."""
    whole = await all_of(stubs.generation.GenerateStream(pb.GenerateStreamRequest(request=ask("hello"))))
    refusal = await refused(all_of(stubs.generation.GenerateStream(going_on(ask("hello", **sampling), whole[:3]))))
    assert (refusal.code.name, list(refusal.violations)) == ("INVALID_ARGUMENT", [field])


async def test_a_token_outside_the_vocabulary(stubs: Stubs) -> None:
    """A token that the base does not have is refused before the engine sees it."""
    whole = await all_of(stubs.generation.GenerateStream(pb.GenerateStreamRequest(request=ask("hello"))))
    again = going_on(ask("hello"), whole[:3])
    again.request.resume.token_ids.append(10**6)
    assert (await refused(all_of(stubs.generation.GenerateStream(again)))).code.name == "INVALID_ARGUMENT"
