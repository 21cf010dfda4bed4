"""Ray's part: where engines and routers run, how many, and what happens when one ends.

application.py  the Ray Serve application: which deployments there are, and how Ray places and replaces them
actors.py       EngineReplica and Router: each starts a process and watches it
fleet.py        the Fleet actor: who is where, from heartbeats
control.py      the same as Ray keeps it, and what was last asked for
children.py     the server and the router are processes of their own: nothing of Ray is in the way of a token
folders.py      where they keep settings, log and copies of adapters
scaling.py      how many engines there should be
local.py        Ray on this machine: safe settings, small memory

An EngineReplica starts `loraplex serve` and tells the Fleet how it is; a Router starts `loraplex router` and writes down for
it what the Fleet knows, so a router goes on with the last known fleet when Ray is gone. Children whose Ray worker dies
finish their work.
"""
