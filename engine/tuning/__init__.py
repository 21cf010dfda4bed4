"""The adapter's life before and after serving: recipes, training, evaluation, merging. Imported by `engine.commands` alone."""

import logging

logging.getLogger("bitsandbytes").setLevel(
    logging.ERROR
)  # when imported it warns of kernels that nobody packages for CPUs
