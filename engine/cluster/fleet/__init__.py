"""Who is there.

sources.py   the replicas' addresses: a list, or a file that may change; Ray's is in engine/cluster/ray
access.py    how replicas are reached: TLS, and the router's own key
link.py      the connection to one replica, and whether it can be trusted
replies.py   how a call to a replica ended: its answer, or its error in words or as it came
watcher.py   asks every replica how it is, again and again, and keeps what the routing needs up to date
"""

from engine.cluster.fleet.access import Access
from engine.cluster.fleet.link import Link
from engine.cluster.fleet.sources import DnsSource, FileSource, Source, StaticSource
from engine.cluster.fleet.watcher import GET_ENGINE, Fleet

__all__ = ["GET_ENGINE", "Access", "DnsSource", "FileSource", "Fleet", "Link", "Source", "StaticSource"]
