"""The HTML report in a real browser: no console error, nothing wider than the screen, a picture in four forms."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from loadtest.drive.case import run_case
from loadtest.plan.scenario import Case
from loadtest.report import document
from loadtest.report.plots import plots
from loadtest.report.write import page
from loadtest.selftest import trials
from loadtest.selftest.server import Script, ScriptedServer

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--hide-scrollbars", "--enable-logging=stderr",
)  # fmt: skip
# What the page measures of itself, written where --dump-dom shows it.
PROBE = """<script>addEventListener('load', () => {
  const plain = [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && !e.closest('svg'));
  const wide = plain.filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName);
  const empty = [...document.querySelectorAll('figure svg')].filter(e => e.getBoundingClientRect().height < 50).length;
  document.title = JSON.stringify({wide, empty, width: innerWidth, h1: document.querySelector('h1').innerText});
});</script>"""


async def report(scripted: ScriptedServer) -> tuple[str, str]:
    """The verdict and the page of a run with a wrong answer, several adapters and an action: every section has something."""
    scripted.reset(Script(fault="wrong_adapter"))
    async with trials.site(scripted) as found:
        found.slots = 2
        load = trials.workload(duration=0.3, actions=[{"do": "promote", "at": 0.1, "adapter": "ada"}])
        result = await run_case(found, Case(scenario="page", name="", workload=load))
        data = document.document([result], found, ["loraplex", "loadtest", "run", "page"])
    return data["verdict"], page(data, list(plots([result], found.slots)))


def browse(url: str, profile: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Open a page in a fresh profile."""
    assert CHROMIUM
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *flags, url]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no chromium here (apt-get install chromium)")
async def test_page(scripted: ScriptedServer, tmp_path: Path) -> None:
    """The verdict comes first, plots are there, nothing overflows a phone's screen, and the browser has no complaint."""
    verdict, text = await report(scripted)
    (tmp_path / "report.html").write_text(text.replace("</body>", f"{PROBE}</body>"))
    url = (tmp_path / "report.html").as_uri()
    for width, dark in ((1280, False), (400, True)):
        flags = [f"--window-size={width},900", f"--screenshot={tmp_path / f'{width}.png'}", "--dump-dom"]
        flags += ["--blink-settings=preferredColorScheme=0"] if dark else []
        seen = browse(url, tmp_path / "profile", *flags)
        assert "CONSOLE" not in seen.stderr, seen.stderr
        title = seen.stdout.partition("<title>")[2].partition("</title>")[0].replace("&quot;", '"')
        measured = json.loads(title)
        assert measured["h1"] == verdict
        assert (measured["wide"], measured["empty"]) == ([], 0)
        assert (tmp_path / f"{width}.png").stat().st_size > 10_000
