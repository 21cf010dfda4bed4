"""Which files an adapter folder may hold: plain safetensors and text, nothing that could run or point elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from engine.errors import InvalidAdapter
from engine.registry.manifest import FileEntry

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
RUN = "run.json"

_REQUIRED = (CONFIG, WEIGHTS)
_TEXT_ENDINGS = (".json", ".md", ".txt", ".jinja")
_PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_RESERVED = frozenset({"manifest.json"})  # the registry's own record lies beside the files
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MOST_FILES = 64
_MOST_JSON = 4 * 1024 * 1024  # bytes
_KEEP_ONLY = f"Publish a folder with {CONFIG}, {WEIGHTS} and, if you like, .json, .md, .txt and .jinja files."


def check_files(folder: Path, max_bytes: int) -> tuple[FileEntry, ...]:
    """Check the names, kinds and sizes of all files in `folder`, then digest them."""
    entries = _entries(folder)
    for entry in entries:
        _check_kind(entry)
        _check_name(entry.name)
    _check_twins(entries)
    names = {entry.name for entry in entries}
    for required in _REQUIRED:
        if required not in names:
            raise InvalidAdapter("files", required, "the file is missing", fix=_KEEP_ONLY)
    total = sum(entry.stat(follow_symlinks=False).st_size for entry in entries)
    if total > max_bytes:
        problem = f"all files together are {total} bytes, the limit is {max_bytes}"
        raise InvalidAdapter("size", "", problem, fix="Save the tensors as BF16, use a lower rank, or raise the limit.")
    return tuple(_digested(folder / name) for name in sorted(names))


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object from one of the adapter's files; raises InvalidAdapter when it is none."""
    path = folder / name
    fix = f"Write {name} again with the program that made it."
    if path.stat().st_size > _MOST_JSON:
        raise InvalidAdapter("json", name, f"the file is longer than {_MOST_JSON} bytes", fix=fix)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """Programs differ in which of two values they take."""
        fields = dict(pairs)
        if len(fields) < len(pairs):
            twice = next(key for key in fields if sum(key == other for other, _ in pairs) > 1)
            raise InvalidAdapter("json", name, f"the field {twice[:60]!r} is there twice", fix=fix)
        return fields

    try:
        # Not the bytes, which json would take in UTF-16 and UTF-32 as well: other readers do not.
        text = path.read_bytes().decode()
        from_json(text)  # stricter about nesting and Unicode: what it refuses could not be read back from a manifest
        content = json.loads(text, object_pairs_hook=once)
    except ValueError as error:
        raise InvalidAdapter("json", name, "the file is not JSON, or nested too deeply", fix=fix) from error
    if not isinstance(content, dict):
        raise InvalidAdapter("json", name, "the file is not a JSON object", fix=fix)
    return content


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            entries = list(found)
    except OSError as error:
        raise InvalidAdapter("files", folder.name, "there is no such folder", fix=_KEEP_ONLY) from error
    if len(entries) > _MOST_FILES:
        raise InvalidAdapter("files", "", f"more than {_MOST_FILES} files", fix=_KEEP_ONLY)
    return sorted(entries, key=lambda entry: entry.name)


def _check_kind(entry: os.DirEntry[str]) -> None:
    status = entry.stat(follow_symlinks=False)
    if stat.S_ISLNK(status.st_mode):
        raise InvalidAdapter("files", entry.name, "it is a symbolic link", fix="Copy the file itself into the folder.")
    if stat.S_ISDIR(status.st_mode):
        raise InvalidAdapter("files", entry.name, "it is a sub-folder", fix=_KEEP_ONLY)
    if not stat.S_ISREG(status.st_mode):
        raise InvalidAdapter("files", entry.name, "it is no ordinary file", fix=_KEEP_ONLY)
    if status.st_nlink > 1:
        # Whoever holds the other name could change the bytes after the checks.
        raise InvalidAdapter("files", entry.name, "it has another hard link", fix="Copy the file into the folder.")


def _check_name(name: str) -> None:
    lower = name.lower()
    if lower.endswith(_PICKLE_ENDINGS):
        problem = "pickle files can run code when they are loaded and are never accepted"
        raise InvalidAdapter("pickle", name, problem, fix="Save with safetensors, and remove this file.")
    if lower in _RESERVED:
        raise InvalidAdapter("files", name, "the registry writes a file of this name", fix="Remove or rename the file.")
    if name != WEIGHTS and not lower.endswith(_TEXT_ENDINGS):
        raise InvalidAdapter("files", name, "files of this kind are not accepted", fix=_KEEP_ONLY)
    if not _FILE_NAME.fullmatch(name):
        problem = "the name holds characters other than letters, digits, '.', '_' and '-'"
        raise InvalidAdapter("files", ascii(name), problem, fix="Rename the file.")


def _check_twins(entries: list[os.DirEntry[str]]) -> None:
    """Where case does not count, one of two such files would take the other's place."""
    seen: set[str] = set()
    for entry in entries:
        if entry.name.lower() in seen:
            problem = "another file has the same name but for upper and lower case"
            raise InvalidAdapter("files", entry.name, problem, fix="Remove or rename the file.")
        seen.add(entry.name.lower())


def _digested(path: Path) -> FileEntry:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileEntry(path=path.name, size_bytes=file.tell(), sha256=digest.hexdigest())
