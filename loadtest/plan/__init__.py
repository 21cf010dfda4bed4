"""What will be asked and what is required: scenarios, requirements, and the tape that is made from them.

scenario.py      scenarios, as YAML
requirements.py  what a server must reach, as YAML or in a line
tape.py          every request of a run, decided before the first is sent
arrivals.py      when requests arrive: `poisson:20`
lengths.py       how long prompts and answers are: `lognormal:64,cv=1`
popularity.py    who is asked: `zipf:1.0`
prompts.py       the text of a prompt: random words
traces.py        files of past traffic, instead of these
forecast.py      what a run would be, before anything is sent
values.py        values as people write them: `500ms`, `5%`
strict.py        reading YAML into models; a wrong key is named, with the nearest right one
schemas.py       JSON schemas of these files, for editors
"""
