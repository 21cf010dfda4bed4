"""What terminals get, and what pipes get."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from engine.commands import output


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Both consoles are a terminal; this is its screen."""
    screen = io.StringIO()
    for name in ("out", "err"):
        monkeypatch.setattr(output, name, Console(file=screen, force_terminal=True, width=60, markup=False))
    return screen


def test_an_answer_cannot_steer_the_terminal(terminal: io.StringIO) -> None:
    """Control characters are replaced on a terminal; what a pipe gets is unchanged."""
    assert output.harmless("a\x1b[2Jb\n\tö") == "a�[2Jb\n\tö"


def test_a_pipe_gets_every_character() -> None:
    """Programs get the text as it is."""
    assert output.harmless("a\x1b[2Jb") == "a\x1b[2Jb"


def test_bars_show_on_a_terminal_only(terminal: io.StringIO) -> None:
    """Long work says what it does, and its bar is gone afterwards."""
    with output.stages("publishing") as report:
        report("checking", "[names]", 0.5)
    with output.counting("requests", 2) as step:
        step()
    with output.spinner("hashing"):
        pass
    shown = terminal.getvalue()
    assert "publishing: checking [names]" in shown
    assert "1/2" in shown


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 1024**3, "3.0 GiB"), (2**41, "2.0 TiB")]
)
def test_sizes(count: int, text: str) -> None:
    """Bytes are told in the unit that fits."""
    assert output.size(count) == text


def test_durations() -> None:
    """Milliseconds below a second."""
    assert (output.seconds(0.0123), output.seconds(12.34)) == ("12 ms", "12.3 s")
