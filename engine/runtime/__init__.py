"""The engine: vLLM behind a narrow interface, which adapters are in it, and who goes next."""
