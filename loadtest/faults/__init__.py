"""A fault run: files, processes, storage and callers break at random under load, and nobody else may notice."""
