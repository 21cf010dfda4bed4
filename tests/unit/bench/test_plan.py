"""What the benchmark measures: the headline has what is promised, and a grid leaves out what makes no sense."""

from __future__ import annotations

from loadtest.bench.adapters.plan import BASE, FULL, HEADLINE, OURS, PEFT, STOCK, Grid, stages
from loadtest.bench.adapters.workloads import Mix
from loadtest.bench.engines import ALL_LINEAR, EngineSpec, Lora


def test_the_headline_has_every_promised_line() -> None:
    """Ours and stock with 1 to 16 adapters and base rows, PEFT three ways, prefill, mixed work, all layers."""
    attention, all_linear = stages(HEADLINE, (4, 16), 16)
    decode = {
        (entry.contender, str(entry.mix)) for entry in attention.entries if entry.workload.kind == "decode"
    }  # fmt: skip
    mixes = ("1 adapter", "4 adapters", "8 adapters", "16 adapters", "base + 4 adapters")
    assert decode == {
        (BASE, "base only"), *((name, mix) for name in (OURS, STOCK) for mix in mixes), *((way, mixes[1]) for way in PEFT),
    }  # fmt: skip
    for kind in ("prefill", "mixed"):
        found = [str(entry.contender) for entry in attention.entries if entry.workload.kind == kind]
        assert found == [BASE, OURS, STOCK]
    assert [entry.contender for entry in all_linear.entries] == [BASE, OURS, STOCK]
    assert all_linear.targets == "all-linear"


def test_every_workload_of_a_stage_has_its_base_first() -> None:
    """Ratios need it, of the same round."""
    for stage in (*stages(HEADLINE, (4, 16), 16), *stages(FULL, (4, 16), 16)):
        for entries in stage.by_workload().values():
            assert [entry.contender == BASE for entry in entries] == [True] + [False] * (len(entries) - 1)


def test_a_count_is_measured_on_the_smallest_engine_it_fits_in() -> None:
    """And on one of its own where it fits in none."""
    (stage,) = stages([Grid((OURS,), ("decode",), tuple(map(Mix, (1, 4, 8, 20))), batches=(32,))], (4, 16), 16)
    assert [entry.slots for entry in stage.entries if entry.contender == OURS] == [4, 4, 16, 20]
    assert next(iter(stage.processes)) == BASE
    assert stage.adapters_of("ours, 4 slots, rank 16 attention") == 4


def test_combinations_without_a_sense_are_left_out() -> None:
    """No more adapters than requests, nobody late alone, nobody late in a static batch."""
    grid = Grid((OURS, *PEFT), ("decode", "mixed"), (Mix(1), Mix(4), Mix(4, base=True)), batches=(1, 4))
    (stage,) = stages([grid], (4,), 16)
    for entry in stage.entries:
        assert entry.mix.adapters + entry.mix.base <= entry.workload.batch
        if entry.workload.kind == "mixed" and entry.contender != BASE:
            assert entry.workload.batch > 1
            assert entry.contender == OURS


def test_what_two_grids_ask_for_is_measured_once() -> None:
    """Entries are a set in order."""
    (once,), (twice,) = stages([Grid()], (4,), 16), stages([Grid(), Grid()], (4,), 16)
    assert once == twice


def test_ours_and_stock_differ_in_the_kernels_alone() -> None:
    """Their engines have the same arguments; the environment picks whose code applies adapters."""
    ours, stock = EngineSpec("base", Lora(4, 16)), EngineSpec("base", Lora(4, 16, kernels="off"))
    assert ours.engine_args(on_cpu=True) == stock.engine_args(on_cpu=True)
    differing = {
        name for name, value in ours.environment().items() if stock.environment()[name] != value
    }  # fmt: skip
    assert differing == {"LORAPLEX_LORA_KERNELS"}


def test_the_base_differs_in_having_no_lora() -> None:
    """One slot more than adapters, as the server has it, and nothing else."""
    base, lora = EngineSpec("base").engine_args(True), EngineSpec("base", Lora(4, 12, ALL_LINEAR)).engine_args(True)
    assert {name: lora[name] for name in lora.keys() - base.keys()} == {
        "enable_lora": True, "max_loras": 5, "max_cpu_loras": 5, "max_lora_rank": 16,
        "lora_target_modules": list(ALL_LINEAR),
    }  # fmt: skip
    assert base.items() <= lora.items()


def test_a_gpu_gets_no_argument_of_a_cpu() -> None:
    """No eager mode and no small steps there, but a share of the memory, as several engines live on it."""
    args = EngineSpec("base", gpu_share=0.2).engine_args(on_cpu=False)
    assert args.keys().isdisjoint({"enforce_eager", "max_num_batched_tokens"})
    assert args["gpu_memory_utilization"] == 0.2


def test_a_spec_survives_its_way_to_the_process() -> None:
    """It is sent as JSON."""
    for spec in (EngineSpec("base"), EngineSpec("base", Lora(4, 16, ALL_LINEAR, "off"), "float32")):
        assert EngineSpec.from_json(spec.to_json()) == spec
