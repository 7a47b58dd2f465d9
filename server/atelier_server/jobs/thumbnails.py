"""Small pictures of adapters: of a training's first sample, or the one that an imported file carries."""

from __future__ import annotations

import base64
import binascii
import io
import json
import logging
from pathlib import Path

from PIL import Image

from atelier_server.adapters.store import AdapterStore
from atelier_server.core import CheckpointId
from atelier_server.errors import AtelierError

_SIZE = 128  # pixels, at most, of the longer side
_MOST_PIXELS = 50_000_000
_MOST_HEADER_BYTES = 2**24
_KEY = "modelspec.thumbnail"
_log = logging.getLogger(__name__)


def thumbnail(picture: bytes) -> bytes:
    """A WebP of at most 128 pixels a side. Raises ValueError or OSError for what is no picture."""
    with Image.open(io.BytesIO(picture)) as image:
        if image.width * image.height > _MOST_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are too many")
        small = image.convert("RGB")
    small.thumbnail((_SIZE, _SIZE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "WEBP", quality=80)
    return file.getvalue()


def embedded(path: Path) -> bytes | None:
    """The picture in the header of a safetensors file (modelspec.thumbnail), or of a folder's first."""
    if path.is_dir():
        files = sorted(path.rglob("*.safetensors"))
        return embedded(files[0]) if files else None
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= _MOST_HEADER_BYTES else {}
        url = header["__metadata__"][_KEY]
        return base64.b64decode(url.partition("base64,")[2], validate=True) or None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, binascii.Error, RecursionError):
        return None


def keep(store: AdapterStore, checkpoint: CheckpointId, picture: bytes | None) -> None:
    """Makes `picture` the thumbnail of a checkpoint. One that is none, or cannot be kept, is only logged."""
    if picture is None:
        return
    try:
        store.labels.set_thumbnail(checkpoint, thumbnail(picture))
    except (AtelierError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        _log.warning("no thumbnail of %s: %s", checkpoint, error)
