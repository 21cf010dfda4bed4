"""`loraplex top`: one frame, for people in 80 columns and for programs."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration
from rich.console import Console

from engine.api.loraplex.v1 import engine_pb2 as pb
from engine.client import Client
from engine.client.testing import FakeServer
from engine.commands.top_frame import Frame, Look
from engine.commands.top_view import view
from tests.unit.cli.calls import call


def test_one_frame(server: FakeServer) -> None:
    """What was asked is in it; without a terminal it is one frame in any case."""
    ref = f"topped@{server.publish('topped')}"
    with Client(server.target, metadata=[("x-loraplex-tenant", "gold")]) as client:
        client.generate(adapter="topped", prompt="hi")
    at = ("--server", server.target, "--interval", "0.1")
    found = call("top", *at, "--json").json
    assert (found["state"], found["max_running"]) == ("ready", 32)
    (row,) = [row for row in found["adapters"] if row["ref"] == ref]
    assert (row["running"], row["waiting"], row["failed"]) == (0, 0, 0)
    assert row["ttft_p50"] > 0
    assert ref in {one["ref"] for one in found["resident"]}
    assert "gold" in {one["name"] for one in found["tenants"]}
    assert {"ago_s", "kind", "text"} == set(found["events"][-1])
    shown = call("top", *at, "--once").out
    assert shown.startswith("ready")
    assert ref in shown
    assert shown == shown.replace("\x1b", "")


def test_no_server() -> None:
    """An unreachable server is explained."""
    refused = call("top", "--once", "--server", "127.0.0.1:1")
    assert (refused.code, "loraplex serve" in refused.err) == (1, True)


def look(at: int, count: int) -> Look:
    """A busy server with `count` adapters and tenants of long names, `at` seconds after its start."""
    long = "a" * 50
    engine = pb.GetEngineResponse(
        base=pb.BaseModel(name="base-" + long),
        limits=pb.Limits(max_running=4096, max_waiting=100_000, max_resident=1024),
        resident=[
            pb.ResidentAdapter(name=f"{long}{number}", version="v1", in_use=number % 3, pinned=number % 5 == 0)
            for number in range(count)
        ],
        load=pb.Load(running=4000, waiting=99_999, kv_cache_usage=1.0),
        engine="vllm 0.32.0 (cpu)",
    )
    activity = pb.GetActivityResponse(
        uptime=Duration(seconds=at),
        ready=True,
        generated_tokens=1_000_000 * at,
        adapters=[
            pb.AdapterActivity(
                name=f"{long}{number}", version="v999999999", requests=100 * at, failed=12_345, running=999, waiting=9999,
                generated_tokens=100_000 * at, queue_p50=Duration(seconds=100), ttft_p95=Duration(nanos=999_999_000),
            )
            for number in range(count)
        ],
        tenants=[pb.TenantActivity(name=f"{long}{n}", weight=1000, service=at * n, waiting=9999) for n in range(count)],
        events=[pb.ActivityEvent(ago=Duration(seconds=9), kind="alias", text=long * 4) for _ in range(count)],
    )  # fmt: skip
    return Look(engine, activity)


def test_it_fits_the_smallest_terminal() -> None:
    """However many and long the names are, a frame has at most 80 columns and 24 lines, and says that there are more."""
    for count in (0, 1, 200):
        console = Console(width=80, height=24, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
        with console.capture() as captured:
            for part in view(Frame("127.0.0.1:50051", look(10, count), look(20, count)), 24):
                console.print(part)
        console.file.close()
        lines = captured.get().splitlines()
        assert len(lines) <= 24
        assert max(map(len, lines)) <= 80
        assert ("more" in captured.get()) == (count > 20)


def test_rates_are_between_two_looks() -> None:
    """Requests, tokens and shares are differences over the time between."""
    frame = Frame("x", look(10, 3), look(20, 3))
    assert frame.tokens_per_s == 1_000_000
    assert {(row.requests_per_s, row.tokens_per_s) for row in frame.adapters} == {(100.0, 100_000.0)}
    assert [round(row.share, 2) for row in frame.tenants] == [0.67, 0.33, 0.0]
