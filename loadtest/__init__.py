"""Whether a server meets its requirements (`loraplex loadtest`), and what its parts cost (`make bench`).

A load test goes from left to right: plan (scenario to tape), drive (tape to records), judge (records to verdict), report.

plan        what will be asked and what is required
drive       sends a tape and writes down what comes, from client processes of its own
judge       measures, correctness, whether the run is valid, the verdict
report      the folder that a run leaves
commands    what each command does with these four
selftest    a scripted server with planted faults: does the harness find them?
faults      breaks files, processes and storage under load; nobody else may notice
bench       `make bench`: what adapters, front end, router and training cost, beside doing it otherwise
scenarios   the shipped scenarios, as YAML
schemas     JSON schemas of scenarios, requirements and run.json

cli.py      the table of commands, with their options
console.py  what they print to, and how each ends
errors.py   exit codes, and the errors that end a run early
ports.py    a free port for a server that is started here
"""
