"""More adapters than slots: what it costs, who waits, and what vLLM itself does with the same load."""
