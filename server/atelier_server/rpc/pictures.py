"""Uploaded pictures at the door: known format, bounded size by their header, and readable to the end.

The size is read from the header before anything is decoded: 8 kB of PNG can claim 64 million pixels.
"""

from __future__ import annotations

import asyncio
import io
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin
from PIL.ImageFile import ImageFile

from atelier_server.raster import Raster

_PNG = b"\x89PNG\r\n\x1a\n"
_OPAQUE = 255
_JPEG = b"\xff\xd8\xff"
# The plug-ins themselves, not Image.open: it would try other formats, and has a pixel limit of its own.
_READERS: dict[str, type[ImageFile]] = {
    "png": PngImagePlugin.PngImageFile,
    "jpeg": JpegImagePlugin.JpegImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """`suffix` names the format; `problem` is "" for a good picture.

    Width and height are those of the upright picture, `brightest` is its brightest grey on black, 0 to 255;
    `transparent`: some of it is.
    """

    suffix: str
    problem: str
    width: int = 0
    height: int = 0
    brightest: int = 0
    transparent: bool = False


class PictureCheck:
    """At most two pictures are decoded at a time, in threads: a large one takes 200 MB while it is read."""

    def __init__(self, max_pixels: int, max_bytes: int) -> None:
        self._max_pixels = max_pixels
        self._max_bytes = max_bytes
        self._turns = asyncio.Semaphore(2)

    async def check(self, data: bytes) -> Verdict:
        if len(data) > self._max_bytes:
            return Verdict("", f"is of {len(data)} bytes; at most {self._max_bytes} are allowed")
        async with self._turns:
            return await asyncio.to_thread(examine, data, self._max_pixels)

    async def check_all(self, pictures: Mapping[str, bytes]) -> dict[str, Verdict]:
        """Of every field that has a picture."""
        return {field: await self.check(data) for field, data in pictures.items()}


def examine(data: bytes, max_pixels: int) -> Verdict:
    """Header first, then every pixel."""
    suffix = _format(data)
    if not suffix:
        return Verdict("", "is not a PNG, JPEG or WebP picture")
    try:
        width, height = _size(data, suffix)
    except Exception:
        return Verdict(suffix, f"has no readable {suffix.upper()} header")
    if width < 1 or height < 1 or width * height > max_pixels:
        return Verdict(suffix, f"is {width} x {height}; at most {max_pixels} pixels are allowed")
    # Pillow's readers raise whatever their parsers stumble over: this is the seam that knows only "bad".
    try:
        with _READERS[suffix](io.BytesIO(data)) as image:
            image.load()
            raster = Raster.of(image, "black")
            width, height = raster.image.size
            brightest = max(grey for grey, count in enumerate(raster.image.convert("L").histogram()) if count)
            transparent = raster.opacity is not None and _see_through(raster.opacity)
    except Exception as error:
        return Verdict(suffix, f"cannot be decoded: {str(error)[:120] or type(error).__name__}")
    return Verdict(suffix, "", width, height, brightest, transparent)


def _see_through(opacity: Image.Image) -> bool:
    """Whether any pixel is less than opaque."""
    darkest, _ = opacity.getextrema()
    return isinstance(darkest, int | float) and darkest < _OPAQUE


def _format(data: bytes) -> str:
    if data.startswith(_PNG):
        return "png"
    if data.startswith(_JPEG):
        return "jpeg"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return ""


def _size(data: bytes, suffix: str) -> tuple[int, int]:
    """Width and height in pixels, as the header says."""
    if suffix == "png":
        width, height = struct.unpack(">II", data[16:24])
        return width, height
    if suffix == "webp":
        return _webp_size(data)
    with JpegImagePlugin.JpegImageFile(io.BytesIO(data)) as image:
        return image.size


def _webp_size(data: bytes) -> tuple[int, int]:
    """From the first chunk (RFC 9649): Pillow's reader would allocate the canvas to find out."""
    chunk = data[12:16]
    if chunk == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if chunk == b"VP8L":
        (bits,) = struct.unpack("<I", data[21:25])
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack("<HH", data[26:30])
    return width & 0x3FFF, height & 0x3FFF
