"""When the base changes: which versions still fit, and making new ones of those that do not, from their own recipes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import InvalidAdapter, InvalidRecipe, InvalidRows
from engine.registry.checks import FULL, Limits, check_adapter, precision_of
from engine.registry.fingerprint import Base
from engine.tuning.data import digest_of, read_rows
from engine.tuning.recipe import Recipe, anchored, parse_recipe
from engine.tuning.suite import MAX_TOKENS, Suite, read_suite

_ANY = Limits(max_rank=512, max_bytes=1 << 40)
_SIDES = ("train", "held_out")
_BY_HAND = "Train it again by hand."
_LARGEST = 1 << 30  # bytes of a file of rows that is not called so


@dataclass(frozen=True)
class Fit:
    """Whether a version fits a base; `can` says whether training it again would help."""

    ref: str
    fits: bool
    why: str
    can: bool


def fit_of(ref: str, folder: Path, fingerprint: str, run: dict[str, Any], base: Base) -> Fit:
    """Judge a version's files against a new base. `fingerprint` is that of the base it was trained on; empty if unknown."""
    if fingerprint == base.fingerprint:
        if (precision := precision_of(run)) != FULL:
            why = f"trained on these very weights and tokenizer, but in {precision[:20]}, another model: evaluate it here first"
            return Fit(ref, True, why, False)
        return Fit(ref, True, "trained on these very weights, tokenizer and precision", False)
    can, again = True, "loraplex readapt can train it again"
    try:
        check_record(run, ref)
    except InvalidRecipe as error:
        can, again = False, f"{error.message}: train it again by hand"
    try:
        check_adapter(folder, base, _ANY, base.fingerprint)
    except InvalidAdapter as error:
        return Fit(ref, False, f"it has other layers ({error.message}); {again}", can)
    if not fingerprint:
        return Fit(ref, False, f"its layers fit, but nothing records which weights it was trained on; {again}", can)
    return Fit(ref, False, f"its layers fit, but it was trained on other weights, tokenizer or precision; {again}", can)


def check_record(run: dict[str, Any], ref: str) -> None:
    """Raise InvalidRecipe where a version's record lacks what training it again takes, as those of other tools do."""
    _own_recipe(run, ref)
    if not isinstance((run.get("evaluation") or {}).get("adapter"), int | float):
        raise InvalidRecipe("", f"{ref} has no score on held-out rows to compare with", fix=_BY_HAND)


def _own_recipe(run: dict[str, Any], ref: str) -> Recipe:
    """A version's recipe as it was written, once it and the digests of its data are there."""
    content, digests = run.get("recipe"), run.get("data")
    if not content or not digests:
        raise InvalidRecipe("", f"{ref} has no stored recipe", fix=_BY_HAND)
    try:
        recipe = parse_recipe({**content, "base": ""})  # it gets another one
    except InvalidRecipe as error:
        raise InvalidRecipe("", f"the recipe of {ref} cannot be followed ({error.message})", fix=_BY_HAND) from error
    sides = [side for side in _SIDES if isinstance(getattr(recipe.data, side), str)]
    if not all(isinstance(digests.get(side), str if side in sides else str | None) for side in _SIDES):
        raise InvalidRecipe("", f"{ref} does not record the digests of its data", fix=_BY_HAND)
    return recipe


def own_data(run: dict[str, Any]) -> dict[str, str]:
    """The sources that a version's recipe names itself, as far as they can be read here, by the digest that they have now."""
    named = (run.get("recipe") or {}).get("data") or {}
    found = {}
    for source in (named.get("train"), named.get("held_out")):
        if isinstance(source, str):
            place = anchored(source, Path())
            with suppress(InvalidRecipe, InvalidRows):
                found[read_rows(place).digest] = place
    return found


def find_data(folders: Sequence[Path], digests: Sequence[str]) -> dict[str, Path]:
    """Find files by the SHA-256 of their text or bytes, wherever they lie below `folders` and whatever they are called.

    What is called .jsonl is tried first, then all that is not hidden nor larger than 1 GiB.
    """
    wanted = set(digests) - {""}
    found: dict[str, Path] = {}
    for path in _candidates(folders):
        if wanted <= found.keys():
            break
        for digest in wanted.intersection(_digests(path)):
            found.setdefault(digest, path.resolve())
    return found


def _candidates(folders: Sequence[Path]) -> list[Path]:
    likely, others = [], []
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            with suppress(OSError):  # what may not be looked at
                if not path.is_file():
                    continue
                hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
                if ".jsonl" in path.name:
                    likely.append(path)
                elif not hidden and path.stat().st_size <= _LARGEST:
                    others.append(path)
    return likely + others


def _digests(path: Path) -> Iterator[str]:
    """A suite is known by its bytes, training data by its text."""
    with suppress(OSError), path.open("rb") as file:
        yield f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    with suppress(InvalidRecipe):
        yield digest_of(str(path))


def recipe_for(run: dict[str, Any], base: Path, data: Mapping[str, str | Path], ref: str) -> Recipe:
    """A version's own recipe, with another base, and its data where it lies now.

    Raises InvalidRecipe when the version has no recipe, or its data has changed or is not there.
    """
    own = _own_recipe(run, ref)
    content, digests = dict(run["recipe"]), run["data"]
    places = {}
    for side in _SIDES:
        if not isinstance(getattr(own.data, side), str):
            continue
        if digests[side] not in data:
            problem = (
                f"the data of {ref} ({side}, {digests[side][:19]}) is not in the folders that were named, nor at "
                f"{content['data'][side]}"
            )
            raise InvalidRecipe(
                f"data.{side}", problem, fix="Name the folder that holds the unchanged file: --data FOLDER."
            )
        places[side] = str(data[digests[side]])
    content["base"] = str(base.resolve())
    content["data"] = {**content["data"], **places}
    return parse_recipe(content)


@dataclass(frozen=True)
class Verdict:
    """Old against new on one set of rows."""

    suite: str
    old: float
    new: float
    rows: int

    @property
    def good(self) -> bool:
        """Whether the new version is at least as good; records keep four digits."""
        return round(self.new, 4) >= round(self.old, 4)


def refusal(verdicts: Sequence[Verdict]) -> str:
    """Why a new version is not to be published; empty when it is as good as one that was right at times.

    Where the old one was never right, as with free text that has to be exact, any new one would be as good.
    """
    if not all(verdict.good for verdict in verdicts):
        return "not as good"
    if not any(verdict.old > 0 for verdict in verdicts):
        return "nothing to compare with: no answer of the old one was right"
    return ""


def on_held_out(old: dict[str, Any], new: dict[str, Any]) -> Verdict:
    """Compare two runs' scores on the held-out rows that both have."""
    before, after = old["evaluation"], new["evaluation"]
    return Verdict("held-out rows", float(before["adapter"]), float(after["adapter"]), int(after["rows"]))


@dataclass(frozen=True)
class StoredSuite:
    """A suite that a version was evaluated on, with the share of its rows that was right, and how it was asked."""

    suite: Suite
    old: float
    max_tokens: int
    stop: tuple[str, ...]


def stored_suites(
    ref: str, records: Sequence[dict[str, Any]], data: dict[str, Path]
) -> tuple[list[StoredSuite], list[str]]:
    """The suites that a version was evaluated on, read and checked; and which cannot be compared, with the reason.

    Raises InvalidRecipe when one is not there, and InvalidRows when one cannot be read.
    """
    found, left_out = [], []
    for digest, record in {record["suite_digest"]: record for record in records}.items():
        name, scores = record["suite"], record["results"].get(ref, {})
        if "accuracy" not in scores:
            left_out.append(f"{name}: its record has no score of {ref}")
            continue
        if digest not in data:
            problem = (
                f"the suite {name} ({digest[:19]}), on which {ref} was evaluated, is not in the folders that were named"
            )
            fix = "Name the folder that holds the unchanged file, --data FOLDER, or go without: --held-out-only."
            raise InvalidRecipe("data", problem, fix=fix)
        how = record.get("max_tokens", MAX_TOKENS), tuple(record.get("stop", ()))
        found.append(StoredSuite(read_suite(data[digest]), float(scores["accuracy"]["value"]), *how))
    return found, left_out


def on_suites(base: Path, adapter: Path, suites: Sequence[StoredSuite]) -> list[Verdict]:
    """Score the new adapter on each suite, asked as the old one was."""
    import torch
    from peft import PeftModel

    from engine.tuning.base_model import load_base, load_tokenizer
    from engine.tuning.judging import judge

    if not suites:
        return []
    model, tokenizer = PeftModel.from_pretrained(load_base(base, torch.float32), str(adapter)), load_tokenizer(base)
    scores = [(one, judge(model, one.suite, tokenizer, one.max_tokens, one.stop)) for one in suites]
    return [Verdict(one.suite.name, one.old, score.accuracy, score.rows) for one, score in scores]
