import datetime

from engine.api.validate import validate_pb2 as _validate_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetCallerRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetCallerResponse(_message.Message):
    __slots__ = ("identified", "tenant", "roles")
    IDENTIFIED_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    ROLES_FIELD_NUMBER: _ClassVar[int]
    identified: bool
    tenant: str
    roles: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, identified: _Optional[bool] = ..., tenant: _Optional[str] = ..., roles: _Optional[_Iterable[str]] = ...) -> None: ...

class GetEngineRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetEngineResponse(_message.Message):
    __slots__ = ("base", "limits", "resident", "load", "engine", "server_version", "fleet", "http_port", "compute_dtype")
    BASE_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    FLEET_FIELD_NUMBER: _ClassVar[int]
    HTTP_PORT_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    base: BaseModel
    limits: Limits
    resident: _containers.RepeatedCompositeFieldContainer[ResidentAdapter]
    load: Load
    engine: str
    server_version: str
    fleet: str
    http_port: int
    compute_dtype: str
    def __init__(self, base: _Optional[_Union[BaseModel, _Mapping]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., resident: _Optional[_Iterable[_Union[ResidentAdapter, _Mapping]]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., engine: _Optional[str] = ..., server_version: _Optional[str] = ..., fleet: _Optional[str] = ..., http_port: _Optional[int] = ..., compute_dtype: _Optional[str] = ...) -> None: ...

class BaseModel(_message.Message):
    __slots__ = ("name", "fingerprint", "dtype")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    fingerprint: str
    dtype: str
    def __init__(self, name: _Optional[str] = ..., fingerprint: _Optional[str] = ..., dtype: _Optional[str] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("context_length", "vocabulary_size", "max_running", "max_waiting", "max_rank", "max_resident", "max_message_bytes", "max_adapter_bytes")
    CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_FIELD_NUMBER: _ClassVar[int]
    MAX_WAITING_FIELD_NUMBER: _ClassVar[int]
    MAX_RANK_FIELD_NUMBER: _ClassVar[int]
    MAX_RESIDENT_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_ADAPTER_BYTES_FIELD_NUMBER: _ClassVar[int]
    context_length: int
    vocabulary_size: int
    max_running: int
    max_waiting: int
    max_rank: int
    max_resident: int
    max_message_bytes: int
    max_adapter_bytes: int
    def __init__(self, context_length: _Optional[int] = ..., vocabulary_size: _Optional[int] = ..., max_running: _Optional[int] = ..., max_waiting: _Optional[int] = ..., max_rank: _Optional[int] = ..., max_resident: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., max_adapter_bytes: _Optional[int] = ...) -> None: ...

class ResidentAdapter(_message.Message):
    __slots__ = ("name", "version", "digest", "pinned", "in_use", "idle", "rank")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    IN_USE_FIELD_NUMBER: _ClassVar[int]
    IDLE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    digest: str
    pinned: bool
    in_use: int
    idle: _duration_pb2.Duration
    rank: int
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., digest: _Optional[str] = ..., pinned: _Optional[bool] = ..., in_use: _Optional[int] = ..., idle: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., rank: _Optional[int] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("running", "waiting", "kv_cache_usage", "generated_tokens", "draining", "waiting_tokens", "waiting_adapters", "restarting", "dead")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_USAGE_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    WAITING_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    RESTARTING_FIELD_NUMBER: _ClassVar[int]
    DEAD_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    kv_cache_usage: float
    generated_tokens: int
    draining: bool
    waiting_tokens: int
    waiting_adapters: int
    restarting: bool
    dead: bool
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., kv_cache_usage: _Optional[float] = ..., generated_tokens: _Optional[int] = ..., draining: _Optional[bool] = ..., waiting_tokens: _Optional[int] = ..., waiting_adapters: _Optional[int] = ..., restarting: _Optional[bool] = ..., dead: _Optional[bool] = ...) -> None: ...

class GetActivityRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetActivityResponse(_message.Message):
    __slots__ = ("uptime", "ready", "generated_tokens", "adapters", "tenants", "events")
    UPTIME_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    TENANTS_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    uptime: _duration_pb2.Duration
    ready: bool
    generated_tokens: int
    adapters: _containers.RepeatedCompositeFieldContainer[AdapterActivity]
    tenants: _containers.RepeatedCompositeFieldContainer[TenantActivity]
    events: _containers.RepeatedCompositeFieldContainer[ActivityEvent]
    def __init__(self, uptime: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., ready: _Optional[bool] = ..., generated_tokens: _Optional[int] = ..., adapters: _Optional[_Iterable[_Union[AdapterActivity, _Mapping]]] = ..., tenants: _Optional[_Iterable[_Union[TenantActivity, _Mapping]]] = ..., events: _Optional[_Iterable[_Union[ActivityEvent, _Mapping]]] = ...) -> None: ...

class AdapterActivity(_message.Message):
    __slots__ = ("name", "version", "waiting", "running", "requests", "failed", "generated_tokens", "queue_p50", "ttft_p50", "ttft_p95")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_P50_FIELD_NUMBER: _ClassVar[int]
    TTFT_P50_FIELD_NUMBER: _ClassVar[int]
    TTFT_P95_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    waiting: int
    running: int
    requests: int
    failed: int
    generated_tokens: int
    queue_p50: _duration_pb2.Duration
    ttft_p50: _duration_pb2.Duration
    ttft_p95: _duration_pb2.Duration
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., waiting: _Optional[int] = ..., running: _Optional[int] = ..., requests: _Optional[int] = ..., failed: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., queue_p50: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., ttft_p50: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., ttft_p95: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class TenantActivity(_message.Message):
    __slots__ = ("name", "weight", "waiting", "running", "requests", "failed", "service")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    name: str
    weight: float
    waiting: int
    running: int
    requests: int
    failed: int
    service: int
    def __init__(self, name: _Optional[str] = ..., weight: _Optional[float] = ..., waiting: _Optional[int] = ..., running: _Optional[int] = ..., requests: _Optional[int] = ..., failed: _Optional[int] = ..., service: _Optional[int] = ...) -> None: ...

class ActivityEvent(_message.Message):
    __slots__ = ("ago", "kind", "text")
    AGO_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    ago: _duration_pb2.Duration
    kind: str
    text: str
    def __init__(self, ago: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., kind: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...
