"""Sending a tape: targets, the driver of one process, the crew of processes, and what is done to the server meanwhile."""
