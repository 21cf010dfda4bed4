"""Loraplex: one vLLM engine, many LoRA adapters, over gRPC."""
