"""The tensors of an exported file, to the bit: what it is called is in its metadata, and does not count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def tensors(path: Path) -> tuple[dict[str, Any], bytes]:
    """Names, types, shapes and places, and the bytes of them all."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    return header, content[8 + length :]
