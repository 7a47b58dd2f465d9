"""What lies in an adapter's files: tensors by key, header, configuration. safetensors only, never pickle.

Tensors are views of the mapped file: nothing is copied until somebody computes with it, and a file's size is
not the memory that reading it takes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from atelier_server.errors import UnsupportedFormat

MAX_HEADER_BYTES = 16 * 2**20
"""A header is read whole, several times over: the widest honest one, with its tag counts, is far below."""

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
_EMBEDDINGS = ("*_emb.safetensors", "*learned_embeds*.safetensors", "*embeddings*.safetensors")
_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


@dataclass(frozen=True, slots=True, eq=False)
class Container:
    """One safetensors file. `component` is set where its folder says what it belongs to ("unet", ...)."""

    name: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None = None
    component: str = ""


def open_source(path: Path) -> list[Container]:
    """A file, or the files that make an adapter in a folder as PEFT, diffusers or kohya's scripts leave it.

    Raises UnsupportedFormat, which says what is wrong with which file.
    """
    if path.is_file():
        return [_open(path, _config_in(path))]
    found = [_open(file, _config_in(file.parent / PEFT_CONFIG), path) for file in files_of(path)]
    if not found:
        raise UnsupportedFormat(f"the folder has no safetensors file of an adapter; it has {_listing(path)}")
    return found


def files_of(folder: Path) -> list[Path]:
    """The weights of the adapter in `folder`, then its learned tokens. UnsupportedFormat if unclear."""
    embeddings = sorted({path for pattern in _EMBEDDINGS for path in folder.glob(pattern)})
    for name in (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS):
        if (folder / name).is_file():
            return [folder / name, *embeddings]
    parts = [folder / component / PEFT_WEIGHTS for component in _COMPONENTS]
    if any(part.is_file() for part in parts):
        return [*(part for part in parts if part.is_file()), *embeddings]
    others = [path for path in sorted(folder.glob("*.safetensors")) if path not in embeddings]
    if len(others) > 1:
        names = ", ".join(path.name for path in others[:8])
        raise UnsupportedFormat(f"which of these is the adapter? Name the file: {names}")
    return [*others, *embeddings]


def _open(path: Path, config: Mapping[str, Any] | None, root: Path | None = None) -> Container:
    with path.open("rb") as file:
        begin = file.read(9)
    if begin[8:] != b"{":
        if begin.startswith((b"PK\x03\x04", b"\x80")):
            raise UnsupportedFormat(
                f"{path.name} is a pickle, which could run code; convert it to safetensors first"
            )
        raise UnsupportedFormat(f"{path.name} is not a safetensors file")
    if (size := int.from_bytes(begin[:8], "little")) > MAX_HEADER_BYTES:
        raise UnsupportedFormat(f"{path.name} has a header of {size} bytes; {MAX_HEADER_BYTES} are the most")
    try:
        with safe_open(path, framework="pt") as opened:
            header = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise UnsupportedFormat(f"{path.name} is not a whole safetensors file: {error}") from error
    component = path.parent.name if root is not None and path.parent != root else ""
    return Container(path.name, tensors, header, config, component)


def _config_in(path: Path) -> Mapping[str, Any] | None:
    """PEFT's configuration, None if there is none."""
    if path.name != PEFT_CONFIG or not path.is_file():
        return None
    return read_json(path.read_text(encoding="utf-8", errors="replace"), PEFT_CONFIG)


def read_json(text: str, what: str) -> dict[str, Any]:
    """A JSON object that a stranger wrote. Raises UnsupportedFormat."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnsupportedFormat(f"{what} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise UnsupportedFormat(f"{what} is no JSON object")
    return value


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) or "nothing"
