"""--help teaches, starts fast, and the command line says what is wrong with it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from tests.unit.cli.calls import COMMAND, call

COMMANDS = [
    ("serve",),
    ("generate",),
    ("top",),
    ("doctor",),
    ("health",),
    ("train",),
    ("eval",),
    ("compare",),
    ("merge",),
    ("readapt",),
    ("simulate",),
    ("base", "check"),
    ("base", "fingerprint"),
    *(
        ("adapters", name)
        for name in (
            "list", "show", "verify", "diff", "publish", "promote", "rollback", "canary", "shadow", "unalias", "delete",
            "preload", "pin", "unpin", "unload", "watch", "import", "export",
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("words", [(), ("adapters",), ("base",), *COMMANDS], ids=" ".join)
def test_help_of_every_command_gives_examples(words: tuple[str, ...]) -> None:
    """Every --help shows how the command is called."""
    shown = call(*words, "--help")
    assert shown.code == 0
    assert shown.out.count(" ".join(("loraplex", *words))) >= 2  # the usage line, and an example


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_has_no_line_that_a_terminal_would_break(words: tuple[str, ...]) -> None:
    """Help is wrapped in the source, as Typer keeps its line ends."""
    command: Any = COMMAND
    for word in words:
        command = command.commands[word]
    first, _, rest = (command.help or "").partition("\n\n")
    assert len(first) < 160
    assert [line for line in rest.splitlines() if len(line) > 96] == []


def test_version() -> None:
    """--version prints the program's name and version."""
    shown = call("--version")
    assert (shown.code, shown.out.split()[0]) == (0, "loraplex")


def test_help_imports_nothing_heavy() -> None:
    """Startup stays quick."""
    program = (
        "import sys; sys.argv = ['loraplex', '--help']\n"
        "from engine.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'grpc', 'vllm', 'torch', 'obstore', 'uvloop', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_a_client_only_install_is_told_what_to_install() -> None:
    """Without Typer there is one clear line, and no traceback."""
    program = "import sys; sys.modules['typer'] = None\nfrom engine.cli import main\nmain()"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: the command line needs typer")
    assert "pip install" in ran.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("generate",),
        ("generate", "hi", "--file", "-"),
        ("generate", "hi", "--max-tokens", "0"),
        ("generate", "hi", "--regex", "a", "--choice", "b"),
        ("adapters", "publish", "/nowhere", "support"),
        ("adapters", "delete", "support@canary", "--yes"),
        ("adapters", "unalias", "support@v1"),
        ("adapters", "frobnicate"),
        ("serve", "--dtype", "int3"),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_exits_2(words: tuple[str, ...]) -> None:
    """Usage errors exit 2 and print nothing on stdout."""
    refused = call(*words)
    assert refused.code == 2
    assert refused.out == ""
    assert refused.err


def test_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends a command as shells expect."""
    from engine.commands import checkup

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkup, "look", interrupted)
    assert call("doctor", "--no-generate").code == 130
