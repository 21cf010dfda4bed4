"""What is measured: stages of entries. A stage's engines run together, an entry is one line of the result."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from loadtest.bench.adapters.workloads import KINDS, Kind, Mix, Workload
from loadtest.bench.engines import TARGETS, Lora

BASE, OURS, STOCK = "base", "ours", "stock"
PEFT = ("peft-one", "peft-grouped", "peft-mixed")
CONTENDERS = (BASE, OURS, STOCK, *PEFT)
BETWEEN_BASES = 4  # how many others are asked before the base is asked again
_KERNELS = {OURS: "auto", STOCK: "off"}


@dataclass(frozen=True)
class Entry:
    """One contender on one workload: what a line of the table says before its figures."""

    contender: str
    mix: Mix
    rank: int
    targets: str
    slots: int
    workload: Workload

    @property
    def lora(self) -> Lora | None:
        """The adapter slots that its vLLM engine has; None for the base and for PEFT, which has none to speak of."""
        if self.contender not in _KERNELS:
            return None
        return Lora(self.slots, self.rank, TARGETS[self.targets], _KERNELS[self.contender])

    @property
    def label(self) -> str:
        """Contender and mix, as the progress bar says it."""
        return BASE if self.contender == BASE else f"{self.contender}, {self.mix}"

    @property
    def process(self) -> str:
        """The name of the process that is asked."""
        if self.contender == BASE:
            return BASE
        if self.contender in PEFT:
            return f"PEFT, rank {self.rank} {self.targets}"
        return f"{self.contender}, {self.slots} slots, rank {self.rank} {self.targets}"


@dataclass(frozen=True)
class Grid:
    """Entries as the product of what is named; combinations without a sense are left out."""

    contenders: Sequence[str] = (BASE, OURS, STOCK)
    kinds: Sequence[Kind] = KINDS
    mixes: Sequence[Mix] = (Mix(4),)
    ranks: Sequence[int] = (16,)
    targets: Sequence[str] = ("attention",)
    batches: Sequence[int] = (16,)

    def entries(self, slots: Sequence[int], output: int) -> Iterator[Entry]:
        """The entries, the base's first of each workload; an adapter count is measured on the smallest engine it fits in."""
        for rank, targets, kind, batch in product(self.ranks, self.targets, self.kinds, self.batches):
            workload = Workload(kind, batch, output=output)
            yield Entry(BASE, Mix(0), rank, targets, 0, workload)
            for contender, mix in product(self.contenders, self.mixes):
                room = min((size for size in slots if size >= mix.adapters), default=mix.adapters)
                if _makes_sense(contender, mix, workload):
                    yield Entry(contender, mix, rank, targets, 0 if contender in PEFT else room, workload)


def _makes_sense(contender: str, mix: Mix, workload: Workload) -> bool:
    """Every adapter has a request, somebody decodes while long prompts arrive, and PEFT runs what it can."""
    if contender == BASE or mix.adapters + mix.base > workload.batch:
        return False  # the base's line is there already
    return workload.kind != "mixed" or (workload.batch > 1 and contender not in PEFT)


_COUNTS = tuple(map(Mix, (1, 4, 8, 16)))
_BASE_TOO = Mix(4, base=True)
_RANKS = (8, 16, 64)
HEADLINE = (
    Grid(kinds=("decode",), mixes=(*_COUNTS, _BASE_TOO)),
    Grid(PEFT, ("decode",)),
    Grid(kinds=("prefill",)),
    Grid(kinds=("mixed",)),
    Grid(kinds=("decode",), targets=("all-linear",)),
)
FULL = (
    Grid(
        kinds=("decode",), mixes=(*_COUNTS, _BASE_TOO), ranks=_RANKS, targets=tuple(TARGETS),
        batches=(1, 2, 4, 8, 16, 32, 64),
    ),
    Grid(kinds=("prefill",), mixes=(Mix(1), Mix(4), _BASE_TOO), ranks=_RANKS, targets=tuple(TARGETS), batches=(1, 8)),
    Grid(kinds=("mixed",), mixes=(Mix(1), Mix(4), _BASE_TOO), ranks=_RANKS, targets=tuple(TARGETS), batches=(16, 64)),
    Grid(PEFT, ("decode", "prefill"), mixes=(Mix(4), _BASE_TOO), batches=(8, 16, 64)),
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """Entries whose engines are up at the same time: those of one rank on the same layers."""

    rank: int
    targets: str
    entries: tuple[Entry, ...]

    @property
    def most_adapters(self) -> int:
        """How many adapters have to be made for it."""
        return max(entry.mix.adapters for entry in self.entries)

    def adapters_of(self, process: str) -> int:
        """How many of them one process is asked for."""
        return max(entry.mix.adapters for entry in self.entries if entry.process == process)

    @property
    def processes(self) -> dict[str, Entry]:
        """By name, one entry of each process that it needs."""
        needed: dict[str, Entry] = {}
        for entry in self.entries:
            needed.setdefault(entry.process, entry)
        return needed

    @property
    def questions(self) -> int:
        """How many there are in a round."""
        groups = self.by_workload().values()
        return sum(len(entries) + math.ceil((len(entries) - 1) / BETWEEN_BASES) for entries in groups)

    def by_workload(self) -> dict[Workload, list[Entry]]:
        """Entries that are compared with each other."""
        groups: dict[Workload, list[Entry]] = {}
        for entry in self.entries:
            groups.setdefault(entry.workload, []).append(entry)
        return groups


def stages(grids: Sequence[Grid], slots: Sequence[int], output: int) -> list[Stage]:
    """The plan of these grids; what several of them ask for is measured once."""
    groups: dict[tuple[int, str], dict[Entry, None]] = {}
    for entry in (entry for grid in grids for entry in grid.entries(slots, output)):
        groups.setdefault((entry.rank, entry.targets), {})[entry] = None
    return [Stage(rank, targets, tuple(entries)) for (rank, targets), entries in groups.items()]
