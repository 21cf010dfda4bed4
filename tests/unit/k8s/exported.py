"""What a server and a router really export, and which of it a PromQL query asks for."""

from __future__ import annotations

import asyncio
import ssl
import tempfile
import urllib.request
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

from engine.client.testing import fake_server
from engine.cluster.fleet import StaticSource
from engine.cluster.router.app import RouterApp
from engine.config import RouterSettings
from tests.unit.identity.conftest import Authority

_SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count")}


@cache
def exported() -> dict[str, set[str]]:
    """Every metric that the two pages show, as Prometheus names it, and its labels; with TLS, which has some of its own."""
    authority = Authority()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("tls.crt", "tls.key")]
        for file, content in zip(files, authority.issue("server"), strict=True):
            file.write_bytes(content)
        context = ssl.create_default_context(cadata=authority.pem.decode())
        with fake_server(tls_certificate=files[0], tls_key=files[1]) as server:
            found = _of_page(f"https://localhost:{server.app.http_port}", server.app.metrics.registry, context)
            return found | asyncio.run(_of_router(server.target))


async def _of_router(target: str) -> dict[str, set[str]]:
    router = RouterApp(RouterSettings(port=0, http_port=0), StaticSource([target]))
    await router.start()
    try:
        return await asyncio.to_thread(_of_page, f"http://127.0.0.1:{router.http_port}", router.metrics.registry)
    finally:
        await router.stop()


def _of_page(server: str, registry: CollectorRegistry, tls: ssl.SSLContext | None = None) -> dict[str, set[str]]:
    with urllib.request.urlopen(f"{server}/metrics", timeout=5, context=tls) as page:
        return dict(_series(page.read().decode(), _declared(registry)))


def _declared(registry: CollectorRegistry) -> dict[str, tuple[str, ...]]:
    """Labels by the metric's name; a page does not show them before something was counted."""
    collectors = [one for one in registry._collector_to_names if isinstance(one, MetricWrapperBase)]
    return {one._name: tuple(one._labelnames) for one in collectors}


def _series(text: str, declared: dict[str, tuple[str, ...]]) -> Iterator[tuple[str, set[str]]]:
    for family in text_string_to_metric_families(text):
        if family.name.endswith("_created"):
            continue
        shown = {label for sample in family.samples for label in sample.labels}
        labels = (shown | set(declared.get(family.name, ()))) - {"le"}
        for suffix in _SUFFIXES.get(family.type, ("",)):
            yield f"{family.name}{suffix}", labels | ({"le"} if suffix == "_bucket" else set())


def selectors(expression: Any, grouped: frozenset[str] = frozenset()) -> Iterator[tuple[str, set[str]]]:
    """Each metric that a parsed query asks for, with the labels that it is chosen and summed by."""
    kind = type(expression).__name__
    if kind == "VectorSelector":
        yield expression.name, {matcher.name for matcher in expression.matchers.matchers} | grouped
        return
    modifier = getattr(expression, "modifier", None)
    if kind == "AggregateExpr" and modifier and "By" in str(modifier.type):
        grouped |= set(modifier.labels)
    for name in ("expr", "lhs", "rhs", "vector_selector"):
        if (below := getattr(expression, name, None)) is not None:
            yield from selectors(below, grouped)
    for argument in getattr(expression, "args", ()):
        yield from selectors(argument, grouped)
