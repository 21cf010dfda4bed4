"""Token ids against the vocabulary: an id beyond it reads foreign memory in some kernels, so none gets through."""

from __future__ import annotations

from collections.abc import Iterable

from engine.errors import InvalidRequest
from engine.runtime.engine import Sampling


def check_token_ids(sampling: Sampling, vocabulary_size: int) -> None:
    """Raise InvalidRequest naming the field when a token id in `sampling` is not below `vocabulary_size`."""
    check_ids("sampling.stop_token_ids", sampling.stop_token_ids, vocabulary_size)
    check_ids("sampling.logit_bias", sampling.logit_bias, vocabulary_size)


def check_ids(field: str, ids: Iterable[int], vocabulary_size: int) -> None:
    """Raise InvalidRequest when one of `ids` is negative or not below `vocabulary_size`."""
    wrong = next((token for token in ids if not 0 <= token < vocabulary_size), None)
    if wrong is not None:
        raise InvalidRequest(field, f"token id {wrong} is not in the vocabulary (0 to {vocabulary_size - 1})")
