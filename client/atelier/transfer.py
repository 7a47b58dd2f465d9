"""Bytes on their way: pictures and adapter files in chunks, put together again and checked."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from atelier.errors import DataLossError
from atelier.events import Image, Picture
from atelier.records import ExportedAdapter, TrainingImage
from atelier.v1 import adapter_pb2, generation_pb2

CHUNK_BYTES = 2**20
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def chunks(data: bytes) -> Iterator[bytes]:
    """Pieces of at most 1 MiB; one empty piece for no data, so that the receiver hears of it."""
    for offset in range(0, max(len(data), 1), CHUNK_BYTES):
        yield data[offset : offset + CHUNK_BYTES]


def file_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            yield data


def digest(path: Path) -> tuple[int, str]:
    """Size in bytes and lower-case hex SHA-256 of a file."""
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def picture_bytes(source: str | Path | bytes | Picture) -> bytes:
    """The file of a picture: read from a path, or as it is."""
    if isinstance(source, str | Path):
        return Path(source).read_bytes()
    return source.data if isinstance(source, Picture) else source


def training_image(source: TrainingImage | str | Path | bytes) -> TrainingImage:
    """A picture to learn from. A path's caption is the text of STEM.txt beside it, if there is one."""
    if isinstance(source, TrainingImage):
        return source
    if isinstance(source, bytes):
        return TrainingImage(source)
    path = Path(source)
    caption = path.with_suffix(".txt")
    words = caption.read_text(encoding="utf-8").strip() if caption.is_file() else ""
    return TrainingImage(path.read_bytes(), path.name, words)


def read_folder(folder: str | Path) -> list[TrainingImage]:
    """The pictures (.png, .jpg, .jpeg, .webp) of a folder by name, captions from STEM.txt.

    NotADirectoryError, or ValueError for a folder without pictures. Whether a file is what its suffix says is
    for the server to judge.
    """
    root = Path(folder)
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is not a folder")
    pictures = sorted(p for p in root.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES and p.is_file())
    if not pictures:
        raise ValueError(f"{root} holds no pictures ({', '.join(PICTURE_SUFFIXES)})")
    return [training_image(path) for path in pictures]


class ImageAssembler:
    """Puts the chunks of pictures together, picture by picture; DataLossError where they do not fit."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._first: generation_pb2.GenerateResponse.Image | None = None

    def add(self, chunk: generation_pb2.GenerateResponse.Image) -> Image | None:
        """The picture if this chunk completes it."""
        first = self._first = self._first or chunk
        if (chunk.index, chunk.size) != (first.index, first.size) or chunk.offset != len(self._data):
            raise DataLossError(
                f"a chunk of picture {chunk.index} at byte {chunk.offset} of {chunk.size} came where picture "
                f"{first.index} was to go on at byte {len(self._data)} of {first.size}"
            )
        self._data += chunk.data
        if not chunk.last and len(self._data) < chunk.size:
            return None
        if not chunk.last or len(self._data) != chunk.size:
            raise DataLossError(f"picture {chunk.index} has {len(self._data)} bytes instead of {chunk.size}")
        image = Image(first.index, first.mime_type, bytes(self._data), first.seed)
        self._data, self._first = bytearray(), None
        return image


class ExportFile:
    """A file being received: appears at `path` only when it is whole and its digest is right."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._hash = hashlib.sha256()
        self._metadata = adapter_pb2.ExportAdapterResponse.Metadata()
        handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
        self._file = os.fdopen(handle, "wb")
        self._temporary = Path(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def add(self, response: adapter_pb2.ExportAdapterResponse) -> None:
        if response.HasField("metadata"):
            self._metadata = response.metadata
        else:
            self._file.write(response.chunk)
            self._hash.update(response.chunk)

    def finish(self) -> ExportedAdapter:
        """Checks size and digest, then puts the file in its place."""
        size = self._file.tell()
        self._file.close()
        expected = self._metadata
        if (size, self._hash.hexdigest()) != (expected.size_bytes, expected.sha256):
            raise DataLossError(
                f"received {size} bytes with digest {self._hash.hexdigest()[:12]}, "
                f"not {expected.size_bytes} with {expected.sha256[:12] or 'none'}"
            )
        self._temporary.chmod(0o644)
        self._temporary.replace(self._path)
        return ExportedAdapter(expected.adapter, size, expected.sha256, self._path)
