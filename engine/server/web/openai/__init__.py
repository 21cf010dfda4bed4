"""The OpenAI-compatible API: its requests become ours, our answers become its."""
