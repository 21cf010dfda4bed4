"""Rows: each bad one is named with its reason, before anything is loaded; nothing held out is trained on."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from engine.errors import InvalidRecipe, InvalidRows
from engine.tuning.data import Row, duplicates, read_rows, split_rows
from engine.tuning.encoding import IGNORED, encode, encode_rows
from tests.unit.tuning.tiny import questions, write_rows

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "no JSON object"),
        ({"text": "x"}, "neither messages nor prompt and completion, but 'text'"),
        ({"prompt": "x", "completion": "  "}, "completion is empty"),
        ({"prompt": "", "completion": "x"}, "prompt is empty"),
        ({"prompt": 3, "completion": "x"}, "must both be text"),
        ({"messages": []}, "list of turns"),
        ({"messages": [*CHAT, {"role": "bot", "content": "x"}]}, "role 'bot'"),
        ({"messages": CHAT[:1]}, "no answer to learn"),
        ({"messages": CHAT[1:]}, "answers nothing"),
        ({"messages": [*CHAT, CHAT[1]]}, "both by 'assistant'"),
        ({"messages": [*CHAT, {"role": "system", "content": "x"}, *CHAT]}, "may only come first"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": " "}]}, "is empty"),
        ({"messages": [{"role": "user"}]}, "no object with role and content"),
        ("[" * 100_000, "not JSON"),
        (r'{"prompt": "x", "completion": "\ud83d"}', "half of a surrogate pair"),
        (r'{"messages": [{"role": "user", "content": "\ude00"}]}', "half of a surrogate pair"),
        ({"messages": CHAT, "tools": [{"name": "f"}]}, "its tools would not be learnt from"),
        ({"messages": [CHAT[0], {**CHAT[1], "tool_calls": [{}]}]}, "message 2 has 'tool_calls'"),
        ({"messages": [CHAT[0], {**CHAT[1], "weight": 0}]}, "message 2 has 'weight'"),
    ],
)
def test_a_bad_row_is_named_with_its_reason(tmp_path: Path, row: Any, said: str) -> None:
    """The row's number in the file, blank lines counted, and what is wrong with it."""
    good = json.dumps({"prompt": "a", "completion": "b"})
    bad = row if isinstance(row, str) else json.dumps(row)
    (tmp_path / "rows.jsonl").write_text(f"{good}\n\n{bad}\n{good}\n")
    with pytest.raises(InvalidRows) as caught:
        read_rows(str(tmp_path / "rows.jsonl"))
    ((number, reason),) = caught.value.rows
    assert number == 3
    assert said in reason


def test_keys_without_a_value_and_notes_of_the_author_are_no_matter(tmp_path: Path) -> None:
    """Exports of whole tables have empty columns, and names of sources."""
    turns = [{**turn, "tool_calls": None, "weight": None} for turn in CHAT]
    row = {"messages": turns, "tools": [], "source": "tickets", "note": "\ud83d"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert read_rows(str(tmp_path / "rows.jsonl")).rows[0].messages == tuple(CHAT)


def test_a_mark_of_the_byte_order_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    """As some editors and spreadsheets write it."""
    text = json.dumps({"prompt": "a", "completion": "b"})
    (tmp_path / "plain.jsonl").write_text(text)
    (tmp_path / "marked.jsonl").write_text(text, encoding="utf-8-sig")
    plain, marked = (read_rows(str(tmp_path / f"{name}.jsonl")) for name in ("plain", "marked"))
    assert (plain.rows, plain.digest) == (marked.rows, marked.digest)


def test_all_bad_rows_are_told_at_once(tmp_path: Path) -> None:
    """Nobody should have to correct a file one error at a time."""
    (tmp_path / "rows.jsonl").write_text("{\n" * 30)
    with pytest.raises(InvalidRows, match="30 rows are wrong") as caught:
        read_rows(str(tmp_path / "rows.jsonl"))
    assert len(caught.value.rows) == 30
    assert "and 20 more" in caught.value.message


def test_an_empty_file_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    """With different words."""
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InvalidRows, match="holds no rows"):
        read_rows(str(tmp_path / "empty.jsonl"))
    with pytest.raises(InvalidRecipe, match="cannot read"):
        read_rows(str(tmp_path / "absent.jsonl"))


def test_rows_come_from_urls_and_compressed_files(tmp_path: Path) -> None:
    """Whatever fsspec opens."""
    import gzip

    import fsspec

    line = json.dumps({"prompt": "a", "completion": "b"})
    with fsspec.open("memory://rows.jsonl", "wt") as file:
        file.write(line)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(line.encode()))
    assert read_rows("memory://rows.jsonl").rows == read_rows(str(tmp_path / "rows.jsonl.gz")).rows


def test_a_package_that_a_url_needs_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By fsspec, whose errors have no name of a module: no other package is advised."""

    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr("fsspec.open", missing)
    with pytest.raises(InvalidRecipe, match="Please install gcsfs") as caught:
        read_rows("gs://bucket/rows.jsonl")
    assert "s3fs" not in caught.value.fix


def test_a_held_out_question_that_is_trained_on_is_refused(tmp_path: Path) -> None:
    """A score on what was trained on says nothing, whatever the answer there is."""
    train = write_rows(tmp_path / "train.jsonl", questions(0, 9))
    held_out = write_rows(tmp_path / "heldout.jsonl", [("new", " yes"), ("q3:", " no")])
    with pytest.raises(InvalidRows, match="row 4 of the training data"):
        split_rows(str(train), str(held_out), 1)


def test_a_share_is_held_out_by_question(tmp_path: Path) -> None:
    """No question on both sides, the same split whatever the rows' order, and another one for another seed."""
    pairs = [(f"q{n % 50}", f" a{n}") for n in range(100)]
    forwards = split_rows(str(write_rows(tmp_path / "a.jsonl", pairs)), 0.2, 1)
    backwards = split_rows(str(write_rows(tmp_path / "b.jsonl", pairs[::-1])), 0.2, 1)
    asked = {row.question for row in forwards.held_out}
    assert len(asked) == 10
    assert asked == {row.question for row in backwards.held_out}
    assert not asked & {row.question for row in forwards.train}
    assert asked != {row.question for row in split_rows(str(tmp_path / "a.jsonl"), 0.2, 2).held_out}


def test_too_few_rows_to_hold_any_out_are_refused(tmp_path: Path) -> None:
    """One question cannot be on both sides."""
    with pytest.raises(InvalidRows, match="too few"):
        split_rows(str(write_rows(tmp_path / "a.jsonl", [("q", " a")])), 0.5, 1)


def test_duplicates_are_counted_by_question_and_answer() -> None:
    """The same question with another answer is no duplicate."""
    rows = [Row(1, "q", "a"), Row(2, "q", "a"), Row(3, "q", "b")]
    assert duplicates(rows) == 1


def learnt(row: Row, tokenizer: Any) -> str:
    """The text that has labels."""
    return str(tokenizer.decode([label for label in encode(row, tokenizer).labels if label != IGNORED]))


def test_only_the_completion_and_the_end_token_are_learnt(tokenizer: Any) -> None:
    """The prompt has no labels."""
    assert learnt(Row(1, "question", " answer"), tokenizer) == " answer</s>"


def test_every_answer_of_a_conversation_is_learnt_and_nothing_else(tokenizer: Any) -> None:
    """Neither what users say, nor the template's own text; and the whole is what the model is shown when it serves."""
    turns = (*CHAT, {"role": "user", "content": "again"}, {"role": "assistant", "content": "yes"})
    row = Row(1, messages=turns)
    assert learnt(row, tokenizer) == "ho</s>yes</s>"
    rendered = tokenizer.apply_chat_template(list(turns), tokenize=False)
    assert tokenizer.decode(encode(row, tokenizer).ids) == rendered


def test_answers_in_a_prompt_of_messages_are_not_learnt(tokenizer: Any) -> None:
    """With prompt and completion as lists of messages, only the completion is."""
    row = Row(1, messages=(*CHAT, CHAT[0], {"role": "assistant", "content": "last"}), first=3)
    assert learnt(row, tokenizer) == "last</s>"


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: Any) -> None:
    """The pieces would not be what the model is shown when it serves."""
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    with pytest.raises(InvalidRows, match="renders earlier turns differently"):
        encode_rows([Row(7, messages=tuple(CHAT))], other, 100, "rows")


def test_a_row_without_room_for_its_answer_is_refused_and_a_cut_one_is_known(tokenizer: Any) -> None:
    """The limit counts prompt and answer."""
    whole, cut = Row(1, "123", "45"), Row(2, "123", "456789")
    first, second = encode_rows([whole, cut], tokenizer, 6, "rows")
    assert (first.cut, second.cut) == (False, True)
    with pytest.raises(InvalidRows, match="the answer is cut off") as caught:
        encode_rows([whole, Row(5, "1234567", "8")], tokenizer, 6, "rows")
    assert [number for number, _ in caught.value.rows] == [5]


def test_a_compressed_file_that_was_cut_is_refused(tmp_path: Path) -> None:
    """As any file that cannot be read."""
    import gzip

    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"prompt": "a", "completion": "b"}' * 50)[:-12])
    with pytest.raises(InvalidRecipe, match="cannot read"):
        read_rows(str(file))


def hub(monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]) -> None:
    """The package `datasets`, with this for its load_dataset."""
    stub = ModuleType("datasets")
    stub.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", stub)


@pytest.mark.parametrize(
    ("source", "called"),
    [
        ("datasets:squad", ("squad", None, "train")),
        ("datasets:me/rows:test", ("me/rows", None, "test")),
        ("datasets:me/rows/english:test", ("me/rows", "english", "test")),
        ("datasets:me/rows/english", ("me/rows", "english", "train")),
        ("datasets:me/rows:train[:10%]", ("me/rows", None, "train[:10%]")),
    ],
)
def test_a_dataset_of_the_hub_is_named_with_configuration_and_split(
    monkeypatch: pytest.MonkeyPatch, source: str, called: tuple[str, str | None, str]
) -> None:
    """A name has one slash at most, so what follows a second one is the configuration."""
    calls = []

    def load(name: str, config: str | None = None, *, split: str) -> list[dict[str, Any]]:
        calls.append((name, config, split))
        return [{"prompt": "a", "completion": "b", "when": datetime(2026, 1, 2, tzinfo=UTC)}]

    hub(monkeypatch, load)
    assert [(row.prompt, row.completion) for row in read_rows(source).rows] == [("a", "b")]
    assert calls == [called]


def test_rows_of_both_kinds_in_one_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the real package, whose tables have null wherever a row has no such column."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [
        {"prompt": "a", "completion": "b"},
        {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]},
    ]
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompted, chat = read_rows(f"datasets:{tmp_path}/rows").rows
    assert (prompted.prompt, prompted.completion) == ("a", "b")
    assert [turn["content"] for turn in chat.messages] == ["c", "d"]
    (first,) = read_rows(f"datasets:{tmp_path}/rows:train[:1]").rows
    assert first == prompted
    with pytest.raises(InvalidRecipe, match='Unknown split "test"'):
        read_rows(f"datasets:{tmp_path}/rows:test")


def test_a_folder_of_rows_is_no_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its path has two slashes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some/own/rows").mkdir(parents=True)
    hub(monkeypatch, lambda name, config, split: [{"prompt": name, "completion": str(config)}])
    (row,) = read_rows("datasets:some/own/rows").rows
    assert (row.prompt, row.completion) == ("some/own/rows", "None")


def test_a_dataset_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what the package says of it, whatever it raises, and how to name a dataset."""

    def load(*_: Any, **__: Any) -> None:
        raise ValueError("Config name is missing.\nPlease pick one among: ['en', 'de']")

    hub(monkeypatch, load)
    with pytest.raises(InvalidRecipe, match=r"cannot read datasets:me/rows: Config name.*'en', 'de'") as caught:
        read_rows("datasets:me/rows")
    assert "datasets:OWNER/NAME/CONFIG[:SPLIT]" in caught.value.fix


def test_a_column_that_json_cannot_hold_is_named_by_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images, for example."""
    rows = [{"prompt": "a", "completion": "b", "image": image} for image in (None, b"png")]
    hub(monkeypatch, lambda *_, **__: rows)
    with pytest.raises(InvalidRows, match="row 2: it holds bytes, which is no JSON"):
        read_rows("datasets:me/rows")
