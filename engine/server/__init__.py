"""The gRPC services, what every call goes through, and the HTTP side port.

app.py             starts and stops it all
grpc_server.py     the gRPC server that a router opens, too: connections, health, reflection, the port
process_end.py     when the process is to end: by a signal, or with its parent

boundary.py        the outermost interceptor: what every call goes through, in this order
call.py            one call: its request id and trace, and what is logged of it
tracing.py         OpenTelemetry's spans of a call and its parts
identity/          who calls, what they may do and how much of it
validation.py      the protos' constraints, checked on every message
stalls.py          callers that stop taking or sending
status.py          errors: ours as gRPC statuses with details, and back

generation.py      GenerationService: the request in, the tokens out
caller.py          whose request it is, and until when they wait
convert.py         messages to the runtime's types and back

adapters.py        AdapterService: publish, look, promote, roll back, load, delete, watch
uploads.py         an adapter's files, received into a private folder
moves.py           warm, then switch
progress.py        a message for every stage of long work, then its result
trial_methods.py   AdapterService's canaries and shadows
trials.py          the judge of canaries: ends or promotes them

engine_info.py     EngineService: what is served, within which limits, how busy it is
activity.py        who is being served, and how well of late

http.py            the HTTP side port: metrics, health, and a site
web/               that site: the OpenAI-compatible API and the console

metrics.py         Prometheus metrics
process.py         those of the process itself
logs.py            the log: lines for people, JSON elsewhere
exported_logs.py   the same as OpenTelemetry's records
"""
