"""Adapter versions and aliases: names, checks, storage, and the view of them in memory."""
