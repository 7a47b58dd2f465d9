"""Reads uploads off a stream: a training's pictures, an adapter's file."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from atelier.v1 import adapter_pb2, training_pb2
from atelier_server.config import Limits
from atelier_server.errors import AtelierError, InvalidRequest, UploadIncomplete, Violation
from atelier_server.jobs.uploads import PictureUpload
from atelier_server.rpc.codec.checks import shown
from atelier_server.rpc.pictures import PictureCheck
from atelier_server.rpc.remarks import Received

_CAPTION_CHARACTERS = 10_000
_PATIENCE_SECONDS = 2.0
_CANCEL_SECONDS = 0.5


class PictureReader:
    """One upload of `expected` pictures into `upload`."""

    def __init__(self, upload: PictureUpload, expected: int, limits: Limits, check: PictureCheck) -> None:
        self._upload = upload
        self._expected = expected
        self._limits = limits
        self._check = check
        self._violations: list[Violation] = []
        self._first: training_pb2.TrainRequest.ImageChunk | None = None
        self._data = bytearray()
        self._count = 0
        self._names: dict[int, str] = {}  # of those kept, by their number
        self.received: list[Received] = []

    async def read(self, stream: AsyncIterator[training_pb2.TrainRequest], *, optional: bool = False) -> None:
        """Until the client half-closes. `optional`: no picture at all is fine too.

        Raises InvalidRequest at once for a broken order, at the end for pictures that are no pictures,
        all of them at once; UploadIncomplete if the stream ends early.
        """
        async for message in stream:
            if message.WhichOneof("payload") != "image":
                raise _invalid("image", "after `start` come only pictures")
            await self._chunk(message.image)
        if self._first is not None:
            raise _incomplete(
                self._first.index, f"has {len(self._data)} of {self._first.size_bytes} bytes at the end"
            )
        if self._count < self._expected and not (optional and self._count == 0):
            raise _incomplete(
                self._count, f"the stream ended after {self._count} of {self._expected} pictures"
            )
        if self._violations:
            raise InvalidRequest.of(self._violations)

    async def _chunk(self, chunk: training_pb2.TrainRequest.ImageChunk) -> None:
        field = f"images[{chunk.index}]"
        if self._first is None:
            self._begin(field, chunk)
        elif chunk.index != self._first.index:
            size, had = self._first.size_bytes, len(self._data)
            raise _invalid(field, f"begins when images[{self._first.index}] has {had} of {size} bytes")
        self._data += chunk.data
        first = self._first
        if first is None:
            return
        if len(self._data) > first.size_bytes:
            raise _invalid(field, f"is longer than the {first.size_bytes} bytes it was declared with")
        if len(self._data) == first.size_bytes:
            await self._finish(field, first)

    def _begin(self, field: str, chunk: training_pb2.TrainRequest.ImageChunk) -> None:
        most = self._limits.max_image_bytes
        if chunk.index != self._count:
            raise _invalid(field, f"comes where images[{self._count}] was due")
        if self._count >= self._expected:
            raise _invalid(field, f"is more than the recipe's num_images = {self._expected}")
        if not 1 <= chunk.size_bytes <= most:
            raise _invalid(
                f"{field}.size_bytes",
                f"{shown(chunk.filename)}: {chunk.size_bytes} is not between 1 and {most}",
            )
        self._first = chunk

    async def _finish(self, field: str, first: training_pb2.TrainRequest.ImageChunk) -> None:
        data = bytes(self._data)
        self._first, self._data, self._count = None, bytearray(), self._count + 1
        verdict = await self._check.check(data)
        if verdict.problem:
            self._violations.append(Violation(field, f"{shown(first.filename)} {verdict.problem}"))
        if len(first.caption) > _CAPTION_CHARACTERS:
            self._violations.append(
                Violation(
                    f"{field}.caption",
                    f"{shown(first.filename)}: {len(first.caption)} characters are more than "
                    f"{_CAPTION_CHARACTERS}",
                )
            )
        if self._violations:
            return
        number = await self._upload.add(data, verdict.suffix, first.caption)
        twin = self._names.get(number)
        self._names.setdefault(number, first.filename)
        self.received.append(
            Received(first.filename, first.caption, verdict.width, verdict.height, verdict.transparent, twin)
        )


@asynccontextmanager
async def heard_out(stream: AsyncIterator[object]) -> AsyncIterator[None]:
    """Refuses an upload only after reading the rest of it, for a moment at most.

    A client that still writes when its call ends may see its failed write instead of our status: grpc.aio
    turns it into "INTERNAL: Internal error from Core" (about one early refusal in a hundred).
    """
    try:
        yield
    except AtelierError:
        with suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE_SECONDS):
                async for _ in stream:
                    pass
        raise


async def receive_file(
    stream: AsyncIterator[adapter_pb2.ImportAdapterRequest],
    metadata: adapter_pb2.ImportAdapterRequest.Metadata,
    path: Path,
) -> None:
    """Appends the chunks to what is in `path`: `metadata.offset` bytes.

    Raises InvalidRequest where size or digest differ.
    """
    with path.open("r+b") as file:
        digest = await asyncio.to_thread(hashlib.file_digest, file, "sha256")
        received = file.seek(0, os.SEEK_END)
        async for message in stream:
            if message.WhichOneof("payload") != "chunk":
                raise _invalid("chunk", "after `metadata` come only chunks")
            received += len(message.chunk)
            if received > metadata.size_bytes:
                raise _invalid("chunk", f"more bytes than the declared {metadata.size_bytes}")
            digest.update(message.chunk)
            await asyncio.to_thread(file.write, message.chunk)
    if received < metadata.size_bytes:
        # A client that has gone ends its stream, too; a moment later the call is cancelled.
        await asyncio.sleep(_CANCEL_SECONDS)
        raise UploadIncomplete(
            f"the stream ended after {received} of {metadata.size_bytes} bytes",
            violations=(Violation("chunk", f"{received} of {metadata.size_bytes} bytes"),),
        )
    if digest.hexdigest() != metadata.sha256:
        raise _invalid("metadata.sha256", f"the file's digest is {digest.hexdigest()}")


def _invalid(field: str, description: str) -> InvalidRequest:
    return InvalidRequest.of([Violation(field, description)])


def _incomplete(index: int, description: str) -> UploadIncomplete:
    return UploadIncomplete(description, violations=(Violation(f"images[{index}]", description),))
