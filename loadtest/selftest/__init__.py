"""The harness tests itself: a server that does exactly what it is told, faults included, and a search for every fault."""
