"""The process that trains: `python -P -m engine.tuning.worker RUN_FOLDER`. Its parent reads events, one JSON object a line.

A process of its own, because what trains may be killed for lack of memory, and because the command line, like the server,
should not have to import torch.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from engine.errors import LoraplexError
from engine.tuning.run_folder import RunFolder

Tell = Callable[[dict[str, Any]], None]


def main() -> int:
    """Train, and tell the parent how it goes; exit code 1 after an error that was told."""
    folder = RunFolder(Path(sys.argv[1]))
    events = _events_on_stdout()
    _end_with_parent()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one GPU: rows end to end cannot be shared out among several

    def tell(event: dict[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    try:
        tell({"event": "done", **train(folder, tell)})
        return 0
    except LoraplexError as error:
        tell({"event": "error", "message": error.message, "fix": error.fix})
    except MemoryError:
        tell({"event": "error", "message": "there is not enough memory", "fix": _LESS_MEMORY})
    except Exception as error:  # noqa: BLE001 - whatever a library raises ends the run; the log has the traceback
        traceback.print_exc()
        tell(_unforeseen(error))
    return 1


_LESS_MEMORY = "Use a smaller train.batch_size with more accumulation, a smaller data.max_length, or method: qlora."


def _unforeseen(error: Exception) -> dict[str, Any]:
    text = f"{type(error).__name__}: {str(error)[:300]}"
    if "out of memory" in text.lower() or "allocate memory" in text.lower():
        return {"event": "error", "message": "there is not enough memory", "fix": _LESS_MEMORY}
    if "No space left" in text:
        return {"event": "error", "message": "the disk is full", "fix": "Free some space, then go on with --resume."}
    return {"event": "error", "message": text, "fix": "train.log in the run folder has the details."}


def train(folder: RunFolder, tell: Tell) -> dict[str, Any]:
    """Train the folder's recipe from its last checkpoint, or from the start; returns what `run.json` and the parent need.

    Raises TrainingFailed when another process does.
    """
    with folder.locked():
        from engine.tuning.session import Session

        started = time.monotonic()
        session = Session(folder, tell)
        session.prepare()
        session.learn()
        result = session.finish()
    return result | {"seconds": round(time.monotonic() - started, 1), "finished_at": datetime.now(UTC).isoformat()}


def _events_on_stdout() -> IO[str]:
    """Our own handle on stdout; whatever libraries print goes to stderr, which is the run's log."""
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logging.basicConfig(stream=sys.stderr)
    return events


def _end_with_parent() -> None:
    """Our stdin is a pipe that the parent never writes to: it closes when the parent is gone, however it went."""

    def wait() -> None:
        sys.stdin.buffer.read()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
