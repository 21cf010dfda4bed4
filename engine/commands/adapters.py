"""`loraplex adapters`: all of the group, in the order in which --help lists it."""

from engine.commands import adapter_changes, adapter_memory, adapter_reads, adapter_trials, exchange
from engine.commands.adapter_group import app

__all__ = ["adapter_changes", "adapter_memory", "adapter_reads", "adapter_trials", "app", "exchange"]
