"""From rows to token ids with labels on what is to be learnt: the completion, or the assistant's turns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from engine.errors import InvalidRows
from engine.tuning.data import Row
from engine.tuning.jsonl import BadRow

IGNORED = -100  # the label that cross entropy leaves out
_SCORED_ROWS, _SCORED_LABELS = 32, 512  # at once: a label takes a number for each word of the vocabulary


@dataclass(frozen=True)
class Example:
    """Token ids and labels of the same length; `cut` when the row was too long and lost the end of its answer."""

    row: int
    ids: list[int]
    labels: list[int]
    cut: bool = False

    @property
    def learnt(self) -> int:
        """How many tokens have a label."""
        return sum(label != IGNORED for label in self.labels)


def encode_rows(rows: Iterable[Row], tokenizer: Any, max_length: int, file: str) -> list[Example]:
    """Encode all rows; raises InvalidRows when the limit leaves a row no answer, or the chat template refuses it."""
    examples: list[Example] = []
    wrong: list[tuple[int, str]] = []
    for row in rows:
        try:
            example = _shortened(encode(row, tokenizer), max_length)
        except BadRow as error:
            wrong.append((row.number, str(error)))
            continue
        if example.learnt:
            examples.append(example)
        else:
            wrong.append((row.number, f"its prompt alone has {max_length} tokens or more: the answer is cut off"))
    if wrong:
        raise InvalidRows(file, wrong, fix="Raise data.max_length, or shorten or remove these rows.")
    return examples


def scored_together(examples: Iterable[Example]) -> list[list[Example]]:
    """Held-out rows in groups whose scores are computed at once: of like length, and within bounds of memory."""
    groups: list[list[Example]] = []
    for example in sorted(examples, key=lambda one: len(one.ids)):
        group = groups[-1] if groups else []
        most = max(one.learnt for one in [*group, example])
        if group and len(group) < _SCORED_ROWS and (len(group) + 1) * most <= _SCORED_LABELS:
            group.append(example)
        else:
            groups.append([example])
    return groups


def encode(row: Row, tokenizer: Any) -> Example:
    """One row at full length; raises BadRow when the chat template cannot render it turn by turn."""
    spans = _chat(row, tokenizer) if row.messages else [(row.prompt, False), (row.completion, True)]
    ids: list[int] = []
    labels: list[int] = []
    for at, (text, learnt) in enumerate(spans):
        tokens = list(tokenizer(text, add_special_tokens=at == 0 and not row.messages)["input_ids"])
        if learnt and not row.messages:
            tokens.append(tokenizer.eos_token_id)
        ids += tokens
        labels += tokens if learnt else [IGNORED] * len(tokens)
    return Example(row.number, ids, labels)


def _chat(row: Row, tokenizer: Any) -> list[tuple[str, bool]]:
    """The rendered conversation in pieces: what comes before an answer, the answer with its end token, and so on.

    Chat templates may not be "prefix-preserving" (a later turn may change how an earlier one is rendered); then the pieces
    would not be what the model is shown when it serves, and the row is refused.
    """
    if not tokenizer.chat_template:
        raise BadRow("the base has no chat template: write prompt and completion as text")
    done = ""
    spans: list[tuple[str, bool]] = []
    for at, turn in enumerate(row.messages):
        if turn["role"] != "assistant" or at < row.first:
            continue
        asked = rendered(tokenizer, row.messages[:at], generation=True)
        told = rendered(tokenizer, row.messages[: at + 1], generation=False)
        if not asked.startswith(done) or not told.startswith(asked):
            raise BadRow("the base's chat template renders earlier turns differently later on: use one answer a row")
        end = told.rfind(tokenizer.eos_token)
        answer = told[len(asked) : end + len(tokenizer.eos_token)] if end >= len(asked) else told[len(asked) :]
        spans += [(asked[len(done) :], False), (answer, True)]
        done = asked + answer
    return spans


def rendered(tokenizer: Any, turns: tuple[dict[str, str], ...], *, generation: bool) -> str:
    """A conversation by the base's chat template, with `generation` up to where the answer begins; raises BadRow."""
    try:
        return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=generation))
    except Exception as error:  # a template raises whatever its author chose
        raise BadRow(f"the base's chat template refuses it: {error}") from error


def _shortened(example: Example, max_length: int) -> Example:
    if len(example.ids) <= max_length:
        return example
    return Example(example.row, example.ids[:max_length], example.labels[:max_length], cut=True)
