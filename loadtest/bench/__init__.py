"""`make bench`: a command for each part, from many adapters in one batch to what training costs. `__main__.py` lists them.

Parts, each with its command in command.py or, where one file is enough, in a file of this folder:

adapters      many adapters in a batch, against the base alone: our kernels, vLLM's own, transformers with PEFT
frontend      the gRPC server against AsyncLLM in process and vLLM's OpenAI server
residency     more adapters than slots: what it costs, and who waits
router        what a hop costs (command.py), and what it is worth to go where the adapter is (affinity.py)
tuning        training, resuming, merging and evaluating, beside doing it by hand
endurance     overload, and a soak with changes
client.py     what one client process of the load test can take
eviction.py   which copy should make way, on made-up traces
identity.py   what it costs to ask callers who they are
memory.py     memory and start-up time as slots and rank grow
profile.py    where a decode step's time goes

What they share:

callers.py    a fixed number of callers, each sending its next request when its last one is answered
backends.py   who can be asked: a Loraplex server, vLLM's OpenAI server, AsyncLLM in process
samples.py    what is measured about one answer, and about many
engines.py    vLLM engines that are equal in all but what is compared
child.py      processes that are started, and asked in JSON
machine.py    what the figures were measured on
output.py     options, tables, JSON and progress
"""
