"""`loraplex simulate`: many replicas in virtual time.

What decides is the real code: the router's choice (cluster/routing), admission (runtime/admission), and residency's choice of
who gets a slot and who makes way (runtime/residency/table.py). What is modelled is time: an engine's steps, and loads.

engine.py      an engine's times: steps, prefills, loads; measured ones and published ones
residents.py   the adapters in an engine: residency's decisions, and loads that take virtual time
replica.py     a replica: real admission, modelled engine
traffic.py     who asks for what, and when: Zipf's law, bursts
strategies.py  ways to choose a replica: the others' known ones, and ours
oracle.py      a choice that knows the future, and a floor under every choice
movement.py    how many adapters move when a replica joins or dies
run.py         the events in their order, deaths among them, and what came of them
chart.py       the results as a picture
"""
