"""Rows of training data: read from anywhere, and every bad one named before anything is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date, time
from pathlib import Path
from typing import Any

from engine.errors import InvalidRecipe, InvalidRows
from engine.tuning.jsonl import BadRow, object_of, parsed

ROLES = ("system", "user", "assistant")
_TURN = {"role", "content"}
_UNHEEDED = ("tools", "functions")  # of a row: they would change how it is rendered; other keys are notes of its author
_DATASETS = "datasets:"


@dataclass(frozen=True)
class Row:
    """One example: plain text (`prompt`, `completion`), or `messages` whose assistant turns from `first` on are learnt."""

    number: int
    prompt: str = ""
    completion: str = ""
    messages: tuple[dict[str, str], ...] = ()
    first: int = 0

    @property
    def question(self) -> str:
        """What is asked, for telling duplicates and leaks."""
        return self.prompt or json.dumps(self.messages[: self._asked()], sort_keys=True)

    @property
    def answer(self) -> str:
        """What is to be learnt."""
        return self.completion or json.dumps(self.messages[self._asked() :], sort_keys=True)

    def _asked(self) -> int:
        learnt = (at for at, turn in enumerate(self.messages) if at >= self.first and turn["role"] == "assistant")
        return next(learnt, len(self.messages))


@dataclass(frozen=True)
class Rows:
    """All rows of a source, with the SHA-256 of its text."""

    source: str
    digest: str
    rows: tuple[Row, ...]


def read_rows(source: str) -> Rows:
    """Read a file, an fsspec URL or `datasets:NAME[:SPLIT]`; a dataset's configuration is `datasets:OWNER/NAME/CONFIG[:SPLIT]`.

    Raises InvalidRecipe when it cannot be opened, and InvalidRows naming each bad row with its reason.
    """
    text = _dataset_text(source) if source.startswith(_DATASETS) else _file_text(source)
    digest = _digest(text)
    fix = "Name a file with one JSON object a line."
    rows = parsed(text, source.rpartition("/")[2], parse_row, empty_fix=fix)
    return Rows(source, digest, tuple(rows))


def digest_of(source: str) -> str:
    """The digest that `Rows` of a file have: of its text, however it is compressed and its lines end.

    Raises InvalidRecipe when it cannot be read.
    """
    return _digest(_file_text(source))


def _digest(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _file_text(source: str) -> str:
    import fsspec

    try:
        with fsspec.open(source, "rt", encoding="utf-8-sig", compression="infer") as file:  # some editors write a BOM
            return str(file.read())
    except UnicodeDecodeError as error:
        raise InvalidRecipe("data", f"{source} is not UTF-8 text") from error
    except ImportError as error:
        fix = "Install the package, or copy the file here."
        raise InvalidRecipe("data", f"{source} needs a package that is not installed: {error}", fix=fix) from error
    except Exception as error:  # each file system and each compression has errors of its own
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InvalidRecipe("data", f"cannot read {source}: {reason}", fix="Correct the path or URL.") from error


def _dataset_text(source: str) -> str:
    from datasets import load_dataset

    name, _, split = source.removeprefix(_DATASETS).partition(":")
    config = None
    if name.count("/") == 2 and not Path(name).exists():  # a name on the Hub has one at most
        name, _, config = name.rpartition("/")
    try:
        rows = load_dataset(name, config, split=split or "train")
        return "\n".join(_json_line(row, number, source) for number, row in enumerate(rows, 1))
    except InvalidRows:
        raise
    except Exception as error:  # it raises whatever its loaders, Arrow and the Hub's client do
        why = " ".join(str(error).split())[:300] or type(error).__name__
        fix = f"Correct {_DATASETS}NAME[:SPLIT] or {_DATASETS}OWNER/NAME/CONFIG[:SPLIT], or save the rows as JSONL."
        raise InvalidRecipe("data", f"cannot read {source}: {why}", fix=fix) from error


def _json_line(row: Any, number: int, source: str) -> str:
    def plain(value: Any) -> str:
        if isinstance(value, date | time):
            return value.isoformat()
        raise TypeError(f"it holds {type(value).__name__}, which is no JSON")

    # A table has every column in every row, so what a row did not have is null in it.
    columns = {name: value for name, value in dict(row).items() if value is not None}
    try:
        return json.dumps(columns, ensure_ascii=False, sort_keys=True, default=plain)
    except TypeError as error:
        raise InvalidRows(source, [(number, str(error))], fix="Save the columns that are needed as JSONL.") from error


def parse_row(line: str, number: int) -> Row:
    """One line as a row; raises BadRow with the reason."""
    content = object_of(line)
    if unheeded := [key for key in _UNHEEDED if content.get(key)]:
        raise BadRow(f"its {unheeded[0]} would not be learnt from: write them into a message, or remove them")
    if "messages" in content:
        return Row(number, messages=tuple(_conversation(content["messages"])))
    if "prompt" not in content or "completion" not in content:
        raise BadRow(f"it has neither messages nor prompt and completion, but {_listed(content)}")
    prompt, completion = content["prompt"], content["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        turns = tuple(_conversation([*prompt, *completion]))
        return Row(number, messages=turns, first=len(prompt))
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise BadRow("prompt and completion must both be text, or both be lists of messages")
    if not prompt:
        raise BadRow("its prompt is empty")
    if not completion.strip():
        raise BadRow("its completion is empty: there is nothing to learn")
    return Row(number, _text(prompt), _text(completion))


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow("it holds half of a surrogate pair (\\ud800 to \\udfff), which is no text") from None
    return text


def _listed(content: dict[str, Any]) -> str:
    return ", ".join(repr(key) for key in sorted(content)[:5]) or "nothing"


def _conversation(turns: Any) -> Iterator[dict[str, str]]:
    if not isinstance(turns, list) or not turns:
        raise BadRow("messages must be a list of turns")
    before = ""
    for at, turn in enumerate(turns, 1):
        _check_turn(turn, at, before)
        before = turn["role"]
        yield {"role": turn["role"], "content": _text(turn["content"])}
    if before != "assistant":
        raise BadRow(f"its last message is by {before!r}: there is no answer to learn")


def _check_turn(turn: Any, at: int, before: str) -> None:
    if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
        raise BadRow(f"message {at} is no object with role and content")
    role = turn.get("role")
    if role not in ROLES:
        raise BadRow(f"message {at} has the role {role!r}; use {', '.join(ROLES)}")
    if unknown := sorted(key for key in set(turn) - _TURN if turn[key] is not None):
        raise BadRow(f"message {at} has {unknown[0]!r}, which would not be learnt from: use role and content only")
    if role == "system" and at > 1:
        raise BadRow(f"message {at} is a system message, which may only come first")
    if role == "assistant" and before in ("", "system"):
        raise BadRow(f"message {at} answers nothing: a user's message must come before it")
    if role == before:
        raise BadRow(f"messages {at - 1} and {at} are both by {role!r}")
    if role == "assistant" and not turn["content"].strip():
        raise BadRow(f"message {at}, an answer, is empty")


@dataclass(frozen=True)
class Split:
    """What is trained on and what is held out; no question is in both."""

    train: tuple[Row, ...]
    held_out: tuple[Row, ...]
    train_digest: str
    held_out_digest: str


def split_rows(train: str, held_out: str | float, seed: int) -> Split:
    """Read both sides, or hold out a share of the questions by their hash, so that the order of rows does not matter.

    Raises InvalidRows when a held-out question is also trained on.
    """
    rows = read_rows(train)
    if isinstance(held_out, str):
        other = read_rows(held_out)
        _check_apart(rows, other)
        return Split(rows.rows, other.rows, rows.digest, other.digest)
    questions = sorted({row.question for row in rows.rows}, key=lambda text: _hash(f"{seed} {text}"))
    count = max(1, round(held_out * len(questions)))
    if count >= len(questions):
        problem = f"{len(questions)} different questions are too few to hold out {held_out:g} of them"
        raise InvalidRows(train.rpartition("/")[2], [(1, problem)], fix="Add rows, or name a file of held-out rows.")
    kept = set(questions[:count])
    apart = [row for row in rows.rows if row.question in kept]
    return Split(tuple(row for row in rows.rows if row.question not in kept), tuple(apart), rows.digest, rows.digest)


def _check_apart(train: Rows, held_out: Rows) -> None:
    asked = {row.question: row.number for row in train.rows}
    leaks = [(row.number, f"its question is also row {asked[row.question]} of the training data")
             for row in held_out.rows if row.question in asked]  # fmt: skip
    if leaks:
        fix = "Take them out of one of the two: a score on what was trained on says nothing."
        raise InvalidRows(held_out.source.rpartition("/")[2], leaks, fix=fix)


def duplicates(rows: Iterable[Row]) -> int:
    """How many rows repeat another one, question and answer."""
    pairs = [(row.question, row.answer) for row in rows]
    return len(pairs) - len(set(pairs))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
