"""Residency: which adapters are where, from the registry to the engine's slots, each tier bounded.

residency.py   what is in the engine: leases, pins, claims, evictions, quarantine
table.py       who gets a slot and who makes way: no clock and no event loop, so that a simulation can drive it
loading.py     what one load does; nothing runs that is not loaded, confirmed and probed
memory.py      prepared copies in host memory, which the engine has only to copy; what the queue will need is prepared ahead
               below it: verified local copies (registry/cache.py), and the registry
"""

from engine.runtime.residency.loading import OnStage
from engine.runtime.residency.memory import HostMemory, Tier, shared_folder
from engine.runtime.residency.residency import Lease, Observer, Residency, Resident

__all__ = ["HostMemory", "Lease", "Observer", "OnStage", "Residency", "Resident", "Tier", "shared_folder"]
