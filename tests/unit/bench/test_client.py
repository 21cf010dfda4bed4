"""The benchmark of the load test's own client, small."""

from __future__ import annotations

import pytest

from loadtest.bench.client import TOKENS, measure


@pytest.mark.slow
async def test_every_message_of_every_rate_is_counted() -> None:
    """Each rate sends its streams and receives all of them; the messages a second are those that were offered."""
    (found,) = await measure([500], 3.0)
    assert found["answered"] == 500 * 3 / TOKENS
    assert found["failed"] == 0
    assert 250 < found["received_per_s"] < 1000
    assert found["cpu"] > 0
