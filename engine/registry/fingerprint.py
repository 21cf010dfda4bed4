"""The identity of a base model: one digest over its config, its tokenizer and every weight tensor.

The digest does not change when the same weights are saved in other shards, in another folder or under another name; it
changes when one weight, the precision, the vocabulary or the chat template does. An adapter is only valid on the base whose
fingerprint it was trained on.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import BaseModelIncomplete, BaseModelNotFound

# Written by save_pretrained, but says nothing about what the model computes.
_VOLATILE_CONFIG = frozenset({"_name_or_path", "transformers_version", "use_cache", "torch_dtype", "dtype"})
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja")
_VOLATILE_TOKENIZER_CONFIG = frozenset({"name_or_path", "tokenizer_class", "processor_class", "is_local", "backend"})
_HEADER_LIMIT = 100_000_000  # bytes; the safetensors format's own cap on its JSON header


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: dtype in safetensors' spelling ("BF16"), its shape, and its bytes in `path`."""

    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    end: int


@dataclass(frozen=True)
class Base:
    """A base model on disk: its name for people, its fingerprint for the machine, and the shape of every tensor."""

    name: str
    folder: Path
    fingerprint: str
    dtype: str
    shapes: dict[str, tuple[int, ...]]


def read_safetensors_header(path: Path) -> dict[str, TensorInfo]:
    """Read the tensors' names, dtypes, shapes and places of one safetensors file; the data itself is not read.

    Raises ValueError when the file is no whole safetensors file (truncated, not JSON, offsets outside the file).
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ValueError("file is shorter than a safetensors header")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(_HEADER_LIMIT, size - 8):
            raise ValueError("header is longer than the file")
        try:
            header = json.loads(file.read(length), object_pairs_hook=_each_once)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError("header is not JSON") from error
    if not isinstance(header, dict):
        raise ValueError("header is not a JSON object")  # noqa: TRY004 - one kind of error for a damaged file
    header.pop("__metadata__", None)
    return {name: _tensor_info(name, entry, path, 8 + length, size) for name, entry in header.items()}


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("header names something twice, and readers differ in which one they take")
    return fields


def _tensor_info(name: str, entry: Any, path: Path, data_start: int, size: int) -> TensorInfo:
    try:
        start, end = (data_start + int(offset) for offset in entry["data_offsets"])
        info = TensorInfo(str(entry["dtype"]), tuple(int(n) for n in entry["shape"]), path, start, end)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"tensor {name!r} has a malformed header entry") from error
    if not data_start <= start <= end <= size:
        raise ValueError(f"tensor {name!r} lies outside the file")
    return info


def read_base(folder: Path, cache: Path | None = None) -> Base:
    """Identify the base model in `folder`.

    With `cache`, a folder, the fingerprint is remembered under the sizes and change times of the model's files, so that
    hashing (about 1 s per 300 MB and core) happens once.

    Raises BaseModelNotFound when there is no model, BaseModelIncomplete when files are missing, cut off or not safetensors.
    """
    config, tensors = check_base(folder)
    dtypes = sorted({tensor.dtype for tensor in tensors.values()})
    key = _stat_key(folder)
    digest = _cached(cache, key) or _remember(cache, key, _fingerprint(folder, config, tensors))
    return Base(
        name=folder.resolve().name,
        folder=folder.resolve(),
        fingerprint=digest,
        dtype="+".join(dtypes),
        shapes={name: tensor.shape for name, tensor in tensors.items()},
    )


def check_base(folder: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """The config and the tensors' places of the base model in `folder`; quick, as no weight is read. Raises as `read_base`."""
    config = _read_config(folder)
    tensors = dict(_weight_tensors(folder))
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES[:3]):
        raise BaseModelIncomplete(folder.name, "it has no tokenizer file")
    return config, tensors


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not folder.is_dir():
        raise BaseModelNotFound(str(folder))
    if not path.is_file():
        raise BaseModelIncomplete(folder.name, "it has no config.json")
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise BaseModelIncomplete(folder.name, "its config.json is not JSON") from error
    if not isinstance(config, dict):
        raise BaseModelIncomplete(folder.name, "its config.json is not an object")
    return config


def _weight_tensors(folder: Path) -> Iterator[tuple[str, TensorInfo]]:
    shards = _shard_names(folder)
    if not shards:
        raise BaseModelIncomplete(folder.name, "it has no .safetensors file (other weight formats are not served)")
    for shard in shards:
        path = folder / shard
        if not path.is_file():
            raise BaseModelIncomplete(folder.name, f"the shard {shard} is missing")
        try:
            yield from read_safetensors_header(path).items()
        except ValueError as error:
            raise BaseModelIncomplete(folder.name, f"{shard} is damaged: {error}") from error


def _shard_names(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(path.name for path in folder.glob("*.safetensors"))
    try:
        return sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise BaseModelIncomplete(folder.name, f"{index.name} is damaged") from error


def _fingerprint(folder: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> str:
    digest = hashlib.sha256()
    kept = {key: value for key, value in config.items() if key not in _VOLATILE_CONFIG}
    digest.update(_canonical(kept))
    digest.update(_tokenizer_bytes(folder))
    names = sorted(tensors)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashlib releases the GIL on large buffers
        for name, body in zip(names, pool.map(_tensor_digest, (tensors[name] for name in names)), strict=True):
            digest.update(_canonical([name, tensors[name].dtype, tensors[name].shape, body]))
    return f"sha256:{digest.hexdigest()}"


def _tensor_digest(tensor: TensorInfo) -> str:
    if tensor.start == tensor.end:
        return hashlib.sha256().hexdigest()
    with tensor.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        with memoryview(data) as view, view[tensor.start : tensor.end] as body:
            return hashlib.sha256(body).hexdigest()


def _tokenizer_bytes(folder: Path) -> bytes:
    parts: dict[str, str] = {}
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            parts[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        kept = {k: v for k, v in json.loads(settings.read_bytes()).items() if k not in _VOLATILE_TOKENIZER_CONFIG}
        parts[settings.name] = hashlib.sha256(_canonical(kept)).hexdigest()
    return _canonical(parts)


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _stat_key(folder: Path) -> str:
    facts = [
        (path.name, status.st_size, status.st_mtime_ns, status.st_ino)
        for path in sorted(folder.iterdir())
        if path.is_file() and (status := path.stat())
    ]
    return hashlib.sha256(_canonical([str(folder.resolve()), facts])).hexdigest()


def _cached(cache: Path | None, key: str) -> str | None:
    if cache is None:
        return None
    try:
        return str(json.loads((cache / f"{key}.json").read_bytes())["fingerprint"])
    except (OSError, ValueError, KeyError):
        return None


def _remember(cache: Path | None, key: str, fingerprint: str) -> str:
    if cache is not None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            (cache / f"{key}.json").write_text(json.dumps({"fingerprint": fingerprint}))
        except OSError:
            pass  # a cache that cannot be written costs a second at the next start, nothing else
    return fingerprint


__all__ = ["Base", "TensorInfo", "check_base", "read_base", "read_safetensors_header"]
