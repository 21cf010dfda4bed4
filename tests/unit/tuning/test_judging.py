"""A suite is judged in memory as through a server: by what the model writes, row by row, whatever the batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM

from engine.errors import InvalidRows
from engine.tuning.judging import judge, prompts
from engine.tuning.suite import Suite, read_suite

pytestmark = pytest.mark.slow


def suite_of(path: Path, *rows: dict[str, object]) -> Suite:
    """A suite of these rows."""
    path.write_text("\n".join(map(json.dumps, rows)))
    return read_suite(path)


@pytest.fixture(scope="module")
def model(base: Path) -> LlamaForCausalLM:
    """The tiny base."""
    return LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)


def test_answers_are_those_of_each_row_alone(tmp_path: Path, base: Path, model: LlamaForCausalLM) -> None:
    """Rows of all lengths and limits in one batch: right is what the model writes to that row, and nothing else."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    asked = {"a": 3, "a much longer question": 8, "mid": 5}
    alone = {}
    for prompt, limit in asked.items():
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False)
        alone[prompt] = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    rows = [{"prompt": p, "completion": alone[p], "max_tokens": asked[p]} for p in asked if alone[p].strip()]
    assert rows
    mixed = [*rows, {"prompt": "z", "contains": ["no model writes this"]}]
    found = judge(model, suite_of(tmp_path / "suite.jsonl", *mixed), tokenizer, 4)
    assert (found.rows, found.right) == (len(rows) + 1, len(rows))


def test_penalties_of_the_base_are_not_heeded(
    tmp_path: Path, base: Path, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its generation_config.json is advice for those who sample; the server does not follow it either."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = torch.tensor([tokenizer("a")["input_ids"]])
    for _ in range(12):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    answer = tokenizer.decode(ids[0, 1:], skip_special_tokens=True)
    suite = suite_of(tmp_path / "suite.jsonl", {"prompt": "a", "completion": answer})
    settings = GenerationConfig(repetition_penalty=50.0, suppress_tokens=ids[0, 1:].tolist())
    monkeypatch.setattr(model, "generation_config", settings)
    assert judge(model, suite, tokenizer, 12).right == 1


def test_an_answer_ends_at_a_stop_text(tmp_path: Path, base: Path, model: LlamaForCausalLM) -> None:
    """As the server's does."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = torch.tensor([tokenizer("q")["input_ids"]])
    made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    answer = tokenizer.decode(made[0, 1:], skip_special_tokens=True)
    suite = suite_of(tmp_path / "suite.jsonl", {"prompt": "q", "regex": "^$"})
    assert judge(model, suite, tokenizer, 6).right == 0
    assert judge(model, suite, tokenizer, 6, stop=[answer[0]]).right == 1


def test_a_row_that_the_template_refuses_is_named(tmp_path: Path, base: Path) -> None:
    """By its number, before any answer is written."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    rows = {"prompt": "q", "regex": "x"}, {"messages": [{"role": "judge", "content": "q"}], "regex": "x"}
    with pytest.raises(InvalidRows, match="row 2"):
        prompts(suite_of(tmp_path / "suite.jsonl", *rows), tokenizer)
