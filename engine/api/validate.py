"""The one `buf/validate/validate.proto` of this process.

Two copies of it cannot be registered in one process, so an application that brings its own generated `buf.validate` package
keeps it, and ours is the fallback.
"""

try:
    from buf.validate import validate_pb2  # type: ignore[import-not-found,unused-ignore]
except ModuleNotFoundError:
    from engine.api.buf.validate import validate_pb2

__all__ = ["validate_pb2"]
