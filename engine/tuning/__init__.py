"""The adapter's life before and after serving. Imported by `engine.commands` alone.

Training     recipe.py, jsonl.py, data.py, encoding.py   what is to be learnt, all of it checked
             estimate.py                                 what the run trains and needs
             training.py ── worker.py                    the run from the outside, and the process that does it:
             session.py                                  load (base_model.py), prove, learn (learner.py, batches.py), score
                                                         (heldout.py), save (run_folder.py)
             advice.py                                   what the run's numbers advise
Evaluating   suite.py, evaluation.py, requirement.py     through the serving engine; judging.py without one
Merging      merging.py ── merge.py, merge_check.py      into the base; combine.py: several into one
Elsewhere    conversion.py                               adapters that other tools trained
New bases    rebase.py                                   which versions fit, and new ones of those that do not
             deltas.py                                   what an adapter adds to its base's weights
"""

import logging

# When imported it warns of kernels that nobody packages for CPUs.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
