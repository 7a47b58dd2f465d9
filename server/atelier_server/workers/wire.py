"""Messages between front and worker: length-prefixed pickles of `core`'s dataclasses over a socket pair.

Pickle is safe here: both ends are our own processes on one machine and the socket has no name.
"""

from __future__ import annotations

import asyncio
import pickle
import struct
from typing import Any, BinaryIO

_HEADER = struct.Struct("!Q")


def frame(message: object) -> bytes:
    """One message as bytes, ready to be written."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _HEADER.pack(len(body)) + body


async def read_async(stream: asyncio.StreamReader) -> Any:
    """The next message. Raises EOFError when the other process has gone."""
    try:
        (size,) = _HEADER.unpack(await stream.readexactly(_HEADER.size))
        return pickle.loads(await stream.readexactly(size))
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        raise EOFError("the other process has gone") from error


def read(stream: BinaryIO) -> Any:
    """The next message. Raises EOFError when the other process has gone."""
    header = _read_exactly(stream, _HEADER.size)
    return pickle.loads(_read_exactly(stream, _HEADER.unpack(header)[0]))


def _read_exactly(stream: BinaryIO, size: int) -> bytes:
    try:
        data = stream.read(size)
    except ConnectionError as error:
        raise EOFError("the other process has gone") from error
    if len(data) < size:
        raise EOFError("the other process has gone")
    return data
