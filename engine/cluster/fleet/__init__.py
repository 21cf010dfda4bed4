"""Who is there.

sources.py   the replicas' addresses: a list, or a file that may change; Ray's is in engine/cluster/ray
link.py      the connection to one replica, and whether it can be trusted
watcher.py   asks every replica how it is, again and again, and keeps what the routing needs up to date
"""

from engine.cluster.fleet.link import Link
from engine.cluster.fleet.sources import FileSource, Source, StaticSource
from engine.cluster.fleet.watcher import Fleet

__all__ = ["FileSource", "Fleet", "Link", "Source", "StaticSource"]
