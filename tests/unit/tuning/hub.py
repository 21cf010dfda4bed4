"""As much of the Hugging Face Hub's HTTP as its own client needs to make a repository, commit, tag and fetch."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """Repositories in memory: for each revision its files."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []

    @property
    def url(self) -> str:
        """What HF_ENDPOINT has to be."""
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub, for the time of the block."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        match [unquote(part) for part in urlsplit(self.path).path.split("/")[1:]]:
            case ["api", "repos", "create"]:
                self._create(json.loads(body))
            case ["api", "models", owner, name, "preupload", _]:
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                self._answer({"files": files})
            case ["api", "models", owner, name, "commit", revision]:
                self._commit(f"{owner}/{name}", revision, [json.loads(line) for line in body.splitlines()])
            case ["api", "models", owner, name, "tag", revision]:
                revisions, tag = self.server.repositories[f"{owner}/{name}"], json.loads(body)["tag"]
                known = tag in revisions
                revisions.setdefault(tag, dict(revisions[revision]))
                self._answer({"error": "Tag reference exists already"} if known else {}, status=409 if known else 200)
            case ["api", "validate-yaml"]:
                self._answer({"warnings": [], "errors": []})
            case _:
                self._answer({"error": "Not found"}, status=404)

    def _create(self, asked: dict[str, Any]) -> None:
        owner = asked.get("organization") or "me"
        name = f"{owner}/{asked['name']}"
        if owner != "me":
            self._answer({"error": f"you may not write to {owner}"}, status=403)
        else:
            known = name in self.server.repositories
            private = asked["visibility"] == "private" if "visibility" in asked else asked["private"]
            self.server.private.setdefault(name, private)
            self.server.repositories.setdefault(name, {"main": {".gitattributes": b"*.safetensors filter=lfs\n"}})
            self._answer({"url": f"{self.server.url}/{name}"}, status=409 if known else 200)

    def _commit(self, name: str, revision: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if line["key"] == "header":
                self.server.messages.append(line["value"]["summary"])
            elif line["key"] == "deletedFile":
                del self.server.repositories[name][revision][line["value"]["path"]]
            else:
                content = base64.b64decode(line["value"]["content"])
                self.server.repositories[name][revision][line["value"]["path"]] = content
        commit = _digest(self.server.repositories[name][revision])
        self._answer({"commitUrl": f"{self.server.url}/{name}/commit/{commit}", "commitOid": commit, "success": True})

    def do_GET(self) -> None:
        match [unquote(part) for part in urlsplit(self.path).path.split("/")[1:]]:
            case ["api", "models", owner, name] if files := self._files(owner, name, "main"):
                private = self.server.private[f"{owner}/{name}"]
                self._answer({"id": f"{owner}/{name}", "sha": _digest(files), "private": private})
            case ["api", "models", owner, name, "refs"] if self._files(owner, name, "main"):
                self._answer(self._refs(f"{owner}/{name}"))
            case ["api", "models", owner, name, "revision", revision] if files := self._files(owner, name, revision):
                siblings = [{"rfilename": path} for path in files]
                self._answer({"id": f"{owner}/{name}", "sha": _digest(files), "siblings": siblings})
            case ["api", "models", owner, name, "tree", revision] if files := self._files(owner, name, revision):
                self._answer([_entry(path, data) for path, data in files.items()])
            case [owner, name, "resolve", revision, path] if path in (files := self._files(owner, name, revision)):
                headers = {"ETag": f'"{_digest({path: files[path]})}"', "X-Repo-Commit": _digest(files)}
                self._answer(files[path], headers=headers)
            case _:
                self._answer({"error": "Not found"}, status=404)

    do_HEAD = do_GET  # noqa: N815 - the base class looks for this name

    def _refs(self, name: str) -> dict[str, Any]:
        """All but "main" are tags."""
        refs: dict[str, Any] = {"branches": [], "converts": [], "tags": []}
        for revision, files in self.server.repositories[name].items():
            kind = "heads" if revision == "main" else "tags"
            ref = {"name": revision, "ref": f"refs/{kind}/{revision}", "targetCommit": _digest(files)}
            refs["branches" if revision == "main" else "tags"].append(ref)
        return refs

    def _files(self, owner: str, name: str, revision: str) -> dict[str, bytes]:
        """Of a branch, a tag or a commit."""
        revisions = self.server.repositories.get(f"{owner}/{name}", {})
        by_commit = {_digest(files): files for files in revisions.values()}
        return revisions.get(revision) or by_commit.get(revision) or {}

    def _answer(self, content: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for header, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def _entry(path: str, data: bytes) -> dict[str, Any]:
    """A file in a listing: weights are in LFS, where git has but a pointer."""
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _git(data)}
    if not path.endswith(".safetensors"):
        return entry
    sha256 = hashlib.sha256(data).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()
    return entry | {"oid": _git(pointer), "lfs": {"oid": sha256, "size": len(data), "pointerSize": len(pointer)}}


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _digest(files: dict[str, bytes]) -> str:
    whole = hashlib.sha1(usedforsecurity=False)
    for path in sorted(files):
        whole.update(path.encode() + files[path])
    return whole.hexdigest()
