"""Faults on purpose: connections that break, a network that stands still, a server that refuses."""

from __future__ import annotations

import pytest

from loadtest.drive.actions import check
from loadtest.drive.case import run_case
from loadtest.drive.proxy import proxied
from loadtest.errors import BadInput
from loadtest.plan.scenario import Action, Case
from loadtest.selftest import trials
from loadtest.selftest.server import Script, ScriptedServer


async def test_dropped_connections_fail_what_was_under_way_and_nothing_else(scripted: ScriptedServer) -> None:
    """Streams that a reset cuts off are failures, not wrong answers; the clients connect again."""
    scripted.reset(Script(ttft_s=(0.1,)))
    async with trials.site(scripted) as found:
        load = trials.workload(duration=0.6, actions=[{"do": "drop_connections", "at": 0.25}], canary=0)
        result = await run_case(found, Case(scenario="drop", name="", workload=load))
    (event,) = result.events
    assert (event.detail, event.error) == ("1 connections reset", "")
    failed = [one for one in result.records if one.status == "error"]
    assert 0 < len(failed) < len(result.records) / 2
    assert all("UNAVAILABLE" in one.reason for one in failed)
    assert max(one.row for one in result.records if one.status == "ok") > max(one.row for one in failed)
    assert not result.correctness.wrong


async def test_stalled_network_delays_and_loses_nothing(scripted: ScriptedServer) -> None:
    """While nothing goes through, answers wait; each comes whole afterwards."""
    async with trials.site(scripted) as found:
        load = trials.workload(duration=0.4, actions=[{"do": "stall_network", "at": 0.1, "lasts": 0.2}], drain=2)
        result = await run_case(found, Case(scenario="stall", name="", workload=load))
    assert trials.alarms(result) == []
    assert result.measures["ttft"]["p999"] > 0.1


async def test_unload_refused_in_use_is_an_answer(scripted: ScriptedServer) -> None:
    """A refusal because requests use the adapter fails no check; any other error of an action does."""
    scripted.in_use.add("ada")
    actions = [{"do": "unload", "at": 0.05, "adapter": "ada"}, {"do": "unload", "at": 0.05, "adapter": "nobody"}]
    async with trials.site(scripted) as found:
        result = await run_case(
            found, Case(scenario="s", name="", workload=trials.workload(duration=0.2, actions=actions))
        )
    by_name = {event.adapter: event for event in result.events}
    assert by_name["ada"].detail == "refused: ada is in use"
    assert by_name["nobody"].error
    assert [check.name for check in result.checks if check.verdict == "DOES NOT MEET"] == ["unload nobody"]


@pytest.mark.parametrize("do", ["kill", "stop_engine", "break_registry", "publish"])
def test_only_our_own_server_is_hurt(do: str) -> None:
    """A server that somebody else runs is never killed, stopped or written to."""
    with pytest.raises(BadInput, match="starts itself only"):
        check((Action.model_validate({"do": do}),), None)


async def test_a_target_that_is_away_ends_the_connection() -> None:
    """A proxy before nobody refuses, and ends."""
    async with proxied(("127.0.0.1:1",)) as proxies:
        (address,) = proxies
        host, port = address.split(":")
        import asyncio

        reader, writer = await asyncio.open_connection(host, int(port))
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
