"""What each command does: run and replay, compare, search."""
