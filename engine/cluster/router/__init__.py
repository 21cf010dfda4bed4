"""The router: one address for all replicas, with their own protos.

app.py         starts and stops it
workers.py     several router processes on one port
ports.py       that port, and the way out of it when a successor takes over

generation.py  GenerationService: forwards, and goes on elsewhere when a replica fails
metadata.py    what of a call's metadata is passed on
journey.py     one request's way: which replica next, and what a failure means
sent.py        what the caller has of a stream, and the request for the rest of it
together.py    a stream's messages, fewer of them while this router is busy

adapters.py    AdapterService: warm wherever it will be asked for, then switch
asking.py      how replicas are asked for that: one, one of a base, all of several
uploads.py     an upload, chunk by chunk to one replica

overview.py    EngineService: the fleet as if it were one engine
activity.py    the replicas' accounts of whom they serve, put together
metrics.py     what the router counts itself
discovery.py   where Prometheus finds the replicas
"""
