"""`loraplex simulate`: many replicas in virtual time.

What decides is the real code: the router's choice (cluster/routing) and admission (runtime/admission). What is modelled is the
engine's time and the adapters in it, which residency evicts least recently used first.

engine.py      an engine's times: steps, prefills, loads; measured ones and published ones
replica.py     a replica: real admission, modelled engine
traffic.py     who asks for what, and when: Zipf's law, bursts, deaths
strategies.py  ways to choose a replica: ours, others', and an oracle
run.py         the events in their order, and what came of them
"""
