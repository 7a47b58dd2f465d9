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

from atelier_server.adapters.folder import PEFT_CONFIG, PEFT_WEIGHTS, adapter_files
from atelier_server.errors import UnsupportedFormat

MAX_HEADER_BYTES = 16 * 2**20
"""A header is read whole, several times over: the widest honest one, with its tag counts, is far below."""


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
        return [_open(path, None)]
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    names = adapter_files(file.relative_to(path).as_posix() for file in files)
    return [
        _open(path / name, _config(path / name), component=name.rpartition("/")[0])
        for name in names
        if name.endswith(".safetensors")
    ]


def _open(path: Path, config: Mapping[str, Any] | None, component: str = "") -> Container:
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
    return Container(path.name, tensors, header, config, component)


def _config(weights: Path) -> Mapping[str, Any] | None:
    """PEFT's configuration beside its weights."""
    path = weights.with_name(PEFT_CONFIG)
    if weights.name != PEFT_WEIGHTS or not path.is_file():
        return None
    if path.stat().st_size > MAX_HEADER_BYTES:
        raise UnsupportedFormat(f"{PEFT_CONFIG} has more than {MAX_HEADER_BYTES} bytes")
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
