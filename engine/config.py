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
_AUDIT_LOG = Path(".loraplex/audit.jsonl")


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
        9090, ge=0, le=65535, description="Port of the console, /v1 (OpenAI), /metrics and health; 0 picks a free one."
    )
    allow_remote: bool = Field(
        False, description="Allow a --host that other machines reach without TLS, or without asking who calls."
    )
    reflection: bool = Field(True, description="Let gRPC tools discover the API.")
    reports: Path | None = Field(
        None, description="Folder with load-test reports for the console to show, such as .loraplex/loadtest."
    )
    fleet: str = Field("", max_length=64, description="The fleet that it belongs to, for routers to check.")

    # Who may call
    policy: Path | None = Field(
        None, description="File of tenants, their credentials, rights and limits; without it anybody may do anything."
    )
    audit_log: Path | None = Field(
        None, description="File for one JSON line about every change; default: .loraplex/audit.jsonl with a policy."
    )
    tls_certificate: Path | None = Field(None, description="Our certificate and its chain (PEM), for both ports.")
    tls_key: Path | None = Field(None, description="The certificate's private key (PEM).")
    tls_client_ca: Path | None = Field(
        None, description="Who signs clients' certificates (PEM): with it, every client has to show one."
    )

    # The engine
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Precision to compute in; auto: the base's, but float32 on a CPU without 16-bit instructions.",
    )
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
    engine_metrics: bool = Field(True, description="Show vLLM's own metrics beside ours at /metrics.")
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
        10.0,
        gt=0,
        le=3600,
        description="Wait after which an adapter is given the next slot that can be freed, at most.",
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

    # Logs and traces
    log_format: Literal["auto", "console", "json"] = Field(
        "auto", description="auto: console on a terminal, else json."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level to log.")
    otlp_endpoint: str = Field(
        "", description="Where to send OpenTelemetry traces (OTLP, gRPC), such as http://collector:4317; empty: none."
    )
    otlp_logs: bool = Field(False, description="Send the log to --otlp-endpoint, too.")
    trace_share: float = Field(
        1.0, ge=0, le=1, description="Share of the requests traced, of those whose caller has not decided it."
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_nul(cls, value: Any) -> Any:
        return without_nul(value)

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

    @property
    def audit_log_path(self) -> Path | None:
        """Where acts are written down; None if they are not."""
        return self.audit_log or (_AUDIT_LOG if self.policy else None)

    @property
    def unprotected(self) -> list[str]:
        """What keeps strangers away from a server that other machines reach, and is not there."""
        return _missing(self, self.policy, "--policy")

    @model_validator(mode="after")
    def _safe_to_reach(self) -> Settings:
        if self.policy and (self.tenant_weights or self.max_waiting_per_tenant is not None):
            raise ValueError("with a policy, weights and max_waiting of tenants belong there")
        _check_tls(self)
        _check_missing(self)
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
    replicas: str = Field(
        "",
        description="Their gRPC addresses, such as 10.0.0.1:50051,10.0.0.2:50051, or dns:NAME:PORT, a name that has them.",
    )
    fleet: Path | None = Field(
        None, description="Or a YAML file, `replicas: [host:port, ...]`, followed as it changes."
    )
    name: str = Field("", max_length=64, description="The fleet's name; servers that say another --fleet are left out.")
    poll_s: float = Field(0.25, gt=0, le=60, description="How often to ask each replica how it is.")
    give_up_s: float = Field(
        30.0, ge=0, le=3600, description="How long a request that fails on every replica is tried again."
    )
    coalesce: bool = Field(
        True, description="Put a stream's messages together while this process is busy, 20 ms of them at most."
    )

    # Where to listen
    host: str = Field("127.0.0.1", description="Address to listen on; loopback unless you say otherwise.")
    port: int = Field(50050, ge=0, le=65535, description="gRPC port; 0 picks a free one.")
    http_port: int = Field(
        9091, ge=0, le=65535, description="Port of /metrics, /healthz and /readyz; 0 picks a free one."
    )
    workers: int = Field(1, ge=1, le=64, description="Processes that share the gRPC port; a core each.")
    share_port: bool = Field(
        False, description="Let routers of the same --name listen here too, such as one that takes this one's place."
    )
    allow_remote: bool = Field(
        False, description="Allow a --host that other machines reach without TLS, or without asking who calls."
    )
    reflection: bool = Field(True, description="Let gRPC tools discover the API.")

    # Who may call: the replicas decide, by the credentials that are passed on to them
    tls_certificate: Path | None = Field(None, description="Our certificate and its chain (PEM), for both ports.")
    tls_key: Path | None = Field(None, description="The certificate's private key (PEM).")
    tls_client_ca: Path | None = Field(
        None, description="Who signs clients' certificates (PEM): with it, every client has to show one."
    )
    replica_tls_ca: Path | None = Field(
        None, description="Who signs the replicas' certificates (PEM): call them by TLS."
    )
    replica_tls_certificate: Path | None = Field(None, description="The certificate that we show to replicas (PEM).")
    replica_tls_key: Path | None = Field(None, description="Its private key (PEM).")
    replica_tls_name: str = Field("", max_length=253, description="Name in their certificates, if not their address.")
    replica_key_file: Path | None = Field(
        None, description="File with our own API key for replicas: a tenant with the role observe and all adapters."
    )

    # Bounds
    max_message_mib: int = Field(8, ge=1, le=512, description="Largest gRPC message received, in MiB.")
    max_streams: int = Field(16384, ge=1, le=1_000_000, description="gRPC calls at once in each process.")
    drain_s: float = Field(30.0, ge=0, le=3600, description="How long in-flight requests may go on after SIGTERM.")

    # Logs and traces
    log_format: Literal["auto", "console", "json"] = Field(
        "auto", description="auto: console on a terminal, else json."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level to log.")
    otlp_endpoint: str = Field(
        "", description="Where to send OpenTelemetry traces (OTLP, gRPC), such as http://collector:4317; empty: none."
    )
    otlp_logs: bool = Field(False, description="Send the log to --otlp-endpoint, too.")
    trace_share: float = Field(
        1.0, ge=0, le=1, description="Share of the requests traced, of those whose caller has not decided it."
    )

    @property
    def unprotected(self) -> list[str]:
        """What keeps strangers away from a router that other machines reach, and is not there."""
        return _missing(self, self.replica_key_file, "--replica-key-file")

    @model_validator(mode="after")
    def _safe_to_reach(self) -> RouterSettings:
        _check_tls(self)
        if (self.replica_tls_certificate is None) != (self.replica_tls_key is None):
            raise ValueError("replica_tls_certificate and replica_tls_key go together")
        if self.replica_tls_certificate and not self.replica_tls_ca:
            raise ValueError("replica_tls_certificate needs replica_tls_ca: nobody sees it without TLS")
        if (
            self.replica_key_file
            and not self.replica_tls_ca
            and not self.allow_remote
            and not self._replicas_are_local()
        ):
            raise ValueError("keys go to other machines by TLS only: give replica_tls_ca, or allow_remote")
        _check_missing(self)
        return self

    def _replicas_are_local(self) -> bool:
        hosts = [address.strip().rpartition(":")[0] for address in self.replicas.split(",")]
        return not self.fleet and all(map(is_loopback, hosts))

    @model_validator(mode="after")
    def _workers_need_a_port(self) -> RouterSettings:
        if self.workers > 1 and not self.port:
            raise ValueError("several workers share one port, so it cannot be 0")
        return self


class ClusterSettings(BaseSettings):
    """What `loraplex cluster up` starts on Ray. `engine` and `router` hold what differs from their settings' defaults."""

    model_config = SettingsConfigDict(env_prefix="LORAPLEX_CLUSTER_", frozen=True, extra="forbid")

    # How many
    replicas: int = Field(2, ge=1, le=10_000, description="Engines; with --max-replicas, the fewest.")
    max_replicas: int | None = Field(None, ge=1, le=10_000, description="Scale up to so many when engines are busy.")
    scale_up_after_s: float = Field(5.0, ge=0, le=3600, description="For how many seconds they have to be busy first.")
    scale_down_after_s: float = Field(
        120.0, ge=0, le=86_400, description="For how many seconds fewer have to be enough before there are fewer."
    )
    routers: int = Field(1, ge=1, le=1000, description="Routers, one a node.")

    # What each one is
    model: Path = Field(Path(".models/smollm2-135m-instruct"), description="Folder of the base model, on every node.")
    next_model: Path | None = Field(
        None,
        description="Folder of a second base, served beside it while adapters change over; then make it the --model.",
    )
    next_replicas: int = Field(1, ge=1, le=10_000, description="Engines of the second base.")
    registry: str = Field(
        ".loraplex/registry", description="Where adapters live: a folder that all nodes share, or s3://, gs://, az://."
    )
    cache: Path = Field(Path(".loraplex/cache"), description="Local folder of each node for copies of adapters.")
    engine: dict[str, Any] = Field(
        default_factory=dict, description="More settings of each server, as JSON: '{\"max_resident\": 16}'."
    )
    router: dict[str, Any] = Field(default_factory=dict, description="More settings of each router, as JSON.")
    cpus: float | None = Field(
        None,
        gt=0,
        le=1024,
        description="CPUs that Ray reserves for an engine, and on a CPU its threads; without: its share here, or 1.",
    )
    gpus: int = Field(
        0, ge=0, le=64, description="GPUs for an engine, all of one node; more than one is tensor parallel."
    )
    runtime_env: dict[str, Any] = Field(
        default_factory=dict,
        description='Ray\'s runtime environment of engines and routers, as JSON: \'{"env_vars": {"NCCL_DEBUG": "INFO"}}\'.',
    )

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

    @property
    def bases(self) -> tuple[str, ...]:
        """The models' folders, the main one first."""
        return (str(self.model), *([str(self.next_model)] if self.next_model else []))

    @property
    def engines(self) -> int:
        """Engines of all bases, the fewest if their number follows the work."""
        return self.replicas + (self.next_replicas if self.next_model else 0)

    @property
    def engine_cpus(self) -> float:
        """`cpus`; without, an equal share of this machine on a Ray of our own, and 1 on one that runs already."""
        if self.cpus is not None or self.ray:
            return self.cpus or 1.0
        most = self.engines - self.replicas + (self.max_replicas or self.replicas)
        return float(max(1, (os.cpu_count() or 1) // most))

    @model_validator(mode="after")
    def _consistent(self) -> ClusterSettings:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError("max_replicas must not be below replicas")
        if self.next_model == self.model:
            raise ValueError("next_model is the model that is served already")
        if not self.allow_remote and (self.ray not in ("", "auto") or not is_loopback(self.host)):
            raise ValueError("replicas on other machines have to be reachable; add --allow-remote if that is meant")
        return self


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values that vLLM's LoRAConfig accepts


def max_rank_for(rank: int) -> int:
    """The smallest `max_rank` of a vLLM engine that serves adapters of this rank, which is 512 at most."""
    return next(limit for limit in VLLM_RANKS if limit >= rank)


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


def _check_tls(settings: Settings | RouterSettings) -> None:
    if (settings.tls_certificate is None) != (settings.tls_key is None):
        raise ValueError("tls_certificate and tls_key go together")
    if settings.tls_client_ca and not settings.tls_certificate:
        raise ValueError("tls_client_ca needs tls_certificate and tls_key")


def _missing(settings: Settings | RouterSettings, known: Path | None, what: str) -> list[str]:
    """What keeps strangers from a host that other machines reach, and is not there; nothing on loopback."""
    if is_loopback(settings.host):
        return []
    missing = [] if settings.tls_certificate else ["--tls-certificate and --tls-key"]
    return missing + ([] if known or settings.tls_client_ca else [f"{what} or --tls-client-ca"])


def _check_missing(settings: Settings | RouterSettings) -> None:
    """Raise ValueError if other machines reach the host unprotected, and nobody allowed it."""
    if settings.unprotected and not settings.allow_remote:
        raise ValueError(
            f"host {settings.host} is reachable from outside: give {', and '.join(settings.unprotected)}; or add "
            "--allow-remote if anybody who reaches it may read what is sent and do what they like"
        )


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's own."""
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
    from_file = read_yaml(file) if file else {}
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


def without_nul(value: Any) -> Any:
    """The value of a setting. Raises ValueError for a text that no path can be made of."""
    if isinstance(value, str) and "\0" in value:
        raise ValueError("it holds a NUL character")
    return value


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises BadConfiguration when there is none."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise BadConfiguration(f"cannot read {file}: {error.strerror}") from error
    except Exception as error:  # PyYAML raises whatever a value's type does: `!!bool maybe` is a KeyError
        raise BadConfiguration(f"{file} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise BadConfiguration(f"{file} must hold keys and values, one `name: value` a line")
    return {str(key): value for key, value in content.items()}


def read_named(file: Path) -> bytes:
    """The contents of a file that a setting names. Raises BadConfiguration."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise BadConfiguration(f"{file.name} cannot be read: {error.strerror}") from error
