"""`loraplex cluster`: engines and routers on Ray."""

from __future__ import annotations

import json
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from engine.commands.flags import add_flags
from engine.commands.output import err, note, out, warnings, write_json
from engine.config import ClusterSettings, load
from engine.errors import InvalidRequest, NoCluster

if TYPE_CHECKING:  # Ray need not be there
    from engine.cluster.ray.control import Remembered

app = typer.Typer(no_args_is_help=True, help="Engines and routers on many machines, placed and watched by Ray.")

Name = Annotated[str, typer.Option(help="The fleet's name.")]
RayAddress = Annotated[str, typer.Option("--ray", help="Address of the Ray cluster; auto: the one on this machine.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_PANELS = {"replicas": "How many", "model": "What each one is", "name": "Where"}
_LOOK_S = 2.0  # between looks at what Serve waits for


def up(config: Path | None, **flags: Any) -> None:
    """Start engines and routers on Ray, or change what runs.

    Examples:
      loraplex cluster up --replicas 2 --model /models/llama --registry /adapters
      loraplex cluster up --ray auto --replicas 8 --gpus 1 --allow-remote --host 0.0.0.0
      loraplex cluster up --config cluster.yaml --max-replicas 16
      loraplex cluster up --ray auto --model /models/old --next-model /models/new

    Without --ray it starts Ray on this machine and stays until Ctrl-C. With
    --ray it returns when all is up. Running it again with other settings
    replaces what they change, new before old where there is room; clients of
    ours notice nothing. Other numbers restart nothing. A --next-model is a
    second base beside the first; `up --model` with it ends the change, and its
    engines go on.
    """
    parsed = {name: _parsed(flags.pop(name), name) for name in ("engine", "router", "runtime_env")}
    spec = _absolute(load(ClusterSettings, config, **flags, **parsed))

    from engine.cluster.ray.local import check_resources, connected

    with connected(spec):
        check_resources(spec, _nodes())
        with err.status(f"starting {spec.engines} engines and {spec.routers} routers"):
            _run(spec)
        out.print(f"{spec.engines} engines behind {spec.host}:{spec.port}", highlight=False)
        if not spec.ray:
            err.print("Ctrl-C stops it")
            _until_told()
            with err.status("stopping"):
                _stop(spec.name)


add_flags(up, ClusterSettings, _PANELS)
app.command("up")(up)


@app.command("status")
def status(name: Name = "loraplex", ray: RayAddress = "auto", as_json: AsJson = False) -> None:
    """Show every replica: where it is, its base, what it does, what it holds."""
    with _fleet(name, ray) as (fleet, get):
        from engine.api.loraplex.v1 import engine_pb2

        reports = get(fleet.reports.remote())
        rows = [
            _row(address, engine_pb2.GetEngineResponse.FromString(data)) for address, data in sorted(reports.items())
        ]
        state, models = _serve_state(name), _known(name).engines
    if as_json:
        write_json({"replicas": rows, "deployments": state, "models": dict(models)})
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("address", "state", "base", "running", "waiting", "KV cache", "adapters", "version"):
        table.add_column(heading, no_wrap=heading != "adapters")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    out.print(table)
    for warning in warnings(_mixed(rows)):
        err.print(warning, soft_wrap=True)
    for deployment, states in state.items():
        of = f" of {models[deployment]}" if deployment in models else ""
        told = ", ".join(f"{count} {what}" for what, count in states.items())
        out.print(f"{deployment}{of}: {told}", highlight=False, soft_wrap=True)


@app.command("scale")
def scale(
    replicas: Annotated[int, typer.Argument(min=1, help="How many engines there shall be.")],
    next_replicas: Annotated[
        int | None, typer.Option(min=1, help="And how many of the second base, while there is one.")
    ] = None,
    name: Name = "loraplex",
    ray: RayAddress = "auto",
) -> None:
    """Have more or fewer engines. Those that stay are left alone; those that go finish what they have begun."""
    with _fleet(name, ray):
        from engine.cluster.ray.local import check_resources

        before = _known(name).spec
        if next_replicas and not before.next_model:
            raise InvalidRequest("--next-replicas", "there is no second base: see `cluster up --next-model`")
        changes = {"replicas": replicas, "next_replicas": next_replicas or before.next_replicas, "max_replicas": None}
        spec = ClusterSettings(**(before.model_dump() | changes))
        check_resources(spec, _nodes())
        with err.status(f"scaling to {spec.engines}"):
            _run(spec)
    out.print(f"{spec.engines} engines", highlight=False)


@app.command("drain")
def drain(
    address: Annotated[str, typer.Argument(help="Of the replica, as `status` shows it.")],
    name: Name = "loraplex",
    ray: RayAddress = "auto",
) -> None:
    """Have one replica take no new work, finish what it has, and make room for a fresh one."""
    with _fleet(name, ray) as (fleet, get):
        if not get(fleet.drain.remote(address)):
            raise InvalidRequest("address", f"there is no replica at {address}: see `loraplex cluster status`")
    out.print(f"{address} drains", highlight=False)


@app.command("down")
def down(name: Name = "loraplex", ray: RayAddress = "auto") -> None:
    """Stop engines and routers, after what they are working on. Ray itself goes on."""
    with _fleet(name, ray), err.status("stopping"):
        _stop(name)
    out.print("stopped", highlight=False)


def _run(spec: ClusterSettings) -> None:
    from ray import serve

    from engine.cluster.ray.application import build

    start: Any = serve.start
    start(proxy_location="Disabled")
    with _telling_what_it_waits_for(spec.name):
        serve.run(build(spec.model_dump(mode="json")), name=spec.name, route_prefix=None)


@contextmanager
def _telling_what_it_waits_for(name: str) -> Iterator[None]:
    """Say what Serve has to say of deployments that are not all up, such as who finds no place: it waits for that for ever."""
    ended = threading.Event()
    watch = threading.Thread(target=_tell, args=(name, ended), daemon=True)
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join(_LOOK_S)


def _tell(name: str, ended: threading.Event) -> None:
    from ray import exceptions, serve
    from ray.serve.exceptions import RayServeException

    told: dict[str, str] = {}
    while not ended.wait(_LOOK_S):
        with suppress(exceptions.RayError, RayServeException):  # the call that waits meets it, too
            application = serve.status().applications.get(name)
            messages = {each: one.message for each, one in (application.deployments if application else {}).items()}
            for deployment, message in messages.items():
                if message and message != told.get(deployment):
                    note(message)
            told = messages


def _nodes() -> list[tuple[str, dict[str, float]]]:
    """The Ray cluster's nodes, by address, with what each has in all."""
    import ray

    get: Any = ray.nodes
    return [(node["NodeManagerAddress"], node["Resources"]) for node in get() if node["Alive"]]


def _stop(name: str) -> None:
    from ray import serve

    from engine.cluster.ray.control import forget

    serve.delete(name)
    forget(name)


@contextmanager
def _fleet(name: str, address: str) -> Iterator[tuple[Any, Any]]:
    """The Fleet actor, and ray.get. Raises NoCluster."""
    from engine.cluster.ray.local import connected

    spec = ClusterSettings(name=name, ray=address, allow_remote=True)
    with connected(spec) as ray:
        from engine.cluster.ray.control import fleet_of

        try:
            fleet = fleet_of(name)
        except ValueError as error:
            raise NoCluster(f"no fleet {name!r} runs there") from error
        yield fleet, ray.get


def _known(name: str) -> Remembered:
    """What was last asked for of a fleet. Raises NoCluster."""
    from engine.cluster.ray.control import remembered

    if (known := remembered(name)) is None:
        raise NoCluster(f"nobody has asked for a fleet {name!r} there")
    return known


def _serve_state(name: str) -> dict[str, dict[str, int]]:
    from ray import serve

    application = serve.status().applications.get(name)
    if application is None:
        return {}
    return {
        deployment: {str(getattr(state, "value", state)): count for state, count in one.replica_states.items()}
        for deployment, one in application.deployments.items()
    }


def _row(address: str, engine: Any) -> dict[str, Any]:
    load = engine.load
    states = {"draining": load.draining, "dead": load.dead, "restarting": load.restarting, "serving": True}
    return {
        "address": address,
        "state": next(state for state, holds in states.items() if holds),
        "base": f"{engine.base.name} {engine.base.fingerprint[7:15]}",
        "running": load.running,
        "waiting": load.waiting,
        "kv_cache": f"{load.kv_cache_usage:.0%}",
        "adapters": ", ".join(f"{one.name}@{one.version}" for one in engine.resident) or "none",
        "version": engine.server_version,
    }


def _mixed(rows: list[dict[str, Any]]) -> list[str]:
    """What to warn of: replicas that run different software versions."""
    versions = Counter(row["version"] for row in rows)
    told = ", ".join(f"{version} ({count} of {len(rows)})" for version, count in sorted(versions.items()))
    return [f"the replicas run different software versions: {told}"] if len(versions) > 1 else []


def _parsed(text: str | None, name: str) -> dict[str, Any] | None:
    """A flag's JSON."""
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InvalidRequest(f"--{name.replace('_', '-')}", f"is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise InvalidRequest(f"--{name.replace('_', '-')}", "must be a JSON object")
    return found


def _absolute(spec: ClusterSettings) -> ClusterSettings:
    """Paths as they are for processes that run elsewhere on this machine."""
    changes: dict[str, Any] = {"model": spec.model.resolve(), "cache": spec.cache.resolve()}
    if spec.next_model:
        changes["next_model"] = spec.next_model.resolve()
    if "://" not in spec.registry:
        changes["registry"] = str(Path(spec.registry).resolve())
    return spec.model_copy(update=changes)


def _until_told() -> None:
    told = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: told.set())
    while not told.wait(1):
        continue
