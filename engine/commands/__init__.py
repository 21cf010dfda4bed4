"""The commands of `loraplex`; `engine.cli` puts them together. A module is imported when its command runs, if it is heavy.

root.py            what all commands share: --version, and how a failure is told
params.py          options that several commands have; credentials.py: those of every command that calls a server;
                   flags.py: settings as flags
output.py          results to stdout, everything else to stderr; describe.py: the registry's things as tables and as data
backends.py        where adapters are managed: through a server, or (registry_backend.py) on a registry itself
fetched.py         versions as folders; signing.py: signing them without writing into the user's own

serve.py, health.py, doctor.py (checkup.py, isolation.py), keys.py, policy.py                      a server
generate.py (generate_file.py), top.py (top_frame.py, top_view.py)                                 its callers
adapters/, base.py                                                                                 what it serves
train.py (train_view.py), evaluate.py (comparison.py), merge.py, readapt.py                        how that is made
router.py, cluster.py, simulate.py                                                                 many servers
"""
