"""Write docs/api.md, the reference of every service, message and enum, from the comments of the .proto files.

python protos/reference.py            # what `make proto` runs, too
python protos/reference.py --check    # exit 1 if docs/api.md is not what the .proto files make
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet
from grpc_tools import protoc

PROTOS = Path(__file__).parent
PAGE = PROTOS.parent / "docs" / "api.md"
_HEAD = """# API reference

Made from `protos/loraplex/v1` by `make proto`. Package `loraplex.v1`; limits in `code` are checked by the server, and a
request that breaks one is refused by name. Errors: [errors](errors/index.md).
"""
# Numbers of fields within descriptor.proto, which is how comments say where they belong.
_MESSAGE, _ENUM, _SERVICE, _FIELD, _NESTED, _NESTED_ENUM, _VALUE, _METHOD = 4, 5, 6, 2, 3, 4, 2, 2
_LIMIT = re.compile(r"\(buf\.validate\.(?:field|oneof)\)([^;]*?)(?=\]|;)", re.S)


def reference() -> str:
    """The page."""
    files = [file for file in _files().file if file.package == "loraplex.v1"]
    return "\n".join([_HEAD, *(line for file in files for line in _File(file).page())]).rstrip() + "\n"


def _files() -> FileDescriptorSet:
    own = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.glob("loraplex/**/*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set"
        include = ["-I", str(PROTOS), "-I", str(resources.files("grpc_tools") / "_proto")]
        if protoc.main(["protoc", *include, "--include_source_info", f"--descriptor_set_out={out}", *own]) != 0:
            raise SystemExit("protoc failed")
        return FileDescriptorSet.FromString(out.read_bytes())


class _File:
    """One .proto file's part of the page."""

    def __init__(self, file: FileDescriptorProto) -> None:
        self._file = file
        self._source = (PROTOS / file.name).read_text().splitlines()
        self._places = {tuple(place.path): place for place in file.source_code_info.location}

    def page(self) -> Iterator[str]:
        for at, service in enumerate(self._file.service):
            yield f"\n## {service.name}\n\n{self._said(_SERVICE, at)}\n"
            for number, method in enumerate(service.method):
                yield f"\n### {service.name}.{method.name}\n"
                asked, answered = _link(method.input_type), _link(method.output_type)
                asked = f"stream of {asked}" if method.client_streaming else asked
                answered = f"stream of {answered}" if method.server_streaming else answered
                yield f"{asked} → {answered}\n\n{self._said(_SERVICE, at, _METHOD, number)}"
        for at, message in enumerate(self._file.message_type):
            yield from self._message(message, (_MESSAGE, at), message.name)
        for at, enum in enumerate(self._file.enum_type):
            yield from self._enum(enum, (_ENUM, at), enum.name)

    def _message(self, message: Any, path: tuple[int, ...], name: str) -> Iterator[str]:
        if message.options.map_entry:
            return
        yield f"\n### {name}\n\n{self._said(*path)}\n"
        if message.field:
            yield "| field | type | |\n|---|---|---|"
        for at, field in enumerate(message.field):
            where = (*path, _FIELD, at)
            limits = f" `{limit}`" if (limit := self._limits(where)) else ""
            yield f"| `{field.name}` | {_type(field, message)} | {self._said(*where)}{limits} |"
        for at, inner in enumerate(message.nested_type):
            yield from self._message(inner, (*path, _NESTED, at), f"{name}.{inner.name}")
        for at, enum in enumerate(message.enum_type):
            yield from self._enum(enum, (*path, _NESTED_ENUM, at), f"{name}.{enum.name}")

    def _enum(self, enum: Any, path: tuple[int, ...], name: str) -> Iterator[str]:
        yield f"\n### {name}\n\n{self._said(*path)}\n\n| value | |\n|---|---|"
        for at, value in enumerate(enum.value):
            yield f"| `{value.name}` | {self._said(*path, _VALUE, at)} |"

    def _said(self, *path: int) -> str:
        place = self._places.get(path)
        comment = (place.leading_comments or place.trailing_comments) if place else ""
        return " ".join(comment.split()).replace("|", "\\|").replace("<", "&lt;")

    def _limits(self, path: tuple[int, ...]) -> str:
        """The constraints as they are written in the source, on one line."""
        place = self._places.get(path)
        if not place:
            return ""
        first, last = place.span[0], place.span[2] if len(place.span) == 4 else place.span[0]
        found = _LIMIT.findall("\n".join(self._source[first : last + 1]))
        return " ".join(" ".join(limit.split()).lstrip(".= ") for limit in found).replace("|", "\\|").replace("`", "'")


def _type(field: Any, message: Any) -> str:
    name = _link(field.type_name) if field.type_name else FieldDescriptorProto.Type.Name(field.type)[5:].lower()
    entry = next((each for each in message.nested_type if field.type_name.endswith(f".{each.name}")), None)
    if entry and entry.options.map_entry:
        return f"map of {_type(entry.field[0], entry)} to {_type(entry.field[1], entry)}"
    return f"repeated {name}" if field.label == FieldDescriptorProto.LABEL_REPEATED else name


def _link(type_name: str) -> str:
    name = type_name.lstrip(".")
    if not name.startswith("loraplex.v1."):
        return f"`{name}`"
    own = name.removeprefix("loraplex.v1.")
    return f"[{own}](#{own.lower().replace('.', '')})"


def main() -> None:
    """Write, or check."""
    made = reference()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(made)
    elif not PAGE.is_file() or PAGE.read_text() != made:
        raise SystemExit("docs/api.md is not fresh: run `make proto`")


if __name__ == "__main__":
    main()
