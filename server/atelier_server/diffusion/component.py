"""One component of a model from its diffusers folder: whole, or an error that says what of it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from atelier_server.diffusion.families import UnsupportedModel


def load_component(cls: type[Any], folder: Path, dtype: torch.dtype) -> tuple[Any, tuple[Path, ...]]:
    """A model of class `cls` on the CPU, and the files of its weights.

    Raises UnsupportedModel, which names the component, and the file or the tensor that is at fault.
    """
    where = f"{folder.parent.name}/{folder.name}"
    read_json(folder / "config.json")
    files, variant = weights(folder)
    for file in files:
        tensor_shapes(file)
    # transformers tells of sizes that differ only if it may ignore them.
    more = {"ignore_mismatched_sizes": True} if issubclass(cls, PreTrainedModel) else {}
    try:
        model, found = cls.from_pretrained(
            folder,
            dtype=dtype,
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **more,
        )
    except Exception as error:  # a config can say anything, and the libraries stumble where they stand
        raise UnsupportedModel(f"{where} cannot be read as {cls.__name__}: {_told(error)}") from error
    # The libraries fill in what is not there.
    if missing := sorted(found["missing_keys"]):
        raise UnsupportedModel(f"{where} lacks tensors of {cls.__name__} ({len(missing)}): {missing[0]}")
    if others := sorted(found["mismatched_keys"]):
        name, file_shape, config_shape = others[0]
        raise UnsupportedModel(
            f"{where} does not fit its config.json: {name} is {[*file_shape]}, should be {[*config_shape]}"
        )
    return model, files


def _told(error: Exception) -> str:
    """In one line, without diffusers' advice to those who call it."""
    return " ".join(str(error).split()).partition(". If you want to instead")[0]


def weights(folder: Path) -> tuple[tuple[Path, ...], str | None]:
    """The safetensors files of a component and their variant: full ones where there are any, else "fp16"."""
    files = sorted(folder.glob("*.safetensors"))
    full = tuple(file for file in files if "." not in file.stem)
    half = tuple(file for file in files if ".fp16" in file.name)
    if full:
        return full, None
    if half:
        return half, "fp16"
    found = ", ".join(sorted(p.name for p in folder.iterdir())) if folder.is_dir() else "no such folder"
    where = f"{folder.parent.name}/{folder.name}"
    raise UnsupportedModel(f"{where} has no .safetensors file (pickled weights are not read); found: {found}")


def tensor_shapes(file: Path) -> dict[str, list[int]]:
    """Of a safetensors file, whose values are not read. Raises UnsupportedModel for one that is not whole."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise UnsupportedModel(
            f"{file.parent.name}/{file.name} is not a whole safetensors file: {error}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UnsupportedModel that says what lies there instead."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        entries = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        found = ", ".join(entries) or "nothing"
        raise UnsupportedModel(f"{path.parent.name}/{path.name} is missing; found: {found}") from error
    except ValueError as error:
        raise UnsupportedModel(f"{path.parent.name}/{path.name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UnsupportedModel(f"{path.parent.name}/{path.name} is not a JSON object")
    return value
