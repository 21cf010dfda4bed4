"""`make bench ARGS=endurance`: five times more than the engine can do, and many hours' worth of work and changes.

load.py      requests at a rate, and what became of each
vitals.py    memory, files and places of a running server, over time
overload.py  does goodput hold, is every refusal clear, how soon is it over
soak.py      what grows, and what is left when all is quiet
"""
