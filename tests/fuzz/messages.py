"""Random protobuf messages of any type, from its descriptor: mostly nearly right, sometimes absurd."""

from __future__ import annotations

import math
import random
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

_DEEPEST = 4
_TEXTS = (
    "", "a", "support", "support@v1", "support@canary", "Support", "@", "a@", "@v1", "..", "../../etc/passwd", "/etc/passwd",
    "a/../b", "a\x00b", "v1", "v0", "v99999999999999999999", "x" * 64, "x" * 5000, "\u017fupport", "sup\u200bport",
    "😀", "\u202eabc",
    "{", '{"type": "object"}', '{"$ref": "#"}', "(a+)+$", "[", "\\", "%s%n", "${jndi:x}", "<script>", "'; drop table",
    "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "run.json", "sha256:" + "0" * 64,
)  # fmt: skip
_EDGES = {
    FieldDescriptor.CPPTYPE_INT32: (0, 1, -1, 2, 7, 100, 2**31 - 1, -(2**31)),
    FieldDescriptor.CPPTYPE_INT64: (0, 1, -1, 2, 100, 2**63 - 1, -(2**63)),
    FieldDescriptor.CPPTYPE_UINT32: (0, 1, 2, 16, 128, 129, 4096, 2**31, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 1, 2, 16, 2**63, 2**64 - 1),
    FieldDescriptor.CPPTYPE_FLOAT: (0.0, -0.0, 1.0, 0.5, 2.0, -2.0, 1e-30, 3e38, math.nan, math.inf, -math.inf),
    FieldDescriptor.CPPTYPE_DOUBLE: (0.0, 1.0, 0.5, 1e-300, 1e308, math.nan, math.inf, -math.inf),
    FieldDescriptor.CPPTYPE_BOOL: (False, True),
}


def random_message(kind: Descriptor, dice: random.Random, names: tuple[str, ...] = ()) -> Message:
    """A message of this type; `names` are texts that mean something to the server, such as published adapters."""
    message = GetMessageClass(kind)()
    _fill(message, dice, names, 0)
    return message


def spoilt(data: bytes, dice: random.Random) -> bytes:
    """The bytes with some of them changed, left out, repeated or cut off."""
    found = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(found) + 1)
        kind = dice.randrange(4)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << dice.randrange(8)
        elif kind == 1:
            found[at:at] = dice.randbytes(dice.randint(1, 8))
        elif kind == 2:
            del found[at : at + dice.randint(1, 16)]
        else:
            found[at:at] = found[at : at + dice.randint(1, 64)]
    return bytes(found)


def _fill(message: Message, dice: random.Random, names: tuple[str, ...], depth: int) -> None:
    fields = message.DESCRIPTOR.fields
    for field in fields:
        if dice.random() < (0.35 if len(fields) > 4 else 0.8):
            _set(message, field, dice, names, depth)


def _set(message: Message, field: FieldDescriptor, dice: random.Random, names: tuple[str, ...], depth: int) -> None:
    if field.message_type and field.message_type.GetOptions().map_entry:
        key, value = field.message_type.fields_by_name["key"], field.message_type.fields_by_name["value"]
        for _ in range(_count(dice)):
            getattr(message, field.name)[_value(key, dice, names)] = _value(value, dice, names)
    elif field.message_type:
        if depth >= _DEEPEST:
            return
        for _ in range(min(_count(dice), 4) if field.is_repeated else 1):
            target = getattr(message, field.name)
            inner = target.add() if field.is_repeated else target
            inner.SetInParent()
            _fill(inner, dice, names, depth + 1)
    elif field.is_repeated:
        getattr(message, field.name).extend(_value(field, dice, names) for _ in range(_count(dice)))
    else:
        setattr(message, field.name, _value(field, dice, names))


def _count(dice: random.Random) -> int:
    return dice.choice((0, 1, 1, 2, 3, 3, 70)) if dice.random() < 0.98 else 2000


def _value(field: FieldDescriptor, dice: random.Random, names: tuple[str, ...]) -> Any:
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        return dice.choice([*(value.number for value in field.enum_type.values), 99])
    if field.type == FieldDescriptor.TYPE_BYTES:
        return dice.randbytes(dice.choice((0, 1, 8, 200)))
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        if names and dice.random() < 0.5:
            return dice.choice(names)
        if dice.random() < 0.1:
            return "".join(chr(dice.choice((dice.randrange(32, 127), dice.randrange(0xD7FF)))) for _ in range(20))
        return dice.choice(_TEXTS)
    return dice.choice(_EDGES[field.cpp_type])
