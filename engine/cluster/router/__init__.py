"""The router: one address for all replicas, with their own protos.

app.py         starts and stops it
generation.py  GenerationService: forwards, and goes on elsewhere when a replica fails
journey.py     one request's way: which replica next, and what a failure means
sent.py        what the caller has of a stream, and the request for the rest of it
adapters.py    AdapterService: warm wherever it will be asked for, then switch
asking.py      how replicas are asked for that: one, one of a base, all of several
overview.py    EngineService: the fleet as if it were one engine
discovery.py   where Prometheus finds the replicas
workers.py     several router processes on one port
"""
