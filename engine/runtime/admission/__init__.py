"""Admission: requests wait here, and enter the engine so that it is full, fair, and holds their adapters.

gate.py      the asyncio shell: a place for the time of a block, or a typed refusal
policy.py    who goes next, who is refused: no clock and no event loop, `now` is an argument
tenants.py   the virtual token counters that share the engine among tenants, and each tenant's adapters
slots.py     which adapters run at once, and which of them has to make room
pace.py      how fast the engine has been of late, and so whether a deadline can be met
tickets.py, adapters.py, ranking.py   a request and its queue, what it is for, an order that is cheap to keep
"""

from engine.runtime.admission.adapters import ResidentSet
from engine.runtime.admission.gate import Admission, Observer, Place
from engine.runtime.admission.policy import Rules
from engine.runtime.admission.tickets import ANONYMOUS, Asked

__all__ = ["ANONYMOUS", "Admission", "Asked", "Observer", "Place", "ResidentSet", "Rules"]
