"""Every setting of the server, once: defaults < YAML file < LORAPLEX_* environment < command-line flags."""

from __future__ import annotations

import os
import re
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from engine.errors import BadConfiguration

MEBIBYTE = 1024 * 1024
S = TypeVar("S", bound=BaseSettings)
TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # a tenant's name
MIN_WEIGHT, MAX_WEIGHT = 0.001, 1000


class Settings(BaseSettings):
    """The server's settings. Frozen: what the server started with is what it runs with."""

    model_config = SettingsConfigDict(env_prefix="LORAPLEX_", frozen=True, extra="forbid")

    # What to serve
    model: Path = Field(Path(".models/smollm2-135m-instruct"), description="Folder of the base model.")
    registry: str = Field(
        ".loraplex/registry", description="Where adapters live: a folder, or an s3://, gs://, az:// or memory:// URL."
    )
    engine: Literal["vllm", "fake"] = Field("vllm", description="vllm, or fake: instant made-up answers for tests.")
    cache: Path = Field(
        Path(".loraplex/cache"), description="Local folder for verified copies of adapters and for fingerprints."
    )

    require_signature: Path | None = Field(
        None, description="A public key (PEM): only adapters signed with its private key are published and loaded."
    )

    # Where to listen
    host: str = Field("127.0.0.1", description="Address to listen on; loopback unless you say otherwise.")
    port: int = Field(50051, ge=0, le=65535, description="gRPC port; 0 picks a free one.")
    http_port: int = Field(
        9090, ge=0, le=65535, description="Port of /metrics, /healthz and /readyz; 0 picks a free one."
    )
    allow_remote: bool = Field(
        False, description="Allow a --host that other machines reach, although nothing authenticates."
    )
    reflection: bool = Field(True, description="Let gRPC tools discover the API.")
    fleet: str = Field("", max_length=64, description="The fleet that it belongs to, for routers to check.")

    # The engine
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="Precision to compute in.")
    context_length: int | None = Field(
        None, ge=16, description="Most tokens of prompt and answer; default: the model's."
    )
    max_running: int = Field(32, ge=1, le=4096, description="Requests that the engine works on at once.")
    max_rank: int = Field(16, ge=1, le=512, description="Largest LoRA rank; larger costs memory for every adapter.")
    max_resident: int = Field(8, ge=1, le=1024, description="Adapters in the engine's memory at once.")
    host_memory_mib: int = Field(
        1024, ge=0, le=1_048_576, description="Memory for adapters that are ready to be copied into the engine, in MiB."
    )
    disk_cache_mib: int = Field(
        16_384, ge=1, le=104_857_600, description="Disk space for local copies of adapters below --cache, in MiB."
    )
    tensor_parallel: int = Field(
        1, ge=1, le=64, description="Devices that share the model, a worker process each; they must divide its heads."
    )
    kv_cache_gib: int = Field(2, ge=1, le=1024, description="Memory for the key-value cache on a CPU, in whole GiB.")
    gpu_memory_share: float = Field(0.9, gt=0, le=1, description="Share of a GPU's memory that the engine may use.")
    lora_kernels: Literal["auto", "force", "off"] = Field(
        "auto",
        description="On a CPU, compute adapters with our kernels (auto), with ours on any vLLM (force), or vLLM's (off).",
    )
    max_restarts: int = Field(
        5, ge=0, le=1000, description="Restarts of a dead engine in ten minutes; one more, and /healthz says so."
    )
    max_stall_s: float = Field(
        120.0, gt=0, le=86_400, description="An engine that has work and makes no step for so long is restarted."
    )
    prefix_cache: bool = Field(True, description="Reuse the keys and values of prompts with the same beginning.")

    # Who goes next
    max_waiting: int = Field(256, ge=0, le=100_000, description="Requests that may wait for a place; then UNAVAILABLE.")
    max_waiting_per_tenant: int | None = Field(
        None, ge=0, le=100_000, description="How many of them may be one tenant's; then RESOURCE_EXHAUSTED."
    )
    max_wait_s: float = Field(120.0, gt=0, le=86_400, description="Longest wait for a place; then UNAVAILABLE.")
    max_wait_per_tenant_s: float | None = Field(
        None, gt=0, le=86_400, description="The same as a tenant's quota, if shorter; then RESOURCE_EXHAUSTED."
    )
    max_adapter_wait_s: float = Field(
        2.0, gt=0, le=3600, description="Wait after which an adapter is given the next slot that can be freed."
    )
    max_shadows: int = Field(
        4, ge=0, le=1024, description="Copies for shadow versions at once, in room that nothing needs; 0 makes none."
    )
    tenant_weights: str = Field(
        "", description="Shares of tenants that count for more or less than 1, such as gold=4,batch=0.5."
    )

    # Bounds
    max_message_mib: int = Field(8, ge=1, le=512, description="Largest gRPC message received, in MiB.")
    max_adapter_mib: int = Field(1024, ge=1, le=65536, description="Largest adapter published, all files, in MiB.")
    max_publishing: int = Field(4, ge=1, le=64, description="Uploads at once; one more is UNAVAILABLE.")
    max_streams: int = Field(4096, ge=1, le=100_000, description="gRPC calls at once, waiting ones included.")
    load_timeout_s: float = Field(60.0, gt=0, le=3600, description="Longest wait for an adapter to be loaded.")
    drain_s: float = Field(30.0, ge=0, le=3600, description="How long in-flight requests may go on after SIGTERM.")
    refresh_s: float = Field(2.0, gt=0, le=3600, description="How often to look for other processes' registry changes.")

    # Logs
    log_format: Literal["auto", "console", "json"] = Field(
        "auto", description="auto: console on a terminal, else json."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level to log.")

    @field_validator("registry")
    @classmethod
    def _known_scheme(cls, value: str) -> str:
        scheme, separator, _ = value.partition("://")
        if separator and scheme not in ("s3", "gs", "az", "memory", "file"):
            raise ValueError(f"unknown scheme {scheme!r}: use a folder, s3://, gs://, az:// or memory://")
        return value

    @field_validator("tenant_weights")
    @classmethod
    def _readable_weights(cls, value: str) -> str:
        parse_weights(value)
        return value

    @model_validator(mode="after")
    def _loopback_unless_allowed(self) -> Settings:
        if not self.allow_remote and not _is_loopback(self.host):
            raise ValueError(f"host {self.host} is reachable from outside; add --allow-remote if that is meant")
        return self

    @model_validator(mode="after")
    def _rank_fits_engine(self) -> Settings:
        if self.engine == "vllm" and self.max_rank not in VLLM_RANKS:
            raise ValueError(f"max_rank must be one of {', '.join(map(str, VLLM_RANKS))}")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags beat the environment; the YAML file is merged below both by `load_settings`."""
        return init_settings, env_settings


class RouterSettings(BaseSettings):
    """A router's settings. Frozen, as the server's."""

    model_config = SettingsConfigDict(env_prefix="LORAPLEX_ROUTER_", frozen=True, extra="forbid")

    # Where the replicas are
    replicas: str = Field("", description="Their gRPC addresses, such as 10.0.0.1:50051,10.0.0.2:50051.")
    fleet: Path | None = Field(
        None, description="Or a YAML file, `replicas: [host:port, ...]`, followed as it changes."
    )
    name: str = Field("", max_length=64, description="The fleet's name; servers that say another --fleet are left out.")
    poll_s: float = Field(0.25, gt=0, le=60, description="How often to ask each replica how it is.")
    give_up_s: float = Field(
        30.0, ge=0, le=3600, description="How long a request that fails on every replica is tried again."
    )

    # Where to listen
    host: str = Field("127.0.0.1", description="Address to listen on; loopback unless you say otherwise.")
    port: int = Field(50050, ge=0, le=65535, description="gRPC port; 0 picks a free one.")
    http_port: int = Field(
        9091, ge=0, le=65535, description="Port of /metrics, /healthz and /readyz; 0 picks a free one."
    )
    workers: int = Field(1, ge=1, le=64, description="Processes that share the gRPC port; a core each.")
    allow_remote: bool = Field(
        False, description="Allow a --host that other machines reach, although nothing authenticates."
    )
    reflection: bool = Field(True, description="Let gRPC tools discover the API.")

    # Bounds
    max_message_mib: int = Field(8, ge=1, le=512, description="Largest gRPC message received, in MiB.")
    max_streams: int = Field(16384, ge=1, le=1_000_000, description="gRPC calls at once in each process.")
    drain_s: float = Field(30.0, ge=0, le=3600, description="How long in-flight requests may go on after SIGTERM.")

    # Logs
    log_format: Literal["auto", "console", "json"] = Field(
        "auto", description="auto: console on a terminal, else json."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level to log.")

    @model_validator(mode="after")
    def _loopback_unless_allowed(self) -> RouterSettings:
        if not self.allow_remote and not _is_loopback(self.host):
            raise ValueError(f"host {self.host} is reachable from outside; add --allow-remote if that is meant")
        return self

    @model_validator(mode="after")
    def _workers_need_a_port(self) -> RouterSettings:
        if self.workers > 1 and not self.port:
            raise ValueError("several workers share one port, so it cannot be 0")
        return self


class ClusterSettings(BaseSettings):
    """What `loraplex cluster up` starts on Ray. `engine` and `router` hold what differs from their settings' defaults."""

    model_config = SettingsConfigDict(env_prefix="LORAPLEX_CLUSTER_", frozen=True, extra="forbid")

    # How many
    replicas: int = Field(2, ge=0, le=10_000, description="Engines; with --max-replicas, the fewest.")
    max_replicas: int | None = Field(None, ge=1, le=10_000, description="Scale up to so many when engines are busy.")
    routers: int = Field(1, ge=1, le=1000, description="Routers, one a node.")

    # What each one is
    model: Path = Field(Path(".models/smollm2-135m-instruct"), description="Folder of the base model, on every node.")
    registry: str = Field(
        ".loraplex/registry", description="Where adapters live: a folder that all nodes share, or s3://, gs://, az://."
    )
    cache: Path = Field(Path(".loraplex/cache"), description="Local folder of each node for copies of adapters.")
    engine: dict[str, Any] = Field(
        default_factory=dict, description="More settings of each server, as JSON: '{\"max_resident\": 16}'."
    )
    router: dict[str, Any] = Field(default_factory=dict, description="More settings of each router, as JSON.")
    cpus: float = Field(1.0, gt=0, le=1024, description="CPUs that Ray reserves for an engine.")
    gpus: int = Field(0, ge=0, le=64, description="GPUs for an engine; more than one is tensor parallel.")

    # Where
    name: str = Field("loraplex", pattern=r"^[a-z0-9-]{1,40}$", description="Of the fleet: two on one Ray keep apart.")
    ray: str = Field("", description="Address of a Ray cluster, or auto; empty: Ray on this machine, until Ctrl-C.")
    host: str = Field("127.0.0.1", description="Where routers listen; loopback unless you say otherwise.")
    port: int = Field(50050, ge=1, le=65535, description="The routers' gRPC port.")
    http_port: int = Field(9091, ge=0, le=65535, description="The routers' port of /metrics; 0 picks a free one.")
    allow_remote: bool = Field(False, description="Allow addresses that other machines reach.")
    object_store_mib: int = Field(
        100, ge=80, le=1_000_000, description="Ray's object store on this machine; nothing of ours passes through it."
    )

    @model_validator(mode="after")
    def _consistent(self) -> ClusterSettings:
        if self.max_replicas is not None and self.max_replicas < max(1, self.replicas):
            raise ValueError("max_replicas must not be below replicas")
        if not self.allow_remote and (self.ray not in ("", "auto") or not _is_loopback(self.host)):
            raise ValueError("replicas on other machines have to be reachable; add --allow-remote if that is meant")
        return self


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values that vLLM's LoRAConfig accepts


def parse_weights(text: str) -> dict[str, float]:
    """Tenants' weights as they are written in settings: "gold=4,batch=0.5". Raises ValueError naming the wrong part."""
    weights: dict[str, float] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, number = part.partition("=")
        if not TENANT.fullmatch(name) or name in weights:
            raise ValueError(f"{part!r} does not begin with the name of another tenant and '='")
        try:
            weights[name] = float(number)
        except ValueError:
            raise ValueError(f"{part!r} does not end with a number") from None
        if not MIN_WEIGHT <= weights[name] <= MAX_WEIGHT:
            raise ValueError(f"{part!r}: a weight is between {MIN_WEIGHT} and {MAX_WEIGHT}")
    return weights


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def load_settings(file: Path | None = None, **flags: Any) -> Settings:
    """The server's settings: see `load`."""
    return load(Settings, file, **flags)


def load(kind: type[S], file: Path | None = None, **flags: Any) -> S:
    """Merge defaults, `file` (YAML), the environment and `flags` (None: not given).

    Raises BadConfiguration naming every wrong setting, where it came from and its limits.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    from_file = _read_yaml(file) if file else {}
    if unknown := sorted(set(from_file) - set(kind.model_fields)):
        raise BadConfiguration(f"{file}: unknown setting {', '.join(unknown)}")
    try:
        beneath = {name: value for name, value in from_file.items() if name not in _set_in_environment(kind)}
        return kind(**(beneath | given))
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors()]
        raise BadConfiguration("; ".join(problems)) from error


def _set_in_environment(kind: type[BaseSettings]) -> set[str]:
    prefix = kind.model_config.get("env_prefix", "")
    return {name for name in kind.model_fields if f"{prefix}{name}".upper() in os.environ}


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text()) or {}
    except OSError as error:
        raise BadConfiguration(f"cannot read {file}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise BadConfiguration(f"{file} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise BadConfiguration(f"{file} must hold settings, one `name: value` a line")
    return content
