"""Which replica a request goes to. Nothing here does I/O or reads a clock, so that a simulation can drive it.

rendezvous.py  an order of preference among the replicas for each adapter, that all routers agree on without talking
replicas.py    what a router knows of a replica, and of the whole fleet
costs.py       what a choice costs, in seconds until the first token
choice.py      the choice itself: the cheapest of the preferred ones that are not overloaded
warming.py     what a new replica loads before it takes requests
"""

from engine.cluster.routing.choice import Ask, Chooser
from engine.cluster.routing.costs import Costs
from engine.cluster.routing.rendezvous import Rendezvous
from engine.cluster.routing.replicas import Replica, Replicas, Report

__all__ = ["Ask", "Chooser", "Costs", "Rendezvous", "Replica", "Replicas", "Report"]
