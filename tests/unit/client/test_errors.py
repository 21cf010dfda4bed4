"""Every status becomes an error of its own, with the server's details."""

# ruff: noqa: N802 - servicers have the names of the proto's methods

from __future__ import annotations

import pickle
import sys

import grpc
import pytest
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2 as details_pb
from google.rpc import status_pb2

import engine.client as loraplex
from engine import errors as server_errors
from engine.api.loraplex.v1 import generation_pb2_grpc as services
from engine.client import AsyncClient, DeadlineExceeded, InvalidArgument, NotFound, RequestError, Unavailable


class Failing(services.GenerationServiceServicer):
    """Answers every Generate with one status."""

    def __init__(self, code: grpc.StatusCode, message: str, details: tuple = (), raw: bytes | None = None) -> None:
        packed = []
        for detail in details:
            packed.append(any_pb2.Any())
            packed[-1].Pack(detail)
        status = status_pb2.Status(code=code.value[0], message=message, details=packed)
        self.answer = (code, message, (("grpc-status-details-bin", raw or status.SerializeToString()),))

    async def Generate(self, request, context):
        await context.abort(*self.answer)


NOT_FOUND = (
    details_pb.ErrorInfo(
        reason="ADAPTER_NOT_FOUND", domain="loraplex", metadata={"fix": "Call ListAdapters.", "request_id": "r-9"}
    ),
    details_pb.ResourceInfo(resource_type="adapter", resource_name="suport"),
)


async def failure(connect, *args, **options) -> RequestError:
    """What Generate raises when the server answers so."""
    client = await connect(Failing(*args, **options), retries=0)
    with pytest.raises(RequestError) as caught:
        await client.generate(prompt="x")
    return caught.value


@pytest.mark.parametrize(
    "status", sorted({kind.status for kind in vars(server_errors).values() if hasattr(kind, "status")})
)
async def test_every_status_of_the_server_has_a_class(connect, status):
    """Each status of the server's error table arrives as the class of that name, with message and code."""
    code = grpc.StatusCode[status]
    error = await failure(connect, code, "why")
    assert type(error) is getattr(loraplex, status.title().replace("_", ""))
    assert (error.code, error.message, error.reason, str(error)) == (code, "why", status, "why")


async def test_details_are_unpacked(connect):
    """ErrorInfo, BadRequest, ResourceInfo and RetryInfo become fields of the error."""
    error = await failure(connect, grpc.StatusCode.NOT_FOUND, "no adapter 'suport'", NOT_FOUND)
    assert isinstance(error, NotFound)
    assert (error.reason, error.fix, error.request_id) == ("ADAPTER_NOT_FOUND", "Call ListAdapters.", "r-9")
    assert error.resource == "suport"
    assert str(error) == "no adapter 'suport' (Call ListAdapters.)"

    violations = [details_pb.BadRequest.FieldViolation(field="sampling.top_p", description="must be above 0")]
    bad = await failure(
        connect, grpc.StatusCode.INVALID_ARGUMENT, "bad", (details_pb.BadRequest(field_violations=violations),)
    )
    assert isinstance(bad, InvalidArgument)
    assert bad.violations == [("sampling.top_p", "must be above 0")]

    retry = details_pb.RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000))
    full = await failure(connect, grpc.StatusCode.UNAVAILABLE, "full", (retry,))
    assert isinstance(full, Unavailable)
    assert full.retry_after_s == 1.5


async def test_details_are_optional(connect, monkeypatch):
    """Without googleapis-common-protos, or with details that are no message, code and message are still there."""
    error = await failure(connect, grpc.StatusCode.NOT_FOUND, "gone", raw=b"\xff\xff")
    assert (type(error), error.message, error.reason) == (NotFound, "gone", "NOT_FOUND")

    monkeypatch.setitem(sys.modules, "google.rpc", None)
    error = await failure(connect, grpc.StatusCode.NOT_FOUND, "gone", NOT_FOUND)
    assert (type(error), error.message, error.reason, error.fix) == (NotFound, "gone", "NOT_FOUND", "")


async def test_a_code_without_a_class_is_a_plain_error(connect):
    """An unexpected code is a RequestError that still tells which one it was."""
    error = await failure(connect, grpc.StatusCode.UNIMPLEMENTED, "what?")
    assert (type(error), error.code) == (RequestError, grpc.StatusCode.UNIMPLEMENTED)


async def test_errors_can_be_pickled(connect):
    """An error keeps its fields on its way between processes."""
    error = await failure(connect, grpc.StatusCode.NOT_FOUND, "no adapter", NOT_FOUND)
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), vars(copy), str(copy)) == (type(error), vars(error), str(error))


async def test_nobody_there():
    """A server that cannot be reached is Unavailable, after the retries."""
    async with AsyncClient("127.0.0.1:1", retries=1) as client:
        with pytest.raises(Unavailable):
            await client.generate(prompt="x")


class Health(grpc.GenericRpcHandler):
    """The standard health service; it answers NOT_SERVING, then UNAVAILABLE, then SERVING."""

    def __init__(self) -> None:
        self.checks = 0

    def service(self, handler_call_details):
        assert handler_call_details.method == "/grpc.health.v1.Health/Check"
        return grpc.unary_unary_rpc_method_handler(self.check)

    async def check(self, request, context):
        self.checks += 1
        if self.checks == 2:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "starting")
        return b"\x08\x02" if self.checks < 3 else b"\x08\x01"


async def test_wait_ready(connect):
    """Waiting ends when the health service says SERVING, and only then."""
    health = Health()
    client = await connect(handlers=(health,))
    await client.wait_ready(5)
    assert health.checks == 3


async def test_wait_ready_gives_up():
    """A server that never answers is DeadlineExceeded, saying which one and what was last heard of it."""
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(DeadlineExceeded, match=r"127.0.0.1:1 was not ready within 0.3 s: no answer"):
            await client.wait_ready(0.3)
