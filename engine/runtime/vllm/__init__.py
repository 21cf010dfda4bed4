"""vLLM behind our Engine interface: everything of the server that calls it.

engine.py     one AsyncLLM: start and stop, generate, load and unload adapters
start.py      what it is started with: arguments, environment, metrics
messages.py   our requests as vLLM's, its outputs as our deltas
resume.py     how it goes on with an answer that began elsewhere
"""
