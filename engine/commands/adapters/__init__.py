"""`loraplex adapters`: all of the group, in the order in which --help lists it.

group.py           the group, and how its commands reach a server or a registry
changes.py         publish, promote, roll back, delete
gate.py            what `promote --require` decides by
reads.py           list, show, verify, diff
memory.py          what is in a server's engine (pin, load), and `watch`
trials.py          canaries and shadows; trial_reports.py shows how they fare
exchange.py        import and export: adapters from elsewhere, and to elsewhere
"""

from engine.commands.adapters import changes, memory, reads, trials
from engine.commands.adapters.group import app

# isort: split
from engine.commands.adapters import exchange  # --help lists what comes later below

__all__ = ["app", "changes", "exchange", "memory", "reads", "trials"]
