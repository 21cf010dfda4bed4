"""Prompts of random words. No two begin alike, so that no prefix cache helps."""

from __future__ import annotations

import random

_WORDS = (
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
    "problem",
)


def random_prompt(rng: random.Random, words: int) -> str:
    """A prompt of so many words, about as many tokens."""
    return " ".join(rng.choices(_WORDS, k=words))


def prompt_of_row(seed: int, row: int, words: int) -> str:
    """The prompt of a row of the tape: the tape has its length, and this makes the same text of it every time."""
    return random_prompt(random.Random(seed * 1_000_003 + row), words)
