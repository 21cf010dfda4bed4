"""Every error that a caller can see.

    LoraplexError
    ├── caller must change the request
    │   ├── InvalidRequest            INVALID_ARGUMENT     a field is wrong: which one, and its limit
    │   ├── InvalidAdapter            INVALID_ARGUMENT     an uploaded adapter fails a check: which one, and where
    │   ├── AdapterNotFound           NOT_FOUND            no such adapter, version or alias; the nearest names
    │   ├── VersionExists             ALREADY_EXISTS       this version is published, with other bytes
    │   ├── AliasMoved                ABORTED              somebody else moved the alias first
    │   ├── Overtaken                 ABORTED              an alias moved while the version was being loaded
    │   ├── WrongBase                 FAILED_PRECONDITION  trained on another base model
    │   ├── OtherVersion              FAILED_PRECONDITION  it cannot go on with an answer that another version began
    │   ├── Unsigned                  FAILED_PRECONDITION  no signature by the key that this server requires
    │   ├── NotFinite                 FAILED_PRECONDITION  the adapter makes numbers that are none (NaN) of this prompt
    │   ├── Quarantined               FAILED_PRECONDITION  it did so before, and is not served any more
    │   ├── NotAllowedNow             FAILED_PRECONDITION  e.g. deleting a version that an alias names
    │   └── NotEverywhere             FAILED_PRECONDITION  some of the replicas could not do it
    ├── caller must say who it is, or ask for something else
    │   ├── Unauthenticated           UNAUTHENTICATED      no credentials, or none that are valid now
    │   └── PermissionDenied          PERMISSION_DENIED    not for this tenant: the role, or the adapter, there or not
    ├── caller may try again
    │   ├── Overloaded                UNAVAILABLE          the queue is full
    │   ├── WaitedTooLong             UNAVAILABLE          no place became free within the limit
    │   ├── DeadlineUnreachable       UNAVAILABLE          the answer would come after the caller's deadline
    │   ├── QuotaExceeded             RESOURCE_EXHAUSTED   the tenant is over one of its limits: requests, tokens, waiting
    │   ├── Draining                  UNAVAILABLE          the server is shutting down
    │   ├── NotReady                  UNAVAILABLE          the model is still loading
    │   ├── EngineDied                UNAVAILABLE          the engine died in the middle of it
    │   ├── AdapterLost               UNAVAILABLE          the adapter did not survive the engine's restart
    │   ├── NoReplica                 UNAVAILABLE          no replica of the base is there just now
    │   ├── StreamLost                UNAVAILABLE          a replica failed, and its answer cannot be gone on with
    │   ├── ReplicaLost               ABORTED              a replica failed in the middle of a change: look whether it was made
    │   └── RegistryUnavailable       UNAVAILABLE          the store cannot be reached, is full or read-only
    ├── the recipe, the data or the suite must change (the command line's train, eval and merge)
    │   ├── InvalidRecipe             INVALID_ARGUMENT     a key of a training recipe is wrong
    │   ├── InvalidRows               INVALID_ARGUMENT     rows of a file are wrong: which ones, and why
    │   ├── InvalidRequirement        INVALID_ARGUMENT     a requirement expression cannot be read
    │   ├── RequirementNotMet         FAILED_PRECONDITION  a version's scores are below what was required
    │   ├── NoSpace                   FAILED_PRECONDITION  the disk has no room for what is to be written
    │   ├── TrainingFailed            FAILED_PRECONDITION  a run ended without an adapter
    │   └── MergeRefused              FAILED_PRECONDITION  the merge would lose the adapter
    └── operator must act
        ├── BaseModelNotFound         NOT_FOUND            no model in the configured folder
        ├── BaseModelIncomplete       FAILED_PRECONDITION  the model folder lacks files or they are damaged
        ├── Stalled                   ABORTED              the caller began to send and then sent nothing
        ├── AddressInUse              FAILED_PRECONDITION  another process has the port
        ├── BadConfiguration          INVALID_ARGUMENT     a setting is wrong
        ├── NotEnoughResources        FAILED_PRECONDITION  the Ray cluster is too small
        ├── NoCluster                 NOT_FOUND            there is no fleet of this name
        ├── CorruptVersion            DATA_LOSS            stored bytes do not match their digest
        └── InternalError             INTERNAL             a bug of ours; details are in the server's log only

Each class fixes the gRPC status (by name, so that this module imports nothing), a stable `reason` for programs, and `fix`: what
to do about it, in a sentence. DEADLINE_EXCEEDED, CANCELLED and, for a message over the size limit, RESOURCE_EXHAUSTED are
gRPC's own answers. Messages never hold paths outside the caller's own upload, secrets or Python text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar


class LoraplexError(Exception):
    """Base of all; `status` is a gRPC status name, `reason` a stable code, `fix` what to do about it."""

    status: ClassVar[str] = "INTERNAL"
    reason: ClassVar[str] = "INTERNAL"
    fix: str = ""

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        if fix is not None:
            self.fix = fix

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process gets it as it is: an `__init__` of a subclass takes other things than the message."""
        return Exception.__new__, (type(self), *self.args), self.__dict__


class InvalidRequest(LoraplexError):
    """A field of the request is wrong. `violations` holds (field path, what is wrong with it) pairs."""

    status = "INVALID_ARGUMENT"
    reason = "INVALID_REQUEST"
    fix = "Correct the named field."

    def __init__(self, field: str, problem: str, *more: tuple[str, str]) -> None:
        self.violations = [(field, problem), *more]
        super().__init__("; ".join(f"{name}: {what}" if name else what for name, what in self.violations))


class InvalidAdapter(LoraplexError):
    """An adapter fails a publication check. `check` names the check, `where` the config field, file or tensor."""

    status = "INVALID_ARGUMENT"
    reason = "INVALID_ADAPTER"

    def __init__(self, check: str, where: str, problem: str, *, fix: str) -> None:
        super().__init__(f"{where}: {problem}" if where else problem, fix=fix)
        self.check = check
        self.where = where


class AdapterNotFound(LoraplexError):
    """No adapter, version or alias of this name; `nearest` lists names that do exist, closest first."""

    status = "NOT_FOUND"
    reason = "ADAPTER_NOT_FOUND"
    fix = "List the adapters (ListAdapters, `loraplex adapters list`) to see what is published."

    def __init__(self, ref: str, nearest: list[str], kind: str = "adapter") -> None:
        hint = f"; did you mean {', '.join(nearest)}?" if nearest else ""
        super().__init__(f"no {kind} {ref!r}{hint}")
        self.ref = ref
        self.nearest = nearest
        self.kind = kind

    def only(self, visible: Callable[[str], bool]) -> AdapterNotFound:
        """The same error for somebody who may not know of every adapter."""
        nearest = [ref for ref in self.nearest if visible(ref.partition("@")[0])]
        return AdapterNotFound(self.ref, nearest, self.kind)


class VersionExists(LoraplexError):
    """The version is published already, with other bytes; versions are immutable."""

    status = "ALREADY_EXISTS"
    reason = "VERSION_EXISTS"
    fix = "Publish without naming a version to get the next free one."

    def __init__(self, ref: str) -> None:
        super().__init__(f"{ref} is already published and versions never change")
        self.ref = ref


class AliasMoved(LoraplexError):
    """The alias does not name the version that the caller expected."""

    status = "ABORTED"
    reason = "ALIAS_MOVED"
    fix = "Look at the alias again, then decide."

    def __init__(self, alias: str, expected: str, actual: str) -> None:
        super().__init__(f"{alias} names {actual or 'no version'}, not {expected}")


class Overtaken(LoraplexError):
    """What the change was based on has changed since: another move of the adapter's aliases came first."""

    status = "ABORTED"
    reason = "OVERTAKEN"
    fix = AliasMoved.fix

    def __init__(self, alias: str, version: str) -> None:
        super().__init__(f"{alias} was set to {version} meanwhile")


class WrongBase(LoraplexError):
    """The adapter was trained on another base model (precision included)."""

    status = "FAILED_PRECONDITION"
    reason = "WRONG_BASE"
    fix = "Train the adapter again on this base, or serve it from an engine with its own base."

    def __init__(self, ref: str, trained_on: str, served: str) -> None:
        super().__init__(f"{ref} was trained on base {trained_on}, this engine serves base {served}")
        self.ref = ref
        self.trained_on = trained_on
        self.served = served


class OtherVersion(LoraplexError):
    """An answer is to be resumed that another version, or another base, began."""

    status = "FAILED_PRECONDITION"
    reason = "OTHER_VERSION"
    fix = "Name the version that began the answer, on a server of the same base; or ask again from the start."

    def __init__(self, ref: str) -> None:
        super().__init__(f"{ref} did not begin this answer, so it cannot go on with it")
        self.ref = ref


class Unsigned(LoraplexError):
    """The version has no valid signature by the key that this server requires."""

    status = "FAILED_PRECONDITION"
    reason = "UNSIGNED"
    fix = "Publish it signed (loraplex adapters publish --sign KEY.pem) with the private key that belongs to this server's."

    def __init__(self, what: str, problem: str) -> None:
        super().__init__(f"{what} is refused: {problem}")


class NotFinite(LoraplexError):
    """What the model computed for this request is not finite: the answer would be noise."""

    status = "FAILED_PRECONDITION"
    reason = "NOT_FINITE"
    fix = "Roll the alias back to another version; train this one again with a smaller learning rate or alpha."

    def __init__(self, ref: str) -> None:
        super().__init__(f"the answer of {ref} is not a number (NaN), so it was ended")
        self.ref = ref


class Quarantined(LoraplexError):
    """The version gave an answer that was not finite, and gets no requests until the server is started again."""

    status = "FAILED_PRECONDITION"
    reason = "QUARANTINED"
    fix = NotFinite.fix

    def __init__(self, ref: str) -> None:
        super().__init__(f"{ref} is in quarantine: an answer of it was not a number (NaN)")
        self.ref = ref


class NotAllowedNow(LoraplexError):
    """The state of the registry or the engine forbids it."""

    status = "FAILED_PRECONDITION"
    reason = "NOT_ALLOWED_NOW"


class NotEverywhere(LoraplexError):
    """Some replicas could not do what all were asked to. `failures` says why, by address."""

    status = "FAILED_PRECONDITION"
    reason = "NOT_EVERYWHERE"
    fix = "See to the named replicas, or drain them, then ask again: it does no harm where it is done already."

    def __init__(self, what: str, done: int, failures: dict[str, str], outcome: str, *, fix: str | None = None) -> None:
        told = "; ".join(f"{address}: {problem}" for address, problem in sorted(failures.items()))
        super().__init__(f"{what}: done on {done} of {done + len(failures)} replicas, {outcome} ({told})", fix=fix)
        self.failures = failures


class Unauthenticated(LoraplexError):
    """The call shows no credentials, or none that are valid now. The message never holds any part of them."""

    status = "UNAUTHENTICATED"
    reason = "UNAUTHENTICATED"
    fix = (
        "Send an API key or a token as `authorization: Bearer ...` (LORAPLEX_API_KEY, or --api-key-file), "
        "or a client certificate; whoever runs the server gives them out."
    )

    def __init__(self, problem: str) -> None:
        super().__init__(f"the caller is not known: {problem}")


class PermissionDenied(LoraplexError):
    """The tenant may not do this. Of an adapter the message is the same whether or not it exists."""

    status = "PERMISSION_DENIED"
    reason = "PERMISSION_DENIED"
    fix = "Ask whoever runs the server to allow it in the policy, or use another tenant's credentials."

    def __init__(self, tenant: str, what: str) -> None:
        super().__init__(f"tenant {tenant!r} may not {what}")
        self.tenant = tenant


class Unavailable(LoraplexError):
    """Base of what may be tried again unchanged, after `retry_after_s` seconds."""

    status = "UNAVAILABLE"
    retry_after_s: float = 1.0


class Overloaded(Unavailable):
    """The queue is full."""

    reason = "OVERLOADED"
    fix = "Try again later, or add engines."

    def __init__(self, waiting: int, what: str = "requests are waiting", retry_after_s: float = 1.0) -> None:
        super().__init__(f"the server is full: {waiting} {what} already")
        self.retry_after_s = retry_after_s


class WaitedTooLong(Unavailable):
    """No place became free within the server's limit."""

    reason = "WAITED_TOO_LONG"
    fix = "Try again later, or add engines."

    def __init__(self, waited_s: float, retry_after_s: float) -> None:
        super().__init__(f"the server is full: no place became free in {waited_s:.0f} s")
        self.retry_after_s = retry_after_s


class DeadlineUnreachable(Unavailable):
    """By the pace of late, the answer would come after the caller's deadline."""

    reason = "DEADLINE_UNREACHABLE"
    fix = "Allow more time, ask for fewer tokens, or try again when the server is less busy."

    def __init__(self, retry_after_s: float) -> None:
        super().__init__("the server is too busy to answer before the call's deadline")
        self.retry_after_s = retry_after_s


class QuotaExceeded(LoraplexError):
    """The tenant is over one of its limits, or others need the room that its waiting requests take."""

    status = "RESOURCE_EXHAUSTED"
    reason = "QUOTA_EXCEEDED"
    fix = "Send fewer requests at once, and try again later."

    def __init__(self, tenant: str, problem: str, retry_after_s: float) -> None:
        super().__init__(f"tenant {tenant!r} {problem}")
        self.tenant = tenant
        self.retry_after_s = retry_after_s


class Stalled(LoraplexError):
    """A caller began to send and then sent nothing more."""

    status = "ABORTED"
    reason = "STALLED"
    fix = "Send it again, over a connection that is fast enough."

    def __init__(self, after_s: float) -> None:
        super().__init__(f"the next message did not come within {after_s:.0f} s")


class Draining(Unavailable):
    """The server is shutting down: in-flight requests finish, new ones are refused."""

    reason = "DRAINING"
    fix = "Try another replica, or try again."

    def __init__(self) -> None:
        super().__init__("the server is shutting down and takes no new requests")


class NotReady(Unavailable):
    """The model is still loading."""

    reason = "NOT_READY"
    fix = "Wait until the health service says SERVING."
    retry_after_s = 5.0

    def __init__(self) -> None:
        super().__init__("the model is still loading")


class EngineDied(Unavailable):
    """The engine is gone. `tokens_sent` is how many tokens of this answer the caller has.

    If several `replicas` have died in turn, each with this request, no other one is tried: it may be what they died of.
    """

    reason = "ENGINE_DIED"
    fix = "Try again, here or on another replica: health is NOT_SERVING until the engine is back."
    retry_after_s = 5.0

    def __init__(self, tokens_sent: int = 0, replicas: int = 1) -> None:
        gone = "the engine has stopped"
        if replicas > 1:
            gone = f"{replicas} replicas died in turn under this request, which may be the cause"
            self.fix = "Change the request; if the replicas' logs name another cause, try again when they are back."
            self.retry_after_s = 30.0  # as long as an engine takes to start, so that who tries again finds all of them
        super().__init__(f"{gone}; {tokens_sent} tokens of this answer were sent")
        self.tokens_sent = tokens_sent


class AdapterLost(Unavailable):
    """The engine was restarted, and the adapter could not be loaded again from the copy that it had."""

    reason = "ADAPTER_LOST"
    fix = "Try again: the adapter is fetched from the registry anew."

    def __init__(self, ref: str) -> None:
        super().__init__(f"{ref} did not survive a restart of the engine")


class NoReplica(Unavailable):
    """No replica can answer: none is ready, or none of the base that is asked for."""

    reason = "NO_REPLICA"
    fix = "Wait for a replica to come up; `loraplex cluster status` says what each one does."
    retry_after_s = 5.0

    def __init__(self, base: str = "") -> None:
        super().__init__(f"no replica of base {base} is ready" if base else "no replica is ready")


class StreamLost(Unavailable):
    """The replica failed in the middle of an answer, or of a watch, that no other one can go on with."""

    reason = "STREAM_LOST"
    fix = "Ask again from the start."

    def __init__(self, tokens_sent: int, why: str) -> None:
        after = f" after {tokens_sent} tokens" if tokens_sent else ""
        super().__init__(f"the replica failed{after}, and {why}")
        self.tokens_sent = tokens_sent


class ReplicaLost(LoraplexError):
    """The replica that was asked to change something failed before it said that it had, so nobody knows yet."""

    status = "ABORTED"
    reason = "REPLICA_LOST"
    fix = "Look whether it has happened (GetAdapter, `loraplex adapters show`), and ask again if it has not."

    def __init__(self, what: str) -> None:
        super().__init__(f"the replica failed during {what}, which may have happened or not")


class RegistryUnavailable(Unavailable):
    """The registry's store cannot be reached, is full or is read-only. Adapters that are loaded are served on."""

    reason = "REGISTRY_UNAVAILABLE"
    fix = "Check the registry's storage: reachable, writable, not full."

    def __init__(self, doing: str, why: str) -> None:
        super().__init__(f"the registry failed while {doing}: {why}")


class InvalidRecipe(LoraplexError):
    """A key of a training recipe is wrong; `key` is its dotted path."""

    status = "INVALID_ARGUMENT"
    reason = "INVALID_RECIPE"
    fix = "Correct the key; `loraplex train --init` writes a recipe with every key explained."

    def __init__(self, key: str, problem: str, *, fix: str | None = None) -> None:
        super().__init__(f"{key}: {problem}" if key else problem, fix=fix)
        self.key = key


class InvalidRows(LoraplexError):
    """Rows of a file of training data or of an evaluation suite are wrong; `rows` holds (line number, reason) pairs."""

    status = "INVALID_ARGUMENT"
    reason = "INVALID_ROWS"
    fix = "Correct or remove these rows."
    shown = 10

    def __init__(self, file: str, rows: list[tuple[int, str]], *, fix: str | None = None) -> None:
        lines = [f"  row {number}: {problem}" for number, problem in rows[: self.shown]]
        more = [f"  and {len(rows) - self.shown} more"] if len(rows) > self.shown else []
        count = "1 row is" if len(rows) == 1 else f"{len(rows)} rows are"
        super().__init__("\n".join([f"{file}: {count} wrong", *lines, *more]), fix=fix)
        self.rows = rows


class InvalidRequirement(LoraplexError):
    """A requirement expression cannot be read."""

    status = "INVALID_ARGUMENT"
    reason = "INVALID_REQUIREMENT"
    fix = "Join conditions with 'and': a metric, >=, >, <= or < and a number; or 'not worse than current'."

    def __init__(self, text: str, problem: str) -> None:
        super().__init__(f"the requirement {text!r} cannot be read: {problem}")


class RequirementNotMet(LoraplexError):
    """A version's scores are below what was required of it."""

    status = "FAILED_PRECONDITION"
    reason = "REQUIREMENT_NOT_MET"
    fix = "Train a better version, or require less."

    def __init__(self, ref: str, failures: list[str]) -> None:
        super().__init__(f"{ref} is not promoted: {'; '.join(failures)}")
        self.failures = failures


class NoSpace(LoraplexError):
    """The disk has no room for what is to be written."""

    status = "FAILED_PRECONDITION"
    reason = "NO_SPACE"
    fix = "Free some space, or choose a folder on another disk."

    def __init__(self, what: str, needed: str, free: str) -> None:
        super().__init__(f"{what} takes about {needed}, and {free} are free")


class TrainingFailed(LoraplexError):
    """A training run ended without an adapter."""

    status = "FAILED_PRECONDITION"
    reason = "TRAINING_FAILED"


class MergeRefused(LoraplexError):
    """The merge would lose the adapter, or cannot be computed."""

    status = "FAILED_PRECONDITION"
    reason = "MERGE_REFUSED"


class BaseModelNotFound(LoraplexError):
    """There is no model in the configured folder."""

    status = "NOT_FOUND"
    reason = "BASE_MODEL_NOT_FOUND"
    fix = "Point --model at a folder with config.json, a tokenizer and .safetensors weights."

    def __init__(self, folder: str) -> None:
        super().__init__(f"no base model in {folder}")


class BaseModelIncomplete(LoraplexError):
    """The model folder lacks files, or some are cut off."""

    status = "FAILED_PRECONDITION"
    reason = "BASE_MODEL_INCOMPLETE"
    fix = "Download or copy the model again."

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"base model {name} cannot be served: {problem}")


class AddressInUse(LoraplexError):
    """Another process listens on the port."""

    status = "FAILED_PRECONDITION"
    reason = "ADDRESS_IN_USE"
    fix = "Stop the other process, or choose another port with --port or --http-port."

    def __init__(self, address: str) -> None:
        super().__init__(f"cannot listen on {address}")


class BadConfiguration(LoraplexError):
    """A setting is wrong or contradicts another one."""

    status = "INVALID_ARGUMENT"
    reason = "BAD_CONFIGURATION"
    fix = "See `loraplex serve --help` for every setting and its limits."


class NotEnoughResources(LoraplexError):
    """The Ray cluster's nodes have too few CPUs or GPUs, or there are too few of them; says which lack what."""

    status = "FAILED_PRECONDITION"
    reason = "NOT_ENOUGH_RESOURCES"
    fix = "Add nodes or larger ones, ask for fewer replicas or routers, or for less with --cpus and --gpus."


class NoCluster(LoraplexError):
    """Nothing of ours runs on the Ray cluster, or there is none."""

    status = "NOT_FOUND"
    reason = "NO_CLUSTER"
    fix = "Start one with `loraplex cluster up`, or name it with --ray and --name."


class CorruptVersion(LoraplexError):
    """Stored bytes do not match the digest in the manifest."""

    status = "DATA_LOSS"
    reason = "CORRUPT_VERSION"
    fix = "Restore the version's files from a backup, or delete the version and publish it again."

    def __init__(self, ref: str, problem: str) -> None:
        super().__init__(f"{ref} is damaged in the registry: {problem}")
        self.ref = ref


class InternalError(LoraplexError):
    """A bug of ours: the caller learns the request id, the log has the rest."""

    reason = "INTERNAL"
    fix = "Report it with the request id."

    def __init__(self, request_id: str) -> None:
        super().__init__(f"internal error (request {request_id})")
