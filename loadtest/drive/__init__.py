"""Sending a tape, and what is done to the server meanwhile.

One case:

case.py        from the tape to the verdict, against a site
search.py      the highest rate that meets the requirements, from one case after the other
site.py        a target as it was found: adapters, versions, limits, answers when idle
openers.py     opens a site: a server that is there, one started for the run, or stock vLLM

Sending:

crew.py        the client processes, each with its own event loop and connections
driver.py      one process's rows of the tape, open loop or closed loop
targets.py     what a tape is sent to; a Loraplex server over gRPC
openai.py      vLLM's OpenAI server, given the same tape
records.py     what is written down about one request

What happens meanwhile:

actions.py     adapters come, move and go; processes die
proxy.py       a TCP proxy whose connections break or stand still when told to

A server of our own:

own_server.py  `loraplex serve` as a process, for the time of a run
fleet.py       the adapters that it needs: the given folders, and markers
markers.py     adapters so strong that no two answer alike
processes.py   the processes below another
"""
