"""The same prompts for everybody, and rates that measure what they say."""

from __future__ import annotations

import pytest

from loadtest.bench.adapters.workloads import KINDS, Ask, Kind, Mix, Step, Workload, decode_rate, measure, measure_steps
from loadtest.bench.samples import Sample


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_depend_on_the_seed_alone(kind: Kind) -> None:
    """Whoever is asked, and with whatever adapters, reads the same; another round reads something else."""
    workload = Workload(kind, 16)
    base, mixed = workload.asks(1, 1000, Mix(0)), workload.asks(1, 1000, Mix(4, base=True))
    assert [ask.prompt for ask in base] == [ask.prompt for ask in mixed]
    assert [ask.prompt for ask in base] != [ask.prompt for ask in workload.asks(2, 1000, Mix(0))]
    assert all(0 <= token < 1000 for ask in base for token in ask.prompt)


def test_a_rehearsal_has_the_rounds_shapes_but_fewer_tokens() -> None:
    """It warms up what the rounds use."""
    workload = Workload("decode", 16, output=48)
    assert len(workload.rehearsal().asks(0, 10, Mix(1))) == 16
    assert workload.rehearsal().output == 12
    assert Workload("prefill", 4).rehearsal() == Workload("prefill", 2)


@pytest.mark.parametrize(
    ("mix", "owners"),
    [
        (Mix(0), [0, 0, 0, 0, 0, 0]),
        (Mix(1), [1, 1, 1, 1, 1, 1]),
        (Mix(4), [1, 2, 3, 4, 1, 2]),
        (Mix(2, base=True), [0, 1, 2, 0, 1, 2]),
    ],
    ids=str,
)
def test_adapters_take_turns(mix: Mix, owners: list[int]) -> None:
    """Requests of one batch belong to all adapters, and to the base where it takes part."""
    assert mix.owners(6) == owners


def test_long_prompts_of_a_mixed_workload_arrive_while_the_others_generate() -> None:
    """They wait for progress, not for the clock: a slow contender gets the same mix."""
    asks = Workload("mixed", 16, output=16).asks(1, 100, Mix(4))
    late = [ask for ask in asks if ask.after]
    assert [len(ask.prompt) for ask in late] == [256, 256]
    assert [ask.after for ask in late] == [5, 10]
    assert asks[0].after == 0


def test_the_decode_rate_leaves_out_reading_the_prompts() -> None:
    """Two requests of ten tokens a second each are 20 tokens a second, however late their first tokens came."""
    times = [[5.0 + 0.1 * step for step in range(10)], [5.2 + 0.1 * step for step in range(10)]]
    assert decode_rate([Sample(0.0, list(moments)) for moments in times]) == pytest.approx(20.0)


def test_a_step_that_reaches_its_requests_one_by_one_is_not_cut() -> None:
    """Sixteen requests of one step: the rate is the step's, to the token."""
    samples = [Sample(0.0, [1.0 + 0.05 * step + 0.0005 * row for step in range(8)]) for row in range(16)]
    assert decode_rate(samples) == pytest.approx(16 / 0.05)


def test_a_step_that_was_held_up_does_not_count() -> None:
    """The machine's hiccup is not the contender's speed."""
    moments = [1.0, 1.1, 1.2, 1.3, 2.3, 2.4, 2.5]
    assert decode_rate([Sample(0.0, moments)]) == pytest.approx(10.0)


def test_answers_too_short_to_tell_are_refused() -> None:
    """Rather than a rate of nothing."""
    with pytest.raises(ValueError, match="longer answers"):
        decode_rate([Sample(0.0, [1.0, 1.1]), Sample(0.0, [1.0, 1.1])])


def test_prefill_counts_prompt_tokens_until_the_last_first_token() -> None:
    """Two prompts of 100 tokens in two seconds."""
    asks = [Ask([1] * 100, 1), Ask([1] * 100, 1)]
    found = measure("prefill", asks, [Sample(10.0, [11.0]), Sample(10.0, [12.0])])
    assert found["tokens_per_s"] == pytest.approx(100.0)


def test_mixed_counts_tokens_read_and_written() -> None:
    """30 read and 3 written in three seconds."""
    asks = [Ask([1] * 10, 2), Ask([1] * 20, 1, after=1)]
    found = measure("mixed", asks, [Sample(0.0, [1.0, 3.0]), Sample(1.0, [2.0])])
    assert found["tokens_per_s"] == pytest.approx(11.0)


def test_a_failed_request_fails_the_measurement() -> None:
    """The others had less company: their rate would flatter."""
    failed = Sample(0.0, [], "EngineDeadError: gone")
    with pytest.raises(ValueError, match="1 of 2 requests failed: EngineDeadError"):
        measure("prefill", [Ask([1], 1)] * 2, [Sample(0.0, [1.0]), failed])


def test_batches_one_after_the_other_add_their_times() -> None:
    """Two groups of two rows, 10 and 5 steps a second: 4 tokens in every 0.3 s of decoding."""
    steps = [Step(2, 8, 0.0, [1.0, 1.1, 1.2]), Step(2, 8, 2.0, [3.0, 3.2, 3.4])]
    assert measure_steps("decode", steps)["tokens_per_s"] == pytest.approx(4 / 0.3)
    assert measure_steps("prefill", steps)["tokens_per_s"] == pytest.approx(32 / 2.0)


def test_nothing_arrives_late_in_a_static_batch() -> None:
    """PEFT takes no part in mixed work."""
    with pytest.raises(ValueError, match="late arrivals"):
        measure_steps("mixed", [Step(1, 8, 0.0, [1.0, 1.1])])
