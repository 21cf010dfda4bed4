"""How many threads an engine on a CPU computes with."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from engine.vllm_plugin.threads import bound_to, compute_threads, on_every_core


class Cpu(NamedTuple):
    """A logical CPU."""

    physical_core: int
    numa_node: int


MACHINE = [Cpu(physical_core=n // 2, numa_node=n // 4) for n in range(8)]  # two nodes of two cores of two CPUs each
NO_LIMIT = "max 100000\n"


@pytest.mark.parametrize(
    ("allowed", "quota", "threads"),
    [
        (MACHINE, NO_LIMIT, 2),
        (MACHINE[:1], NO_LIMIT, 1),
        (MACHINE[5:], NO_LIMIT, 2),
        (MACHINE, "100000 100000\n", 1),
        (MACHINE, "150000 100000\n", 2),
        (MACHINE, "5000 100000\n", 1),
        (MACHINE, "900000 100000\n", 2),
        (MACHINE, "", 2),
    ],
)
def test_compute_threads(allowed: list[Cpu], quota: str, threads: int, tmp_path: Path) -> None:
    """One for each physical core of one node, within the container's limit."""
    (tmp_path / "cpu.max").write_text(quota)
    assert compute_threads(allowed, tmp_path / "cpu.max") == threads


def test_cores_that_were_chosen() -> None:
    """A thread for each, and each at its own."""
    assert bound_to([2, 5]) == {"OMP_NUM_THREADS": "2", "OMP_PLACES": "{2},{5}", "OMP_PROC_BIND": "true"}


def test_cores_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two engines' lists, or none at all, are refused."""
    for wrong in ("0-1|2-3", "all"):
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", wrong)
        with pytest.raises(ValueError, match="is no list of cores"):
            on_every_core()


def test_outside_of_a_container(tmp_path: Path) -> None:
    """Without a limit the cores count."""
    assert compute_threads(MACHINE, tmp_path / "none") == 2
