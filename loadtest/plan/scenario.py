"""Scenarios: what load to put on a server, as YAML.

A scenario is one workload, or several that differ in a few keys (`cases`). `quick` holds what changes for a machine without
a GPU. A scenario's own keys come first, then its `quick`, then the case's, then what the command line says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from loadtest.errors import BadInput
from loadtest.plan import arrivals, lengths
from loadtest.plan import popularity as popularities
from loadtest.plan.requirements import Requirements
from loadtest.plan.strict import Strict, checked, nearest, read_yaml
from loadtest.plan.values import Seconds, Share

Length = Annotated[
    str, BeforeValidator(str), AfterValidator(lengths.valid),
    WithJsonSchema({"type": ["integer", "string"], "examples": [64, "uniform:8..512", "lognormal:64,cv=1,max=512"]}),
]  # fmt: skip
SERVER_ACTIONS = ("publish", "publish_bad", "kill", "stop", "kill_engine", "stop_engine", "break_registry")
"""What only a server that the tool started itself can be made to suffer."""
NETWORK_ACTIONS = ("drop_connections", "stall_network")
"""What is done to the connections, through a proxy."""


class Action(Strict):
    """Something done to the server while the load runs, once or again and again."""

    do: Literal[
        "publish", "publish_bad", "promote", "rollback", "preload", "unload",
        "kill", "stop", "kill_engine", "stop_engine", "break_registry",
        "drop_connections", "stall_network",
    ]  # fmt: skip
    at: Seconds = Field(0.0, description="Seconds after the load's start.")
    every: Seconds | None = Field(None, gt=0, description="Then again and again.")
    adapter: str = Field("", description="Which one; left out: the most popular.")
    lasts: Seconds = Field(1.4, description="How long what is stopped, stalled or broken stays so.")


class Burst(Strict):
    """One tenant that sends far more than its share; the requirements then judge the others."""

    adapter: str = Field("", description="Which one; left out: the most popular.")
    times: float = Field(10.0, gt=0, le=1000, description="Its extra traffic, as a multiple of its own.")
    start: Seconds = 0.0
    end: Seconds | None = None


class ServerNeeds(Strict):
    """What a server that the tool starts itself has to have."""

    markers: int = Field(0, ge=0, le=4096, description="Adapters with strong random weights to publish: load-001, ...")
    ranks: tuple[int, ...] = Field((8,), min_length=1, description="Their ranks, in turn.")
    settings: dict[str, str | int | float | bool] = Field({}, description="Flags of `loraplex serve`.")


class Workload(Strict):
    """One load: who asks what, how often, for how long, and what is required meanwhile."""

    duration: Seconds = Field(60.0, gt=0, le=7 * 24 * 3600)
    warmup: Seconds = Field(10.0, description="The first part of the duration, which is not measured.")
    drain: Seconds = Field(30.0, description="How long to wait at the end for answers under way.")
    timeout: Seconds = Field(60.0, gt=0, description="Deadline of one request.")
    seed: int = Field(1, ge=0)
    arrival: Annotated[str, AfterValidator(arrivals.valid)] = "poisson:0.6x"
    adapters: Literal["all"] | Annotated[int, Field(ge=0)] | tuple[str, ...] = Field(
        "all", description="Names, or how many of the target's, or all."
    )
    popularity: Annotated[str, AfterValidator(popularities.valid)] = "zipf:1.0"
    base_share: Share = Field(0.0, description="Requests for the base model, with no adapter.")
    prompt: Length = "64"
    output: Length = "32"
    canary: Share = Field(0.1, description="Requests whose answers are compared with references.")
    cancel: Share = Field(0.0, description="Requests that the client gives up half way.")
    max_inflight: int = Field(10_000, ge=1, description="A guard only: reaching it makes the run invalid.")
    burst: Burst | None = None
    actions: tuple[Action, ...] = ()
    requirements: Requirements = Requirements()

    @model_validator(mode="after")
    def _consistent(self) -> Workload:
        if self.warmup >= self.duration:
            raise ValueError(f"warmup ({self.warmup:g} s) must be shorter than duration ({self.duration:g} s)")
        if self.adapters in (0, ()) and self.base_share < 1:
            raise ValueError("zero adapters: name some, or ask for the base alone with base_share: 1")
        if self.burst and arrivals.parse(self.arrival).kind in ("closed", "trace"):
            raise ValueError("a burst needs an open arrival with a rate, such as poisson:5")
        arrival = arrivals.parse(self.arrival)
        if not arrivals.relative(self.arrival) and arrival.rate * self.duration > arrivals.MOST_REQUESTS:
            raise ValueError(
                f"arrival {self.arrival} for {self.duration:g} s is more than {arrivals.MOST_REQUESTS:,} requests"
            )
        return self


class Scenario(Workload):
    """A workload with a name, and what varies in it."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    about: str = ""
    server: ServerNeeds = ServerNeeds()
    quick: dict[str, Any] = Field({}, description="What changes with --quick: keys of a workload, and cases to keep.")
    cases: tuple[dict[str, Any], ...] = Field((), description="Variants: a name, and the keys that differ.")


class Case(Strict):
    """One workload of a run."""

    scenario: str
    name: str
    workload: Workload
    server: ServerNeeds = ServerNeeds()

    @property
    def title(self) -> str:
        """`steady`, or `skew/zipf-1.5` for one of several."""
        return f"{self.scenario}/{self.name}" if self.name else self.scenario


def shipped() -> list[str]:
    """The names of the scenarios in the package."""
    return sorted(path.name.removesuffix(".yaml") for path in _folder().iterdir() if path.name.endswith(".yaml"))


def load(name: str) -> Scenario:
    """A scenario by its name or its file."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        known = shipped()
        if name not in known:
            raise BadInput(
                f"no scenario {name!r}{nearest(name, known)}", f"There are {', '.join(known)}, or give a .yaml file."
            )
        path = Path(str(_folder() / f"{name}.yaml"))
    scenario = checked(Scenario, read_yaml(path), str(path))
    for quick in (False, True):
        cases(scenario, quick=quick)  # so that a wrong key in a case is told at once
    return scenario


def chosen(names: Iterable[str], *, quick: bool, overrides: Mapping[str, Any]) -> list[Case]:
    """The cases that are named: `cliff` is all of a scenario's (with `quick` those that it keeps), `cliff/a16` is one."""
    found: list[Case] = []
    for name in names:
        whole, _, one = ("", "", "") if name.endswith((".yaml", ".yml")) else name.partition("/")
        scenario = load(whole or name)
        if one:
            known = [str(variant.get("name", "")) for variant in scenario.cases]
            if one not in known:
                raise BadInput(
                    f"scenario {whole} has no case {one!r}{nearest(one, known)}", f"It has {', '.join(known)}."
                )
            scenario = scenario.model_copy(update={"quick": scenario.quick | {"cases": [one]}})
            kept = cases(scenario, quick=quick, overrides=overrides)
            found += [case for case in kept if case.name == one]
        else:
            found += cases(scenario, quick=quick, overrides=overrides)
    return found


def cases(scenario: Scenario, *, quick: bool = False, overrides: Mapping[str, Any] | None = None) -> list[Case]:
    """The workloads of a scenario. Raises BadInput for a variant that makes no sense."""
    own = scenario.model_dump(include=set(Workload.model_fields), exclude_unset=True, by_alias=True)
    changes = dict(scenario.quick) if quick else {}
    wanted = changes.pop("cases", None)
    made = []
    for variant in scenario.cases or ({},):
        keys = dict(variant)
        name = str(keys.pop("name", ""))
        if wanted is not None and name not in map(str, wanted):
            continue
        data = own
        for layer in (changes, keys, overrides or {}):
            data = merged(data, layer)
        where = "/".join(filter(None, (f"scenario {scenario.name}", name)))
        made.append(
            Case(scenario=scenario.name, name=name, workload=checked(Workload, data, where), server=scenario.server)
        )
    if not made:
        raise BadInput(f"scenario {scenario.name}: quick keeps the cases {wanted}, and none has such a name")
    return made


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with the keys of `above` on top; mappings inside are merged the same way."""
    found = dict(below)
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(found.get(key), Mapping):
            found[key] = merged(found[key], value)
        else:
            found[key] = value
    return found


def _folder() -> Any:
    return resources.files("loadtest") / "scenarios"
