"""What the caller has of a stream so far, and the request for the rest of it.

While all goes well a stream's messages pass as bytes, and are kept as bytes: they are read only if the replica fails, or
when they have grown to some size.
"""

from __future__ import annotations

from engine.api.loraplex.v1 import generation_pb2 as pb
from engine.errors import OtherVersion, StreamLost

_KEEP_BYTES = 64 * 1024
_URGENT = 100  # the highest priority: whoever waits for the rest of an answer has waited already


class Sent:
    """The messages of one stream that were passed on."""

    def __init__(self, request: pb.GenerateRequest) -> None:
        self._request = request
        self._kept: list[bytes] = []
        self._kept_bytes = 0
        self._token_ids: list[int] = list(request.resume.token_ids)
        self._text_length: int = request.resume.text_length
        self._adapter = pb.ResolvedAdapter()
        self._finished = False
        self.count = 0
        self.complete = False

    def add(self, data: bytes) -> None:
        """One more message was passed on."""
        self.count += 1
        self._kept.append(data)
        self._kept_bytes += len(data)
        if self._kept_bytes > _KEEP_BYTES:
            self._read()

    @property
    def finished(self) -> bool:
        """Whether the caller has all of it, and only the stream's end is missing."""
        self._read()
        return self._finished

    @property
    def tokens(self) -> int:
        """How many tokens the caller has."""
        self._read()
        return len(self._token_ids)

    @property
    def base(self) -> str:
        """The fingerprint of the base that began the answer."""
        self._read()
        return self._adapter.base_fingerprint

    def request_for_the_rest(self) -> pb.GenerateRequest:
        """The same request, of the same version, with what has been sent. Raises StreamLost when there is no such request."""
        self._read()
        if self._request.sampling.n > 1:
            raise StreamLost(len(self._token_ids), "several answers at once (n above 1) cannot be gone on with")
        rest = pb.GenerateRequest()
        rest.CopyFrom(self._request)
        rest.adapter = f"{self._adapter.name}@{self._adapter.version}" if self._adapter.name else ""
        rest.priority = _URGENT
        rest.resume.CopyFrom(
            pb.Resume(
                token_ids=self._token_ids,
                text_length=self._text_length,
                digest=self._adapter.digest,
                base_fingerprint=self._adapter.base_fingerprint,
            )
        )
        return rest

    def renumbered(self, data: bytes) -> pb.GenerateStreamResponse:
        """A message of the rest, as the caller's stream goes on with it. Raises OtherVersion if somebody else sent it."""
        message = pb.GenerateStreamResponse.FromString(data)
        if message.HasField("adapter") and message.adapter != self._adapter:
            raise OtherVersion(f"{message.adapter.name}@{message.adapter.version}")
        message.sequence = self.count
        message.ClearField("adapter")
        message.ClearField("request_id")
        return message

    def _read(self) -> None:
        for data in self._kept:
            message = pb.GenerateStreamResponse.FromString(data)
            if message.HasField("adapter"):
                self._adapter.CopyFrom(message.adapter)
            self._token_ids.extend(message.token_ids)
            self._text_length += len(message.text)
            self._finished = message.HasField("usage")
        self._kept.clear()
        self._kept_bytes = 0
