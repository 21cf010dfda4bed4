"""Generate the Python messages, stubs and type stubs of every .proto file into engine/api.

python protos/generate.py            # what `make proto` runs
python protos/generate.py --check    # exit 1 if the checked-in files are not what the .proto files make
"""

from __future__ import annotations

import filecmp
import re
import sys
import tempfile
from importlib import resources
from pathlib import Path

from grpc_tools import protoc

PROTOS = Path(__file__).parent
API = PROTOS.parent / "engine" / "api"
# protoc writes absolute imports, and tells messages the same name of their module (pickle goes by it); the generated packages
# live below engine.api.
_NAMES = [
    (re.compile(r"(BuildTopDescriptorsAndMessages\(DESCRIPTOR, ')loraplex\."), r"\1engine.api.loraplex."),
    (re.compile(r"^from loraplex\.v1 import", re.M), "from engine.api.loraplex.v1 import"),
    (
        re.compile(r"^from buf\.validate import validate_pb2 as", re.M),
        "from engine.api.validate import validate_pb2 as",
    ),
    (re.compile(r"^import buf\.validate\.validate_pb2$", re.M), ""),
    (re.compile(r"^from buf\.validate import validate_pb2 as .*\n", re.M), ""),
]


def generate(target: Path) -> None:
    """Generate everything into `target`, which stands for engine/api."""
    own = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.glob("loraplex/**/*.proto"))
    include = ["-I", str(PROTOS), "-I", str(resources.files("grpc_tools") / "_proto")]
    messages = [f"--python_out={target}", f"--pyi_out={target}"]
    if protoc.main(["protoc", *include, *messages, "buf/validate/validate.proto"]) != 0:
        raise SystemExit("protoc failed on buf/validate/validate.proto")
    if protoc.main(["protoc", *include, *messages, f"--grpc_python_out={target}", *own]) != 0:
        raise SystemExit("protoc failed")
    for path in (*target.rglob("*_pb2*.py"), *target.rglob("*_pb2*.pyi")):
        text = path.read_text()
        for pattern, replacement in _NAMES:
            text = pattern.sub(replacement, text)
        path.write_text(text)
    for folder in ("loraplex", "loraplex/v1", "buf", "buf/validate"):
        (target / folder / "__init__.py").touch()


def stale(fresh: Path) -> list[str]:
    """Generated files that differ from the checked-in ones, or are missing there."""
    made = [path.relative_to(fresh) for path in sorted(fresh.rglob("*.py*")) if path.suffix in (".py", ".pyi")]
    return [str(p) for p in made if not (API / p).is_file() or not filecmp.cmp(fresh / p, API / p, shallow=False)]


def main() -> None:
    """Generate, or check."""
    if "--check" not in sys.argv[1:]:
        generate(API)
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        if old := stale(Path(folder)):
            raise SystemExit("not what the .proto files make (run `make proto`): " + ", ".join(old))


if __name__ == "__main__":
    main()
