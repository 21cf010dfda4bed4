"""`loraplex health`: an exit code for containers."""

from __future__ import annotations

from engine.client.testing import FakeServer
from tests.unit.cli.calls import call


def test_a_server_that_serves(server: FakeServer) -> None:
    """It is said, and the exit code is 0."""
    asked = call("health", "--server", server.target)
    assert (asked.code, "is serving" in asked.out) == (0, True)


def test_nobody_there() -> None:
    """The exit code is 1 within the time that was given."""
    asked = call("health", "--server", "127.0.0.1:1", "--timeout", "0.2")
    assert (asked.code, "was not ready within 0.2 s" in asked.err) == (1, True)


def test_by_http(server: FakeServer) -> None:
    """One ready port of several is enough, as in an image that runs a server or a router."""
    port = server.http_url.removeprefix("http://")
    asked = call("health", "--http", "127.0.0.1:1", "--http", port)
    assert (asked.code, f"{port} is serving" in asked.out) == (0, True)
    asked = call("health", "--http", "127.0.0.1:1", "--timeout", "0.5")
    assert (asked.code, "not ready" in asked.err) == (1, True)
