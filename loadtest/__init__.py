"""Load on a server: workloads, measures, and the benchmark against vLLM itself."""
