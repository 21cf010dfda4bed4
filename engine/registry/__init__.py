"""Adapter versions and aliases: names, checks, storage, and the view of them in memory.

registry.py        the one source of truth: publish, move aliases, delete, record evaluations

names.py           what adapters, versions and aliases may be called
fingerprint.py     the identity of a base model
checks.py          whether an adapter folder may be published
file_checks.py     its files
config_checks.py   its adapter_config.json
patterns.py        the module patterns in that, kept from running for ever
tensor_checks.py   its tensors, layer by layer
signatures.py      its signature

publication.py     puts a version into the store: others see all of it or nothing
manifest.py        what is kept about a version, and about a move of an alias
layout.py          which object lies where
store.py           where the bytes lie: a folder or an object store

reader.py          reads the registry: versions, aliases, files
aliases.py         what an alias log means: which version each alias names, and named before
canary.py          the share of an adapter's name that another version answers
shadow.py          the version that is asked a copy of a share of the requests
catalog.py         all of that in memory: resolves names, and tells of changes
subscription.py    those changes on their way to a listener

cache.py           verified local copies, which the engine loads
worth.py           what is worth keeping where there is no room for all: that cache, memory, the engine
"""
