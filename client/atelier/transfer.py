"""Bytes on their way: pictures and adapter files in chunks, put together again and checked."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from atelier.errors import DataLossError
from atelier.events import Image, Picture
from atelier.records import ExportedAdapter, TrainingImage
from atelier.v1 import adapter_pb2, generation_pb2

CHUNK_BYTES = 2**20
# What the server may want of a folder: weights and PEFT's configurations, also a component's own.
_FOLDER = ("*.safetensors", "adapter_config.json", "*/adapter_config.json", "*/adapter_model.safetensors")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(/[^@]+)?(@[\w./-]+)?")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def chunks(data: bytes) -> Iterator[bytes]:
    """Pieces of at most 1 MiB; one empty piece for no data, so that the receiver hears of it."""
    for offset in range(0, max(len(data), 1), CHUNK_BYTES):
        yield data[offset : offset + CHUNK_BYTES]


def file_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            yield data


@dataclass(frozen=True, slots=True)
class AdapterUpload:
    """An adapter's file, or the files of its folder one after another; `names` is empty for a single file."""

    paths: tuple[Path, ...]
    names: tuple[tuple[str, int], ...]
    size_bytes: int
    sha256: str

    @classmethod
    def of(cls, source: str | Path) -> AdapterUpload | None:
        """None for what is no path here but may be a hub's OWNER/NAME. FileNotFoundError, ValueError."""
        path = Path(source)
        if path.is_dir():
            paths = tuple(sorted(file for pattern in _FOLDER for file in path.glob(pattern)))
            if not paths:
                raise ValueError(f"{path} holds no .safetensors file")
            names = tuple((file.relative_to(path).as_posix(), file.stat().st_size) for file in paths)
        elif not path.exists() and isinstance(source, str) and _HUB_ID.fullmatch(source):
            return None
        else:
            paths, names = (path,), ()
        digest = hashlib.sha256()
        size = 0
        for file in paths:
            for data in file_chunks(file):
                digest.update(data)
                size += len(data)
        return cls(paths, names, size, digest.hexdigest())

    def chunks(self, offset: int = 0) -> Iterator[bytes]:
        """What comes from that byte on."""
        for path in self.paths:
            size = path.stat().st_size
            if offset < size:
                with path.open("rb") as file:
                    file.seek(offset)
                    while data := file.read(CHUNK_BYTES):
                        yield data
            offset = max(offset - size, 0)


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
