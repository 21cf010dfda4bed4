"""The front end against AsyncLLM in process and against vLLM's own OpenAI server."""
