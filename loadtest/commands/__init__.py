"""What each command does; loadtest/cli.py is the table of them.

params.py     options that several commands have, and what is read from their text
run.py        run and replay: scenarios or a tape against a target, and the report; also what search and compare share
search.py     the highest rate that meets the requirements
compare.py    two targets on the same tapes, in turns
plan.py       what a run would be
scenarios.py  the shipped scenarios
report.py     an earlier run's tables
selftest.py   the harness against a scripted server

`faults` is in loadtest/faults.
"""
