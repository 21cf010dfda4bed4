"""The tape: every request of a run, decided before the first is sent.

The same seed makes the same tape, so two servers can be given exactly the same work, and a run can be played again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loadtest.errors import BadInput
from loadtest.plan import arrivals, lengths, popularity, traces
from loadtest.plan.scenario import Workload

BASE = -1
"""The index that stands for the base model, without an adapter."""

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]
_CLOSED_PER_SECOND = 200  # most requests a second of one caller that a closed tape has room for
_CLOSED_MOST = 200_000


@dataclass(frozen=True)
class Tape:
    """The columns of the schedule, one row a request. In a closed loop `at` is all zero: callers take rows in order."""

    adapters: tuple[str, ...]
    at: Floats
    """Seconds after the start."""
    adapter: Ints
    """Index into `adapters`, or BASE."""
    prompt_tokens: Ints
    max_tokens: Ints
    canary: Ints
    """Number of a canary prompt, or -1."""
    cancel_after: Ints
    """Messages after which the client gives up, or 0."""
    callers: int = 0
    think_s: float = 0.0

    def __len__(self) -> int:
        return len(self.at)

    def name(self, row: int) -> str:
        """Who is asked in a row; empty for the base model."""
        index = int(self.adapter[row])
        return "" if index == BASE else self.adapters[index]

    @property
    def sha256(self) -> str:
        """The identity of the schedule: a digest of all that it decides."""
        digest = hashlib.sha256(json.dumps([self.adapters, self.callers, self.think_s]).encode())
        for column in _COLUMNS:
            digest.update(np.ascontiguousarray(getattr(self, column)).astype(_TYPES[column]).tobytes())
        return digest.hexdigest()


_COLUMNS = ("at", "adapter", "prompt_tokens", "max_tokens", "canary", "cancel_after")
_TYPES = {"at": "<f8"} | dict.fromkeys(_COLUMNS[1:], "<i4")


def build(workload: Workload, adapters: tuple[str, ...], canaries: int = 0, canary_tokens: int = 16) -> Tape:
    """The tape of a workload whose arrival has no relative rate any more. `canaries`: how many canary prompts there are.

    Raises BadInput when nothing would be asked.
    """
    streams = [np.random.default_rng(seed) for seed in np.random.SeedSequence(workload.seed).spawn(6)]
    arrival = arrivals.parse(workload.arrival)
    trace = traces.read(Path(arrival.file)) if arrival.kind == "trace" else None
    try:
        at = _times(workload, arrival, trace, streams[0])
        who = _who(workload, adapters, trace, len(at), streams[1])
        at, who = _with_burst(workload, arrival, adapters, at, who, streams[5])
    except ValueError as error:
        raise BadInput(str(error)) from error
    count = len(at)
    if not count:
        raise BadInput(f"arrival {workload.arrival} brings no request within {workload.duration:g} s", "Raise either.")
    prompt, output = _sizes(workload, trace, count, streams[2])
    canary = np.where(
        streams[3].random(count) < (workload.canary if canaries else 0.0),
        streams[3].integers(0, max(canaries, 1), count),
        -1,
    )
    output = np.where(canary >= 0, canary_tokens, output)
    cancel = np.where(streams[4].random(count) < workload.cancel, np.maximum(output // 2, 1), 0)
    cancel[canary >= 0] = 0
    return Tape(
        adapters, at, who, prompt, output.astype(np.int32), canary.astype(np.int32), cancel.astype(np.int32),
        arrival.callers, arrival.think_s,
    )  # fmt: skip


def write(tape: Tape, path: Path) -> None:
    """Keep a tape as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    about = {"adapters": tape.adapters, "callers": tape.callers, "think_s": tape.think_s, "sha256": tape.sha256}
    table = pa.table({name: getattr(tape, name) for name in _COLUMNS})
    pq.write_table(table.replace_schema_metadata({"loraplex.tape": json.dumps(about)}), path)


def read(path: Path) -> Tape:
    """A tape from Parquet. Raises BadInput for another file, or one whose rows were changed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        about = json.loads((table.schema.metadata or {})[b"loraplex.tape"])
        columns = {name: table[name].to_numpy() for name in _COLUMNS}
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise BadInput(f"{path} is no tape: {error}", "Give the tape.parquet of an earlier run.") from error
    tape = Tape(tuple(about["adapters"]), **columns, callers=about["callers"], think_s=about["think_s"])
    if tape.sha256 != about["sha256"]:
        raise BadInput(f"{path} was changed: its rows do not have the digest that it was written with")
    return tape


def _times(
    workload: Workload, arrival: arrivals.Arrival, trace: traces.Trace | None, rng: np.random.Generator
) -> Floats:
    if trace:
        at = np.asarray(trace.at) / arrival.scale
        return at[at < workload.duration]
    if arrival.callers:
        return np.zeros(
            min(int(arrival.callers * workload.duration * _CLOSED_PER_SECOND) + arrival.callers, _CLOSED_MOST)
        )
    return arrivals.times(arrival, workload.duration, rng)


def _who(
    workload: Workload, adapters: tuple[str, ...], trace: traces.Trace | None, count: int, rng: np.random.Generator
) -> Ints:
    if trace and trace.adapters is not None:
        index = {name: at for at, name in enumerate(adapters)} | {"": BASE}
        if unknown := [name for name in trace.adapters if name not in index]:
            raise ValueError(f"the trace asks for {unknown[0]!r}, which the target does not have")
        return np.array([index[name] for name in trace.adapters[:count]], dtype=np.int32)
    if workload.base_share >= 1 or not adapters:
        return np.full(count, BASE, dtype=np.int32)
    who = popularity.draw(workload.popularity, adapters, count, rng)
    who[rng.random(count) < workload.base_share] = BASE
    return who


def _with_burst(
    workload: Workload,
    arrival: arrivals.Arrival,
    adapters: tuple[str, ...],
    at: Floats,
    who: Ints,
    rng: np.random.Generator,
) -> tuple[Floats, Ints]:
    """Add the extra arrivals of the noisy tenant."""
    burst = workload.burst
    if not burst or not adapters:
        return at, who
    noisy = noisy_adapter(workload, adapters)
    expected = popularity.shares(workload.popularity, adapters)[adapters.index(noisy)]
    start, end = burst.start * workload.duration, burst.end * workload.duration
    rate = arrival.rate * float(expected) * burst.times
    extra = arrivals.times(arrivals.parse(f"poisson:{rate:.6g}"), end - start, rng) + start
    times = np.concatenate([at, extra])
    order = np.argsort(times, kind="stable")
    whom = np.concatenate([who, np.full(len(extra), adapters.index(noisy), dtype=np.int32)])
    return times[order], whom[order]


def noisy_adapter(workload: Workload, adapters: tuple[str, ...]) -> str:
    """The tenant of the burst; empty when there is none."""
    if not workload.burst:
        return ""
    name = workload.burst.adapter or adapters[int(np.argmax(popularity.shares(workload.popularity, adapters)))]
    if name not in adapters:
        raise ValueError(f"burst: no adapter {name!r} among those that are asked")
    return name


def _sizes(workload: Workload, trace: traces.Trace | None, count: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
    if trace:
        return np.array(trace.prompt_tokens[:count], np.int32), np.array(trace.output_tokens[:count], np.int32)
    return lengths.draw(workload.prompt, count, rng), lengths.draw(workload.output, count, rng)
