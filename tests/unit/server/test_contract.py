"""The protos, the handlers and the tests agree."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass

from engine.api.validate import validate_pb2
from engine.server.adapters import AdapterService
from engine.server.engine_info import EngineService
from engine.server.generation import GenerationService
from engine.server.grpc_server import SERVICES

HANDLERS = {kind.__name__: kind for kind in (GenerationService, AdapterService, EngineService)}
METHODS = [method for service in SERVICES for method in service.methods]
TESTS = Path(__file__).parents[2]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_rpc_has_a_handler(method: MethodDescriptor) -> None:
    """Each RPC is implemented by the servicer itself, not by the stub that says UNIMPLEMENTED."""
    handler = getattr(HANDLERS[method.containing_service.name], method.name)
    assert handler.__module__.startswith("engine.server.")


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_rpc_is_called_by_a_server_test(method: MethodDescriptor) -> None:
    """Each RPC is called by its name somewhere in the server's tests."""
    texts = [path.read_text() for path in (TESTS / "unit" / "server").glob("*.py") if path != Path(__file__)]
    assert any(re.search(rf"\.{method.name}\(", text) for text in texts)


@pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.name)
def test_messages_can_be_sent_to_other_processes(service: ServiceDescriptor) -> None:
    """Ray and multiprocessing pickle them: their classes are found where they say they are."""
    for method in service.methods:
        for kind in (method.input_type, method.output_type):
            message = GetMessageClass(kind)()
            assert pickle.loads(pickle.dumps(message)) == message


def test_no_handler_without_an_rpc() -> None:
    """Servicers have no method in CamelCase that the protos do not know."""
    known = {method.name for method in METHODS}
    for handler in HANDLERS.values():
        assert {name for name in dir(handler) if name[0].isupper()} <= known


def request_fields() -> Iterator[FieldDescriptor]:
    """Every field that a caller can set, in requests and in the messages inside them."""
    todo: list[Descriptor] = [method.input_type for method in METHODS]
    seen: set[str] = set()
    while todo:
        message = todo.pop()
        if message.full_name in seen:
            continue
        seen.add(message.full_name)
        for field in message.fields:
            yield field
            if field.message_type and not field.message_type.GetOptions().map_entry and not _is_googles(field):
                todo.append(field.message_type)


def _is_googles(field: FieldDescriptor) -> bool:
    """Whether the field is a message that cannot hold constraints of ours, such as a Duration: the field has to."""
    return field.message_type is not None and field.message_type.full_name.startswith("google.protobuf.")


def _is_exempt(field: FieldDescriptor) -> bool:
    single_message = field.message_type and not field.is_repeated and not _is_googles(field)
    return field.type == FieldDescriptor.TYPE_BOOL or bool(single_message)


@pytest.mark.parametrize("field", [f for f in request_fields() if not _is_exempt(f)], ids=lambda f: f.full_name)
def test_every_request_field_is_bounded(field: FieldDescriptor) -> None:
    """Each number, text, list and map in a request has a constraint; flags and messages need none of their own."""
    rules = field.GetOptions().Extensions[validate_pb2.field]
    assert rules.WhichOneof("type"), f"{field.full_name} has no buf.validate constraint"
    if field.is_repeated and field.message_type is None:
        assert rules.repeated.HasField("max_items")
    if field.message_type and field.message_type.GetOptions().map_entry:
        assert rules.map.HasField("max_pairs")


def test_there_are_fields_to_check() -> None:
    """The walk above finds the deep ones too."""
    names = {field.full_name for field in request_fields()}
    assert "loraplex.v1.Choice.options" in names
    assert "loraplex.v1.SamplingParams.logit_bias" in names
