"""Training, resuming, merging and evaluating, each beside what one would do without Loraplex."""
