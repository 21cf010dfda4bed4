import datetime

from engine.api.validate import validate_pb2 as _validate_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AfterTrial(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    AFTER_TRIAL_UNSPECIFIED: _ClassVar[AfterTrial]
    AFTER_TRIAL_END: _ClassVar[AfterTrial]
    AFTER_TRIAL_PROMOTE: _ClassVar[AfterTrial]
AFTER_TRIAL_UNSPECIFIED: AfterTrial
AFTER_TRIAL_END: AfterTrial
AFTER_TRIAL_PROMOTE: AfterTrial

class AdapterSummary(_message.Message):
    __slots__ = ("name", "aliases", "versions", "canary", "shadow")
    class AliasesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    CANARY_FIELD_NUMBER: _ClassVar[int]
    SHADOW_FIELD_NUMBER: _ClassVar[int]
    name: str
    aliases: _containers.ScalarMap[str, str]
    versions: _containers.RepeatedScalarFieldContainer[str]
    canary: Canary
    shadow: Shadow
    def __init__(self, name: _Optional[str] = ..., aliases: _Optional[_Mapping[str, str]] = ..., versions: _Optional[_Iterable[str]] = ..., canary: _Optional[_Union[Canary, _Mapping]] = ..., shadow: _Optional[_Union[Shadow, _Mapping]] = ...) -> None: ...

class Canary(_message.Message):
    __slots__ = ("version", "weight", "trial", "ends_at")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    TRIAL_FIELD_NUMBER: _ClassVar[int]
    ENDS_AT_FIELD_NUMBER: _ClassVar[int]
    version: str
    weight: float
    trial: CanaryTrial
    ends_at: _timestamp_pb2.Timestamp
    def __init__(self, version: _Optional[str] = ..., weight: _Optional[float] = ..., trial: _Optional[_Union[CanaryTrial, _Mapping]] = ..., ends_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class CanaryTrial(_message.Message):
    __slots__ = ("duration", "max_error_rate", "max_ttft_ratio", "then")
    DURATION_FIELD_NUMBER: _ClassVar[int]
    MAX_ERROR_RATE_FIELD_NUMBER: _ClassVar[int]
    MAX_TTFT_RATIO_FIELD_NUMBER: _ClassVar[int]
    THEN_FIELD_NUMBER: _ClassVar[int]
    duration: _duration_pb2.Duration
    max_error_rate: float
    max_ttft_ratio: float
    then: AfterTrial
    def __init__(self, duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., max_error_rate: _Optional[float] = ..., max_ttft_ratio: _Optional[float] = ..., then: _Optional[_Union[AfterTrial, str]] = ...) -> None: ...

class Shadow(_message.Message):
    __slots__ = ("version", "sample")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    version: str
    sample: float
    def __init__(self, version: _Optional[str] = ..., sample: _Optional[float] = ...) -> None: ...

class Spread(_message.Message):
    __slots__ = ("p50", "p95")
    P50_FIELD_NUMBER: _ClassVar[int]
    P95_FIELD_NUMBER: _ClassVar[int]
    p50: _duration_pb2.Duration
    p95: _duration_pb2.Duration
    def __init__(self, p50: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., p95: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class AdapterVersion(_message.Message):
    __slots__ = ("name", "version", "digest", "created_at", "publisher", "run_id", "base_name", "base_fingerprint", "rank", "alpha", "targets", "size_bytes", "files", "notes", "evaluation_json", "warnings")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    PUBLISHER_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    BASE_NAME_FIELD_NUMBER: _ClassVar[int]
    BASE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_JSON_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    digest: str
    created_at: _timestamp_pb2.Timestamp
    publisher: str
    run_id: str
    base_name: str
    base_fingerprint: str
    rank: int
    alpha: float
    targets: _containers.RepeatedScalarFieldContainer[str]
    size_bytes: int
    files: _containers.RepeatedCompositeFieldContainer[AdapterFile]
    notes: str
    evaluation_json: str
    warnings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., digest: _Optional[str] = ..., created_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., publisher: _Optional[str] = ..., run_id: _Optional[str] = ..., base_name: _Optional[str] = ..., base_fingerprint: _Optional[str] = ..., rank: _Optional[int] = ..., alpha: _Optional[float] = ..., targets: _Optional[_Iterable[str]] = ..., size_bytes: _Optional[int] = ..., files: _Optional[_Iterable[_Union[AdapterFile, _Mapping]]] = ..., notes: _Optional[str] = ..., evaluation_json: _Optional[str] = ..., warnings: _Optional[_Iterable[str]] = ...) -> None: ...

class AdapterFile(_message.Message):
    __slots__ = ("path", "size_bytes", "sha256")
    PATH_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    path: str
    size_bytes: int
    sha256: str
    def __init__(self, path: _Optional[str] = ..., size_bytes: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...

class AliasChange(_message.Message):
    __slots__ = ("sequence", "alias", "version", "created_at", "actor", "reason", "canary_weight", "canary_trial", "shadow_sample")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CANARY_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    CANARY_TRIAL_FIELD_NUMBER: _ClassVar[int]
    SHADOW_SAMPLE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    alias: str
    version: str
    created_at: _timestamp_pb2.Timestamp
    actor: str
    reason: str
    canary_weight: float
    canary_trial: CanaryTrial
    shadow_sample: float
    def __init__(self, sequence: _Optional[int] = ..., alias: _Optional[str] = ..., version: _Optional[str] = ..., created_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., actor: _Optional[str] = ..., reason: _Optional[str] = ..., canary_weight: _Optional[float] = ..., canary_trial: _Optional[_Union[CanaryTrial, _Mapping]] = ..., shadow_sample: _Optional[float] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("stage", "detail", "fraction")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    FRACTION_FIELD_NUMBER: _ClassVar[int]
    stage: str
    detail: str
    fraction: float
    def __init__(self, stage: _Optional[str] = ..., detail: _Optional[str] = ..., fraction: _Optional[float] = ...) -> None: ...

class ListAdaptersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListAdaptersResponse(_message.Message):
    __slots__ = ("adapters",)
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[AdapterSummary]
    def __init__(self, adapters: _Optional[_Iterable[_Union[AdapterSummary, _Mapping]]] = ...) -> None: ...

class GetAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetAdapterResponse(_message.Message):
    __slots__ = ("adapter", "versions", "history")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    adapter: AdapterSummary
    versions: _containers.RepeatedCompositeFieldContainer[AdapterVersion]
    history: _containers.RepeatedCompositeFieldContainer[AliasChange]
    def __init__(self, adapter: _Optional[_Union[AdapterSummary, _Mapping]] = ..., versions: _Optional[_Iterable[_Union[AdapterVersion, _Mapping]]] = ..., history: _Optional[_Iterable[_Union[AliasChange, _Mapping]]] = ...) -> None: ...

class PublishAdapterRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: PublishHeader
    chunk: FileChunk
    def __init__(self, header: _Optional[_Union[PublishHeader, _Mapping]] = ..., chunk: _Optional[_Union[FileChunk, _Mapping]] = ...) -> None: ...

class PublishHeader(_message.Message):
    __slots__ = ("name", "version", "base_fingerprint", "run_id", "publisher", "notes", "evaluation_json")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BASE_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    PUBLISHER_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_JSON_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    base_fingerprint: str
    run_id: str
    publisher: str
    notes: str
    evaluation_json: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., base_fingerprint: _Optional[str] = ..., run_id: _Optional[str] = ..., publisher: _Optional[str] = ..., notes: _Optional[str] = ..., evaluation_json: _Optional[str] = ...) -> None: ...

class FileChunk(_message.Message):
    __slots__ = ("path", "data")
    PATH_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    path: str
    data: bytes
    def __init__(self, path: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class PublishAdapterResponse(_message.Message):
    __slots__ = ("progress", "version")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    progress: Progress
    version: AdapterVersion
    def __init__(self, progress: _Optional[_Union[Progress, _Mapping]] = ..., version: _Optional[_Union[AdapterVersion, _Mapping]] = ...) -> None: ...

class SetAliasRequest(_message.Message):
    __slots__ = ("name", "alias", "version", "expected_version", "actor", "reason")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_VERSION_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    name: str
    alias: str
    version: str
    expected_version: str
    actor: str
    reason: str
    def __init__(self, name: _Optional[str] = ..., alias: _Optional[str] = ..., version: _Optional[str] = ..., expected_version: _Optional[str] = ..., actor: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class SetAliasResponse(_message.Message):
    __slots__ = ("progress", "change")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    progress: Progress
    change: AliasChange
    def __init__(self, progress: _Optional[_Union[Progress, _Mapping]] = ..., change: _Optional[_Union[AliasChange, _Mapping]] = ...) -> None: ...

class RollbackAliasRequest(_message.Message):
    __slots__ = ("name", "alias", "actor", "reason", "expected_version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    alias: str
    actor: str
    reason: str
    expected_version: str
    def __init__(self, name: _Optional[str] = ..., alias: _Optional[str] = ..., actor: _Optional[str] = ..., reason: _Optional[str] = ..., expected_version: _Optional[str] = ...) -> None: ...

class RollbackAliasResponse(_message.Message):
    __slots__ = ("progress", "change")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    progress: Progress
    change: AliasChange
    def __init__(self, progress: _Optional[_Union[Progress, _Mapping]] = ..., change: _Optional[_Union[AliasChange, _Mapping]] = ...) -> None: ...

class SetCanaryRequest(_message.Message):
    __slots__ = ("name", "version", "weight", "actor", "reason", "trial")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    TRIAL_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    weight: float
    actor: str
    reason: str
    trial: CanaryTrial
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., weight: _Optional[float] = ..., actor: _Optional[str] = ..., reason: _Optional[str] = ..., trial: _Optional[_Union[CanaryTrial, _Mapping]] = ...) -> None: ...

class SetCanaryResponse(_message.Message):
    __slots__ = ("progress", "change")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    progress: Progress
    change: AliasChange
    def __init__(self, progress: _Optional[_Union[Progress, _Mapping]] = ..., change: _Optional[_Union[AliasChange, _Mapping]] = ...) -> None: ...

class EndCanaryRequest(_message.Message):
    __slots__ = ("name", "actor", "reason")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    name: str
    actor: str
    reason: str
    def __init__(self, name: _Optional[str] = ..., actor: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class EndCanaryResponse(_message.Message):
    __slots__ = ("change",)
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    change: AliasChange
    def __init__(self, change: _Optional[_Union[AliasChange, _Mapping]] = ...) -> None: ...

class GetCanaryReportRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetCanaryReportResponse(_message.Message):
    __slots__ = ("canary", "canary_side", "current_side", "verdict")
    CANARY_FIELD_NUMBER: _ClassVar[int]
    CANARY_SIDE_FIELD_NUMBER: _ClassVar[int]
    CURRENT_SIDE_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    canary: Canary
    canary_side: SideReport
    current_side: SideReport
    verdict: str
    def __init__(self, canary: _Optional[_Union[Canary, _Mapping]] = ..., canary_side: _Optional[_Union[SideReport, _Mapping]] = ..., current_side: _Optional[_Union[SideReport, _Mapping]] = ..., verdict: _Optional[str] = ...) -> None: ...

class SideReport(_message.Message):
    __slots__ = ("requests", "failed", "time_to_first_token")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    TIME_TO_FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    requests: int
    failed: int
    time_to_first_token: Spread
    def __init__(self, requests: _Optional[int] = ..., failed: _Optional[int] = ..., time_to_first_token: _Optional[_Union[Spread, _Mapping]] = ...) -> None: ...

class SetShadowRequest(_message.Message):
    __slots__ = ("name", "version", "sample", "actor", "reason")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    sample: float
    actor: str
    reason: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., sample: _Optional[float] = ..., actor: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class SetShadowResponse(_message.Message):
    __slots__ = ("progress", "change")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    progress: Progress
    change: AliasChange
    def __init__(self, progress: _Optional[_Union[Progress, _Mapping]] = ..., change: _Optional[_Union[AliasChange, _Mapping]] = ...) -> None: ...

class EndShadowRequest(_message.Message):
    __slots__ = ("name", "actor", "reason")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    name: str
    actor: str
    reason: str
    def __init__(self, name: _Optional[str] = ..., actor: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class EndShadowResponse(_message.Message):
    __slots__ = ("change",)
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    change: AliasChange
    def __init__(self, change: _Optional[_Union[AliasChange, _Mapping]] = ...) -> None: ...

class GetShadowReportRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetShadowReportResponse(_message.Message):
    __slots__ = ("shadow", "current_version", "drawn", "compared", "equal", "asked_greedily", "dropped", "failed", "last_failure", "first_difference_p50", "first_difference_min", "current_times", "shadow_times")
    class DroppedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class FailedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    SHADOW_FIELD_NUMBER: _ClassVar[int]
    CURRENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    DRAWN_FIELD_NUMBER: _ClassVar[int]
    COMPARED_FIELD_NUMBER: _ClassVar[int]
    EQUAL_FIELD_NUMBER: _ClassVar[int]
    ASKED_GREEDILY_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    LAST_FAILURE_FIELD_NUMBER: _ClassVar[int]
    FIRST_DIFFERENCE_P50_FIELD_NUMBER: _ClassVar[int]
    FIRST_DIFFERENCE_MIN_FIELD_NUMBER: _ClassVar[int]
    CURRENT_TIMES_FIELD_NUMBER: _ClassVar[int]
    SHADOW_TIMES_FIELD_NUMBER: _ClassVar[int]
    shadow: Shadow
    current_version: str
    drawn: int
    compared: int
    equal: int
    asked_greedily: int
    dropped: _containers.ScalarMap[str, int]
    failed: _containers.ScalarMap[str, int]
    last_failure: str
    first_difference_p50: int
    first_difference_min: int
    current_times: AnswerTimes
    shadow_times: AnswerTimes
    def __init__(self, shadow: _Optional[_Union[Shadow, _Mapping]] = ..., current_version: _Optional[str] = ..., drawn: _Optional[int] = ..., compared: _Optional[int] = ..., equal: _Optional[int] = ..., asked_greedily: _Optional[int] = ..., dropped: _Optional[_Mapping[str, int]] = ..., failed: _Optional[_Mapping[str, int]] = ..., last_failure: _Optional[str] = ..., first_difference_p50: _Optional[int] = ..., first_difference_min: _Optional[int] = ..., current_times: _Optional[_Union[AnswerTimes, _Mapping]] = ..., shadow_times: _Optional[_Union[AnswerTimes, _Mapping]] = ...) -> None: ...

class AnswerTimes(_message.Message):
    __slots__ = ("time_to_first_token", "total")
    TIME_TO_FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    time_to_first_token: Spread
    total: Spread
    def __init__(self, time_to_first_token: _Optional[_Union[Spread, _Mapping]] = ..., total: _Optional[_Union[Spread, _Mapping]] = ...) -> None: ...

class RemoveAliasRequest(_message.Message):
    __slots__ = ("name", "alias", "actor", "reason")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    name: str
    alias: str
    actor: str
    reason: str
    def __init__(self, name: _Optional[str] = ..., alias: _Optional[str] = ..., actor: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class RemoveAliasResponse(_message.Message):
    __slots__ = ("change",)
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    change: AliasChange
    def __init__(self, change: _Optional[_Union[AliasChange, _Mapping]] = ...) -> None: ...

class PreloadAdapterRequest(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    def __init__(self, adapter: _Optional[str] = ...) -> None: ...

class PreloadAdapterResponse(_message.Message):
    __slots__ = ("progress", "version")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    progress: Progress
    version: AdapterVersion
    def __init__(self, progress: _Optional[_Union[Progress, _Mapping]] = ..., version: _Optional[_Union[AdapterVersion, _Mapping]] = ...) -> None: ...

class PinAdapterRequest(_message.Message):
    __slots__ = ("adapter", "pinned")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    pinned: bool
    def __init__(self, adapter: _Optional[str] = ..., pinned: _Optional[bool] = ...) -> None: ...

class PinAdapterResponse(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: AdapterVersion
    def __init__(self, version: _Optional[_Union[AdapterVersion, _Mapping]] = ...) -> None: ...

class UnloadAdapterRequest(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    def __init__(self, adapter: _Optional[str] = ...) -> None: ...

class UnloadAdapterResponse(_message.Message):
    __slots__ = ("was_resident",)
    WAS_RESIDENT_FIELD_NUMBER: _ClassVar[int]
    was_resident: bool
    def __init__(self, was_resident: _Optional[bool] = ...) -> None: ...

class DeleteVersionRequest(_message.Message):
    __slots__ = ("name", "version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class DeleteVersionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchAdaptersRequest(_message.Message):
    __slots__ = ("name", "include_engine")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_ENGINE_FIELD_NUMBER: _ClassVar[int]
    name: str
    include_engine: bool
    def __init__(self, name: _Optional[str] = ..., include_engine: _Optional[bool] = ...) -> None: ...

class WatchAdaptersResponse(_message.Message):
    __slots__ = ("name", "published", "alias_changed", "deleted_version", "loaded", "evicted", "quarantined")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    ALIAS_CHANGED_FIELD_NUMBER: _ClassVar[int]
    DELETED_VERSION_FIELD_NUMBER: _ClassVar[int]
    LOADED_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    name: str
    published: AdapterVersion
    alias_changed: AliasChange
    deleted_version: str
    loaded: EngineChange
    evicted: EngineChange
    quarantined: EngineChange
    def __init__(self, name: _Optional[str] = ..., published: _Optional[_Union[AdapterVersion, _Mapping]] = ..., alias_changed: _Optional[_Union[AliasChange, _Mapping]] = ..., deleted_version: _Optional[str] = ..., loaded: _Optional[_Union[EngineChange, _Mapping]] = ..., evicted: _Optional[_Union[EngineChange, _Mapping]] = ..., quarantined: _Optional[_Union[EngineChange, _Mapping]] = ...) -> None: ...

class EngineChange(_message.Message):
    __slots__ = ("version", "digest", "took")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOOK_FIELD_NUMBER: _ClassVar[int]
    version: str
    digest: str
    took: _duration_pb2.Duration
    def __init__(self, version: _Optional[str] = ..., digest: _Optional[str] = ..., took: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class RecordEvaluationRequest(_message.Message):
    __slots__ = ("name", "version", "record_json")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    RECORD_JSON_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    record_json: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., record_json: _Optional[str] = ...) -> None: ...

class RecordEvaluationResponse(_message.Message):
    __slots__ = ("sequence",)
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    def __init__(self, sequence: _Optional[int] = ...) -> None: ...

class ListEvaluationsRequest(_message.Message):
    __slots__ = ("name", "version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class ListEvaluationsResponse(_message.Message):
    __slots__ = ("records_json",)
    RECORDS_JSON_FIELD_NUMBER: _ClassVar[int]
    records_json: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, records_json: _Optional[_Iterable[str]] = ...) -> None: ...
