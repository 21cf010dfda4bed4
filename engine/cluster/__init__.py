"""Many engines behind one address.

routing/     which replica a request goes to: pure decisions, no I/O and no clock
fleet/       who is there: addresses from a list or a file, and what each replica says of itself
router/      the process that speaks the replicas' own protos and forwards to them; what goes on when one of them dies
simulation/  the same decisions against modelled engines in virtual time
ray/         the Ray Serve application that places and watches engines and routers

Ray carries control, never tokens: a router's streams go straight to the replicas.
"""
