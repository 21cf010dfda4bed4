"""The engine: vLLM behind a narrow interface, which adapters are in it, and who goes next.

generator.py     one request's way through all of it; requests.py: what it is asked, and the answer on its way
admission/       whose turn it is; allowance.py: how much a tenant may have at all
residency/       which adapters are in the engine; probe.py: the proof that one does something and breaks nothing
engine.py        the interface; vllm/ and fake.py implement it, supervised.py starts either again when it dies
tokens.py, structured.py, grammars.py    what would harm an engine is refused before it sees it
shadow.py, spare.py                      copies of requests for a version on trial, in room that nobody needs
judgement.py, recent.py                  whether a canary does as well as the version that it is to replace
isolation.py, strong.py                  the proof that every request gets its own adapter
"""
