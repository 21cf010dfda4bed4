"""What vLLM gets to call: our wrapper around the kernels, beside vLLM's own; and when our plugin steps aside."""

from __future__ import annotations

import logging
import math
import os
from typing import Any

import pytest

torch = pytest.importorskip("torch")
vllm = pytest.importorskip("vllm")
platforms = pytest.importorskip("vllm.platforms")
if not platforms.current_platform.is_cpu():
    pytest.skip("our kernels are for CPUs", allow_module_level=True)
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # as the engine does on a CPU: nothing is compiled while vLLM is imported

from vllm.lora.layers import LoRAMapping  # noqa: E402
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU  # noqa: E402

from engine import vllm_plugin  # noqa: E402
from engine.vllm_plugin.wrapper import PunicaWrapperLoraplex  # noqa: E402

pytestmark = pytest.mark.model

SIZE, OUT, RANK, SLOTS = 64, 96, 8, 3
IDS = [7, 8, 9]  # of the adapters in the three slots: all are taken
BATCH = (8, 0, 9, 7, 0, 8)  # whose each row is; 0 is the base's


def wrapper(kind: type[Any], requests: tuple[int, ...] = BATCH, tokens: tuple[int, ...] = BATCH) -> Any:
    """A wrapper that knows the batch."""
    made = kind(64, 16, torch.device("cpu"), lora_config=None)
    made.update_metadata(LoRAMapping(tokens, requests, is_prefill=True), IDS, SLOTS + 1, 100)
    return made


def weights(dtype: Any = torch.float32, out: int = OUT) -> tuple[Any, Any]:
    """Stacked A and B."""
    torch.manual_seed(0)
    a = torch.randn(SLOTS, 1, RANK, SIZE) / math.sqrt(SIZE)
    return a.to(dtype), (torch.randn(SLOTS, 1, out, RANK) / math.sqrt(RANK)).to(dtype)


def updated(x: Any, y: Any, a: Any, b: Any, batch: tuple[int, ...]) -> Any:
    """The right answer, row by row."""
    y = y.clone()
    for row, adapter in enumerate(batch):
        if adapter:
            slot = IDS.index(adapter)
            y[row] += b[slot, 0] @ (a[slot, 0] @ x[row])
    return y


def test_base_rows_beside_full_slots() -> None:
    """Ours leaves rows without an adapter as they are; vLLM's gives them the last slot's. The others agree."""
    (a, b), x, y = weights(), torch.randn(6, SIZE), torch.randn(6, OUT)
    answers = {}
    for kind in (PunicaWrapperLoraplex, PunicaWrapperCPU):
        answers[kind] = y.clone()
        wrapper(kind).add_lora_linear(answers[kind], x, (a,), (b,), 1.0, (OUT,))
    ours, stock = answers.values()
    assert torch.allclose(ours, updated(x, y, a, b, BATCH), atol=1e-5)
    base = [row for row, adapter in enumerate(BATCH) if not adapter]
    assert torch.equal(ours[base], y[base])
    assert not torch.allclose(stock[base], y[base])  # if this fails, vLLM has mended it: see docs/kernels.md
    assert torch.allclose(stock[base], updated(x, y, a, b, (9,) * 6)[base], atol=1e-5)


@pytest.mark.parametrize("without", ["library", "equal types", "scale of one"])
def test_computed_by_torch(without: str) -> None:
    """Without the compiled kernels, or where they cannot help, the result is the same."""
    dtype = torch.bfloat16 if without == "equal types" else torch.float32
    (a, b), x, y = weights(dtype), torch.randn(6, SIZE), torch.randn(6, OUT)
    scale = 0.5 if without == "scale of one" else 1.0
    made = wrapper(PunicaWrapperLoraplex)
    if without == "library":
        made._library = None
    got = y.clone()
    made.add_lora_linear(got, x, (a,), (b,), scale, (OUT,))
    expected = y + scale * (updated(x, y, a.float(), b.float(), BATCH) - y)
    assert torch.allclose(got, expected, atol=0.05 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("batch", [(0,) * 6, (7,) * 6, (9, 9, 0, 9, 9, 9), ()])
def test_batches_of_one_kind(batch: tuple[int, ...]) -> None:
    """Base rows only, one adapter only, all but one, and no row at all."""
    (a, b), x, y = weights(), torch.randn(len(batch), SIZE), torch.randn(len(batch), OUT)
    got = y.clone()
    wrapper(PunicaWrapperLoraplex, batch, batch).add_lora_linear(got, x, (a,), (b,), 1.0, (OUT,))
    assert torch.allclose(got, updated(x, y, a, b, batch), atol=1e-5)


def test_one_adapter_in_every_slot() -> None:
    """Slots with the same weights give the same answers to the last bit."""
    (a, b), x, y = weights(), torch.randn(1, SIZE).expand(3, SIZE).contiguous(), torch.zeros(3, OUT)
    a[:], b[:] = a[:1].clone(), b[:1].clone()
    wrapper(PunicaWrapperLoraplex, (7, 8, 9), (7, 8, 9)).add_lora_linear(y, x, (a,), (b,), 1.0, (OUT,))
    assert torch.equal(y[0], y[1])
    assert torch.equal(y[1], y[2])


def test_two_slices() -> None:
    """The slices of a fused layer lie side by side, as the library and as torch compute them."""
    (a, b), (c, d) = weights(), weights(out=32)
    x, y = torch.randn(6, SIZE), torch.randn(6, OUT + 32)
    expected = torch.cat([updated(x, y[:, :OUT], a, b, BATCH), updated(x, y[:, OUT:], c, d, BATCH)], 1)
    for library in (True, False):
        made, got = wrapper(PunicaWrapperLoraplex), y.clone()
        made._library = made._library if library else None
        made.add_lora_linear(got, x, (a, c), (b, d), 1.0, (OUT, 32))
        assert torch.allclose(got, expected, atol=1e-5)


def test_the_two_halves() -> None:
    """Shrink and expand, which vLLM calls apart when adapters are sharded, add up to the whole."""
    (a, b), x, y = weights(), torch.randn(6, SIZE), torch.randn(6, OUT)
    made, between, got = wrapper(PunicaWrapperLoraplex), torch.zeros(1, 6, RANK), y.clone()
    made.add_shrink(between, x, (a,), 1.0)
    made.add_expand(got, between, (b,), (OUT,), add_inputs=True)
    assert torch.allclose(got, updated(x, y, a, b, BATCH), atol=1e-5)


def test_embedding() -> None:
    """Looked-up rows of A go through their own B only."""
    (_, b), rows, y = weights(), torch.randn(6, RANK), torch.randn(6, OUT)
    got = y.clone()
    wrapper(PunicaWrapperLoraplex).add_lora_embedding(got, rows, b, add_inputs=True)
    for row, adapter in enumerate(BATCH):
        expected = y[row] + b[IDS.index(adapter), 0] @ rows[row] if adapter else y[row]
        assert torch.allclose(got[row], expected, atol=1e-5)


def test_logits_of_sampled_rows() -> None:
    """The output layer sees each request's last row: three requests, six tokens."""
    (a, b), batch = weights(), torch.randn(6, SIZE)
    made = wrapper(PunicaWrapperLoraplex, requests=(8, 0, 9), tokens=(8, 8, 8, 0, 9, 9))
    x, y = batch[torch.tensor([2, 3, 5])], torch.randn(3, OUT)
    got = y.clone()
    made.add_lora_logits(got, x, a, b, 1.0)
    assert torch.allclose(got, updated(x, y, a, b, (8, 0, 9)), atol=1e-5)


@pytest.mark.parametrize(("first", "last"), [(0, 3), (3, 4), (4, 6), (0, 6)])
def test_logits_of_a_prompt(first: int, last: int) -> None:
    """For prompt log probabilities it sees a part of the batch, of any length: each row by its own adapter.

    vLLM's own wrapper takes the requests' adapters there, and fails the engine when their number is another.
    """
    (a, b), batch, tokens = weights(), torch.randn(6, SIZE), (8, 8, 8, 0, 9, 9)
    made = wrapper(PunicaWrapperLoraplex, requests=(8, 0, 9), tokens=tokens)
    x, y = batch[first:last], torch.randn(last - first, OUT)
    got = y.clone()
    made.add_lora_logits(got, x, a, b, 1.0)
    assert torch.allclose(got, updated(x, y, a, b, tokens[first:last]), atol=1e-5)


def test_fewer_rows_than_the_batch() -> None:
    """A layer that gets fewer rows than the batch has is a mistake that must not write beside the rows."""
    a, b = weights()
    with pytest.raises(RuntimeError, match="6 rows have adapters assigned, but the layer got 5"):
        wrapper(PunicaWrapperLoraplex).add_lora_linear(
            torch.zeros(5, OUT), torch.zeros(5, SIZE), (a,), (b,), 1.0, (OUT,)
        )


@pytest.mark.parametrize(
    ("choice", "version", "active"),
    [("auto", "0.32.0", True), ("off", "0.32.0", False), ("auto", "0.33.0", False), ("force", "0.33.0", True),
     ("auto", "0.32.0+cpu", True)],
)  # fmt: skip
def test_when_it_steps_aside(monkeypatch: pytest.MonkeyPatch, choice: str, version: str, active: bool) -> None:
    """On a vLLM that it was not tested with, unless forced, and when it is switched off."""
    monkeypatch.setenv(vllm_plugin.SWITCH, choice)
    monkeypatch.setattr(vllm, "__version__", version)
    assert (vllm_plugin.register() is not None) == active


def test_what_it_says_then(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """It says why, what that costs, and how to have it otherwise."""
    monkeypatch.delenv(vllm_plugin.SWITCH, raising=False)
    monkeypatch.setattr(vllm, "__version__", "0.40.1")
    with caplog.at_level(logging.WARNING, "engine.vllm_plugin"):
        vllm_plugin.register()
    assert "0.40.1" in caplog.text
    assert "LORAPLEX_LORA_KERNELS=force" in caplog.text


def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where vLLM is not on a CPU, nothing changes."""
    monkeypatch.setattr(platforms, "cpu_platform_plugin", lambda: None)
    assert vllm_plugin.register() is None


def test_vllm_uses_it() -> None:
    """The platform of this process's vLLM is ours."""
    assert platforms.current_platform.get_punica_wrapper() == "engine.vllm_plugin.wrapper.PunicaWrapperLoraplex"
