"""Ray's part: where engines and routers run, how many, and what happens when one ends.

application.py  the Ray Serve application: EngineReplica and Router deployments
fleet.py        the Fleet actor: who is where, from heartbeats
children.py     the server and the router are processes of their own: nothing of Ray is in the way of a token
scaling.py      how many engines there should be
local.py        Ray on this machine: safe settings, small memory

An EngineReplica starts `loraplex serve` and tells the Fleet how it is; a Router starts `loraplex router` and writes down for
it what the Fleet knows, so a router goes on with the last known fleet when Ray is gone. Children whose Ray worker dies
finish their work.
"""
