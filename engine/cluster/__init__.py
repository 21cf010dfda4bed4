"""Many engines behind one address.

routing/     which replica a request goes to: pure decisions, no I/O and no clock
"""
