"""vLLM 0.32 on a CPU answers base-model requests with the adapter in the last LoRA slot, when all slots are taken.

    LORAPLEX_LORA_KERNELS=off python mixed_up_base_rows.py FOLDER_OF_A_LLAMA_LIKE_MODEL

Needs vLLM's CPU build and nothing of Loraplex (the variable switches our plugin off where it is installed). The same base
request is answered alone, then beside a request to an adapter. Prints both answers; exits 1 when they differ.

Why: rows without an adapter have the slot index -1, and `bgmv_shrink` and `bgmv_expand` (vllm/lora/ops/torch_ops/lora_ops.py)
index the stacked weights with it: `lora_b_weights[lora_indices_tensor]`. For torch, -1 is the last slot. GPU kernels skip
such rows.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def write_adapter(folder: Path, model: Path, rank: int = 8) -> str:
    """A random LoRA adapter on the o_proj of every layer, strong enough to change any answer."""
    config = json.loads((model / "config.json").read_text())
    size, weights = config["hidden_size"], {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.o_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(rank, size) / size**0.5
        weights[f"{name}.lora_B.weight"] = torch.randn(size, rank) / rank**0.5
    save_file(weights, folder / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["o_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    return str(folder)


def main() -> None:
    """Ask the base alone, and in a batch with the adapter."""
    model = Path(sys.argv[1])
    torch.manual_seed(0)
    sampling = SamplingParams(temperature=0, max_tokens=12)
    with tempfile.TemporaryDirectory() as folder:
        adapter = LoRARequest("adapter", 1, write_adapter(Path(folder), model))
        llm = LLM(str(model), dtype="float32", enable_lora=True, max_loras=1, max_lora_rank=8, enforce_eager=True,
                  max_model_len=256, enable_prefix_caching=False)  # fmt: skip
        prompt = "The capital of France is"
        alone = llm.generate([prompt], sampling)[0].outputs[0].text
        mixed = llm.generate([prompt, prompt], sampling, lora_request=[None, adapter])[0].outputs[0].text
    print(f"base model, alone:               {alone!r}\nbase model, beside an adapter:   {mixed!r}")
    sys.exit(alone != mixed)


if __name__ == "__main__":
    main()
