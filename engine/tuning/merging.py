"""One merge from beginning to end: choose what to merge onto, write, compare, describe, show what 4 bits would cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from engine.errors import MergeRefused
from engine.registry.checks import FULL
from engine.registry.fingerprint import check_base
from engine.tuning import merge
from engine.tuning.base_model import load_base, load_tokenizer
from engine.tuning.deltas import Deltas
from engine.tuning.judging import Judged, judge
from engine.tuning.merge_check import (
    check_likeness,
    erasure,
    in_memory,
    likeness,
    logits_of,
    reference,
    texts_of,
)
from engine.tuning.suite import MAX_TOKENS, Suite

_SHOWN = "nf4-double"  # what most people would merge into
_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Scoring:
    """A suite, and how it is asked."""

    suite: Suite
    max_tokens: int = MAX_TOKENS
    stop: tuple[str, ...] = ()


class Merging:
    """A version's folder, its base, and what to score on, if anything; the reference's answers are computed once."""

    def __init__(
        self,
        folder: Path,
        precision: str,
        base: Path,
        scoring: Scoring | None,
        report: Callable[[str, str, float], None],
    ) -> None:
        self.precision, self.base, self.scoring, self.report = precision, base, scoring, report
        self.folder = folder
        self.deltas = Deltas.read(folder)
        self.tokenizer = load_tokenizer(base)
        self.texts = texts_of(scoring.suite if scoring else None, self.tokenizer)
        self._trained: tuple[list[torch.Tensor], Judged | None] | None = None

    @property
    def trained(self) -> tuple[list[torch.Tensor], Judged | None]:
        """Logits and score of base and adapter as it was trained."""
        if self._trained is None:
            self.report("comparing", "base and adapter, as trained", 0.1)
            self._trained = self._held(reference(self.base, self.folder, self.precision))
        return self._trained

    def choose(self, onto: str, *, check: bool) -> tuple[str, dict[str, Any]]:
        """Which weights to merge onto, and what spoke for each; only a QLoRA version has a choice.

        With a target that was named and no `check`, no model is loaded. Raises MergeRefused when nothing can be dequantised.
        """
        if self.precision == FULL and onto == "dequantized":
            raise MergeRefused(
                "the version was not trained on a base in 4 bits, so there is nothing to dequantise",
                fix="Merge onto base. If it was, by another trainer, import it again: adapters import --precision nf4-double.",
            )
        if self.precision == FULL:
            return "base", {}
        if onto != "auto" and not check:
            return onto, {}
        names = ("dequantized", "base") if onto == "auto" else (onto,)
        choices = {}
        for name in names:
            self.report("comparing", f"merged onto {name}", 0.3)
            choices[name] = self._beside(in_memory(self.base, self.deltas, *self._changes(name)))
        best = max(choices, key=lambda name: (choices[name]["accuracy"] or 0.0, -choices[name]["kl"]))
        return best, choices

    def _changes(self, onto: str) -> tuple[merge.Change, merge.Change | None]:
        """How to change layers with an adapter, and those without."""
        if onto == "base" or self.precision == FULL:
            return merge.onto_base(self.deltas), None
        return (
            merge.onto_dequantized(self.deltas, self.precision),
            lambda _, weight: merge.four_bits(weight, self.precision),
        )

    def write(self, out: Path, onto: str, dtype: str, *, check: bool) -> dict[str, Any]:
        """Write the model; with `check` compare it with what was merged, in the precision that was written."""
        _, tensors = check_base(self.base)
        own = _NAMES[tensors[sorted(tensors)[0]].dtype]
        written = own if dtype == "auto" else dtype
        change, others = self._changes(onto)
        merge.write_merged(
            self.base, self.deltas, change, others, out, dtype, lambda shard: self.report("writing", shard, 0.6)
        )
        facts: dict[str, Any] = {"dtype": written}
        if check:
            self.report("comparing", "the merged model with base and adapter", 0.8)
            facts |= self._compare(out, onto, written)
        return facts

    def _compare(self, out: Path, onto: str, written: str) -> dict[str, Any]:
        if onto == "base" and self.precision != FULL:  # it is not what was trained: compare with what was merged
            wanted, score = self._held(reference(self.base, self.folder, FULL))
        else:
            wanted, score = self.trained
        model = load_base(out, torch.float32)
        alike = likeness(wanted, logits_of(model, self.texts))
        check_likeness(alike, written)
        merged = self._score(model)
        scores = {"accuracy": merged.accuracy, "accuracy_unmerged": score.accuracy} if merged and score else {}
        return {"likeness": asdict(alike), **scores}

    def demonstrate(self) -> dict[str, Any]:
        """What becomes of the adapter when it is merged into 4-bit weights, beside everything that it could be."""
        precision = self.precision if self.precision != FULL else _SHOWN
        models: dict[str, Callable[[], Any]] = {
            "base alone": lambda: load_base(self.base, torch.float32),
            "base and adapter, as trained": lambda: None,
            "merged onto the 16-bit base": lambda: in_memory(
                self.base, self.deltas, merge.onto_base(self.deltas), None
            ),
            f"merged into {precision}": lambda: in_memory(
                self.base,
                self.deltas,
                merge.into_four_bits(self.deltas, precision),
                lambda _, weight: merge.four_bits(weight, precision),
            ),
        }
        found = {}
        for name, make in models.items():
            self.report("measuring", name, 0.9)
            model = make()
            found[name] = self._beside(model) if model is not None else self._own()
        return {"models": found, "layers": asdict(erasure(self.base, self.deltas, precision))}

    def _own(self) -> dict[str, Any]:
        score = self.trained[1]
        return {"accuracy": score.accuracy if score else None, "kl": 0.0, "agreement": 1.0}

    def _held(self, model: Any) -> tuple[list[torch.Tensor], Judged | None]:
        """What other models are compared with."""
        return [*logits_of(model, self.texts)], self._score(model)

    def _score(self, model: Any) -> Judged | None:
        how = self.scoring
        return judge(model, how.suite, self.tokenizer, how.max_tokens, how.stop) if how else None

    def _beside(self, model: Any) -> dict[str, Any]:
        """A model beside the one as trained."""
        alike = likeness(self.trained[0], logits_of(model, self.texts))
        score = self._score(model)
        return {"accuracy": score.accuracy if score else None, "kl": alike.kl, "agreement": alike.agreement}

    def card(self, out: Path, ref: str, digest: str, fingerprint: str, facts: dict[str, Any]) -> None:
        """Write the model card."""
        alike = facts.get("likeness")
        checked = f"largest logit difference {alike['largest']:.3g}, KL {alike['kl']:.2g}" if alike else "not compared"
        scores = {"right on the suite": f"{facts['accuracy']:.1%}"} if "accuracy" in facts else {}
        merge.write_card(out, {
            "base": self.base.resolve().name, "base fingerprint": fingerprint, "adapter": ref,
            "adapter digest": digest or "-", "trained on": self.precision, "merged onto": facts["onto"],
            "precision": facts["dtype"], "compared with base and adapter": checked, **scores,
            **({"warning": "; ".join(facts["warnings"])} if facts.get("warnings") else {}),
        })  # fmt: skip
