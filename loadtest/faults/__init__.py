"""A fault run: files, processes, storage and callers break at random under load, and nobody else may notice.

command.py  `loraplex loadtest faults`
run.py      draws the faults, and judges what everybody else got
kinds.py    the faults
damage.py   how a weights file goes bad
load.py     the tenants who must not notice, and the one whose adapters break
"""
