"""A suite's score of a model in memory, as `loraplex eval` has it of a server: greedy answers, judged by the suite."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from engine.errors import InvalidRows
from engine.tuning.base_model import pad_token
from engine.tuning.encoding import rendered
from engine.tuning.jsonl import BadRow
from engine.tuning.suite import MAX_TOKENS, Case, Suite, normal

_ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class Judged:
    """How many of `rows` answers are right: all of the row's metrics hold."""

    rows: int
    right: int

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return self.right / self.rows


def judge(model: Any, suite: Suite, tokenizer: Any, max_tokens: int = MAX_TOKENS, stop: Sequence[str] = ()) -> Judged:
    """Let a transformers model answer every row; raises InvalidRows when the chat template refuses one."""
    right = sum(case.right(_until(answer, stop)) for case, answer in _answers(model, suite, tokenizer, max_tokens))
    return Judged(len(suite.cases), right)


def prompts(suite: Suite, tokenizer: Any) -> list[list[int]]:
    """The token ids of what each row asks. Raises InvalidRows."""
    found, wrong = [], []
    for case in suite.cases:
        try:
            text = rendered(tokenizer, case.messages, generation=True) if case.messages else case.prompt
        except BadRow as error:
            wrong.append((case.number, str(error)))
            continue
        found.append(list(tokenizer(text, add_special_tokens=not case.messages)["input_ids"]))
    if wrong:
        raise InvalidRows(suite.name, wrong)
    return found


@torch.no_grad()
def _answers(model: Any, suite: Suite, tokenizer: Any, max_tokens: int) -> Iterator[tuple[Case, str]]:
    model.eval()
    pad = pad_token(tokenizer)
    # Of the base's own settings, penalties for example, the server heeds only which tokens end an answer.
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id, pad_token_id=pad)
    asked = list(zip(suite.cases, prompts(suite, tokenizer), strict=True))
    asked.sort(key=lambda one: (one[0].max_tokens or max_tokens, len(one[1])))
    for start in range(0, len(asked), _ROWS_AT_ONCE):
        rows = asked[start : start + _ROWS_AT_ONCE]
        longest = max(len(ids) for _, ids in rows)
        ids = torch.tensor([[pad] * (longest - len(ids)) + ids for _, ids in rows], device=model.device)
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for _, ids in rows], device=model.device)
        limit = max(case.max_tokens or max_tokens for case, _ in rows)
        done = _Wrong([case for case, _ in rows], tokenizer, longest)
        made = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=limit, do_sample=False, use_cache=True,
            stopping_criteria=StoppingCriteriaList([done]),
        )  # fmt: skip
        for (case, _), answer in zip(rows, made[:, longest:], strict=True):
            yield case, tokenizer.decode(answer[: case.max_tokens or max_tokens], skip_special_tokens=True)


class _Wrong(StoppingCriteria):
    """Ends an answer that has to be a certain text once it is another one, whatever would follow."""

    def __init__(self, cases: Sequence[Case], tokenizer: Any, start: int) -> None:
        self._wanted = [case.label if set(case.wanted) == {"exact"} else None for case in cases]
        self._tokenizer, self._start = tokenizer, start

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # noqa: ARG002
        """Of each row, whether it is decided."""
        texts = self._tokenizer.batch_decode(input_ids[:, self._start :], skip_special_tokens=True)
        ended = [self._decided(text, wanted) for text, wanted in zip(texts, self._wanted, strict=True)]
        return torch.tensor(ended, device=input_ids.device)

    @staticmethod
    def _decided(text: str, wanted: str | None) -> bool:
        half = text.endswith("\ufffd")  # of a character
        return wanted is not None and not half and not wanted.startswith(normal(text))


def _until(answer: str, stop: Sequence[str]) -> str:
    """The answer up to the first stop text."""
    places = [at for text in stop if (at := answer.find(text)) >= 0]
    return answer[: min(places)] if places else answer
