"""Batches of many adapters, against the base alone: our kernels, vLLM's own, and transformers with PEFT."""
