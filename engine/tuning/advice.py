"""What a run's own numbers advise: each piece says what was seen, and what to try."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from engine.config import VLLM_RANKS, load_settings, max_rank_for

_LOW = 0.9  # held-out share of exact answers below which an adapter is not good yet
_NONE = 0.1  # and below which it measures nothing: free text is hardly ever exact
_FLAT = 0.02  # relative change of the loss over the second half of a run that counts as none
_FEW = 100  # rows
_WORSE = 1.1  # times the best held-out loss, or the training loss that a run began with
_FELL = 0.75  # of the loss that a run began with: below it something was learnt
_SCALE = 2.0  # alpha / rank, as usual
_BOLD, _HIGH = 5e-3, 1e-3  # learning rates: one that adapters hardly bear, and one that short runs do


@dataclass(frozen=True)
class Evidence:
    """The numbers of a run."""

    rank: int
    alpha: float
    rslora: bool
    learning_rate: float
    losses: tuple[float, ...]
    held_out_losses: tuple[float, ...]
    held_out_exact: float
    held_out_rows: int
    rows: int
    duplicates: int
    cut: int
    max_length: int
    diverged: bool


def advise(run: Evidence) -> list[str]:
    """Everything that is worth saying, the gravest first."""
    return [text for rule in _RULES for text in rule(run)]


def _diverged(run: Evidence) -> Iterator[str]:
    if run.diverged:
        yield (
            f"the loss diverged with learning rate {run.learning_rate:g} (last {run.losses[-1]:.3g}, first "
            f"{run.losses[0]:.3g}): try {run.learning_rate / 3:.1g}, or more warmup_steps"
        )


def _cut(run: Evidence) -> Iterator[str]:
    if run.cut:
        yield (
            f"{run.cut} of {run.rows} rows are longer than max_length {run.max_length} and lost the end of their answer: "
            "the adapter learns to stop early; raise data.max_length or shorten the rows"
        )


def _scale(run: Evidence) -> Iterator[str]:
    divisor, how = (math.sqrt(run.rank), " with rslora") if run.rslora else (run.rank, "")
    scale = run.alpha / divisor
    if math.isclose(scale, _SCALE, rel_tol=0.01):
        return
    yield (
        f"alpha {run.alpha:g} at rank {run.rank}{how} scales the adapter by {scale:.3g}, where alpha = {_SCALE * divisor:.3g} "
        f"gives {_SCALE:g}: it is as if the learning rate were about {scale / _SCALE:.2g} times {run.learning_rate:g}"
    )


def _rate(run: Evidence) -> Iterator[str]:
    """Steps that are too large need not diverge; a loss that stands where it began may also have had too small ones."""
    if run.diverged or run.held_out_exact >= _LOW or not flat(run.losses):
        return
    stands, began, rate = _second_half(run), run.losses[0], run.learning_rate
    if stands > _WORSE * began or rate > _BOLD:
        yield (
            f"the loss has stood at {stands:.3g} for the second half of the run, and began at {began:.3g}: the learning rate "
            f"{rate:g} is too high; try {min(rate / 3, _HIGH):.1g}, or more warmup_steps"
        )
    elif stands * _WORSE > began:
        yield (
            f"the loss stands where it began ({began:.3g}): the learning rate {rate:g} is too high, or too low; compare: "
            f"--sweep learning_rate={rate / 10:.1g},{rate * 10:.1g}"
        )


def _rank(run: Evidence) -> Iterator[str]:
    if run.diverged or not _NONE <= run.held_out_exact < _LOW or not flat(run.losses):
        return
    if (stands := _second_half(run)) > _FELL * run.losses[0] or run.learning_rate > _BOLD:
        return
    if (more := min(2 * run.rank, VLLM_RANKS[-1])) == run.rank:
        return
    yield (
        f"the loss has stood at {stands:.3g} for the second half of the run, and only "
        f"{run.held_out_exact:.0%} of held-out answers are right: rank {run.rank} may be too low; try {more}, "
        f"or compare: --sweep rank={run.rank},{more}{_beyond(more)}"
    )


def _beyond(rank: int) -> str:
    limit = load_settings().max_rank
    allow = f" (above the limit of {limit}: set LORAPLEX_MAX_RANK={max_rank_for(rank)} here and where it is served)"
    return allow if rank > limit else ""


def _short(run: Evidence) -> Iterator[str]:
    """Neither flat nor good: it was still learning."""
    if run.diverged or run.held_out_exact >= _LOW or flat(run.losses) or len(run.held_out_losses) < 2:
        return
    if run.held_out_losses[-1] <= min(run.held_out_losses):
        yield (
            f"{run.held_out_exact:.0%} of held-out answers are right and the held-out loss was still falling "
            f"({run.held_out_losses[-2]:.3g} to {run.held_out_losses[-1]:.3g}): train longer"
        )


def _overfit(run: Evidence) -> Iterator[str]:
    if len(run.held_out_losses) < 2 or run.diverged:
        return
    best, last = min(run.held_out_losses), run.held_out_losses[-1]
    if last > _WORSE * best and run.losses and _mean(run.losses[-10:]) < best:
        yield (
            f"over-fitting: the held-out loss rose from {best:.3g} to {last:.3g} while the training loss fell to "
            f"{_mean(run.losses[-10:]):.3g} (the best checkpoint was taken): fewer steps, more rows, or some dropout"
        )


def _data(run: Evidence) -> Iterator[str]:
    if run.rows < _FEW:
        yield f"{run.rows} rows are few: what they leave out the adapter cannot know; a few hundred varied ones are usual"
    if run.duplicates > 0.1 * run.rows:
        yield f"{run.duplicates} of {run.rows} rows repeat another one: it learns those by heart instead of the task"
    if run.held_out_rows < _FEW // 2:
        yield f"{run.held_out_rows} held-out rows say little: one row is {1 / run.held_out_rows:.1%}"


def flat(losses: tuple[float, ...]) -> bool:
    """Whether the third and the last quarter of a run have the same loss, within a fiftieth of what it began with."""
    quarter = len(losses) // 4
    if quarter < 3:
        return False
    third, last = _mean(losses[-2 * quarter : -quarter]), _mean(losses[-quarter:])
    return abs(third - last) < _FLAT * max(losses[0], 1e-9)


def _second_half(run: Evidence) -> float:
    return _mean(run.losses[len(run.losses) // 2 :])


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)


_RULES: tuple[Callable[[Evidence], Iterator[str]], ...] = (
    _diverged,
    _rate,
    _cut,
    _scale,
    _rank,
    _short,
    _overfit,
    _data,
)
