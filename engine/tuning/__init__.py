"""The adapter's life before and after serving: recipes, training, evaluation, merging. Imported by `engine.commands` alone."""
