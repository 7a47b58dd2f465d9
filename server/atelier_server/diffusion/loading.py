"""From a model reference to a diffusers pipeline: hub ids, folders, single files; safetensors only."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open

from atelier_server import pocket
from atelier_server.diffusion.families import FAMILIES, Family, UnsupportedModel, detect

# Every latent diffusion checkpoint of one file has it: the U-Net's first convolution.
_FIRST_LAYER = "model.diffusion_model.input_blocks.0.0.weight"


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A pipeline on the CPU, and the files with its weights, in an order that is always the same."""

    pipeline: Any
    family: Family
    files: tuple[Path, ...]


def load_pipeline(reference: str, dtype: torch.dtype) -> Loaded:
    """`pocket`, a diffusers folder, a single .safetensors checkpoint, or a hub id.

    A single file takes its configs and tokenizers from a folder of the same name beside it (without the
    suffix), if there is one, and from the hub otherwise. Raises UnsupportedModel or OSError.
    """
    path = pocket.path() if reference == "pocket" else Path(reference)
    if path.suffix == ".safetensors":
        return _load_file(path, dtype)
    return _load_folder(path if path.is_dir() else downloaded(reference), dtype)


def downloaded_as_anybody(reference: str) -> Path:
    """The local snapshot of a hub repository that everybody may read. Raises UnsupportedModel.

    The hub is asked first: diffusers would take what it cannot have now from this machine's cache, where
    lies what its operator alone may read, and a folder of that name before both.
    """
    refused = UnsupportedModel("the hub has no such model that everybody may read, or cannot be asked now")
    if Path(reference).exists():
        raise refused
    try:
        found = HfApi().model_info(reference, timeout=30, token=False)
    except (httpx2.HTTPError, OfflineModeIsEnabled, HFValidationError) as error:
        raise refused from error
    if found.private or found.gated:
        raise refused
    return downloaded(reference, token=False)


def downloaded(reference: str, token: bool | None = None) -> Path:
    """The local snapshot of a hub repository; what is not served is refused before its download.

    `token` False is nobody's, None is this machine's own.
    """
    if reference.startswith((".", "/", "~")):
        raise UnsupportedModel("there is no such folder or file")
    index = DiffusionPipeline.load_config(reference, token=token)
    has_unet = "unet" in index
    unet = UNet2DConditionModel.load_config(reference, subfolder="unet", token=token) if has_unet else {}
    detect(index, unet)
    options = {"use_safetensors": True, "safety_checker": None, "token": token}
    try:
        folder = DiffusionPipeline.download(reference, **options)
    except OSError:  # no full weights: half ones, perhaps
        folder = DiffusionPipeline.download(reference, variant="fp16", **options)
    return Path(folder)


# ----------------------------------------------------------------------------------------------- folders
def _load_folder(folder: Path, dtype: torch.dtype) -> Loaded:
    index = read_json(folder / "model_index.json")
    family = _family_of(folder, index)
    parts: dict[str, Any] = {}
    files: tuple[Path, ...] = ()
    for name, cls in family.components.items():
        found, variant = weights(folder / name)
        parts[name] = cls.from_pretrained(
            folder / name, dtype=dtype, variant=variant, use_safetensors=True, local_files_only=True
        )
        files += found
    pipeline = family.pipeline.from_pretrained(
        folder, dtype=dtype, local_files_only=True, **parts, **family.without
    )
    return Loaded(pipeline, family, files)


def _family_of(folder: Path, index: Mapping[str, Any]) -> Family:
    unet = read_json(folder / "unet" / "config.json") if "unet" in index else {}
    return detect(index, unet)


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


# ------------------------------------------------------------------------------------------------ one file
def _load_file(path: Path, dtype: torch.dtype) -> Loaded:
    if not path.is_file():
        raise UnsupportedModel("there is no such file")
    beside = path.with_suffix("")
    if beside.is_dir():
        family = _family_of(beside, read_json(beside / "model_index.json"))
        source = {"config": str(beside), "local_files_only": True}
    else:
        family, source = _family_of_file(path), {}
    with whole(path):
        pipeline = family.pipeline.from_single_file(str(path), dtype=dtype, **family.without, **source)
        pipeline.to("cpu")
    return Loaded(pipeline, family, (path,))


@contextmanager
def whole(path: Path) -> Iterator[None]:
    """Raises UnsupportedModel for a single file that has no values for some of the tensors that it should."""
    try:
        yield
    except NotImplementedError as error:  # torch's, for a tensor that nothing was written to
        raise UnsupportedModel(f"{path.name} is not whole: it lacks tensors of the model") from error


def _family_of_file(path: Path) -> Family:
    """By the names and shapes of the tensors; their values are not read."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise UnsupportedModel(f"{path.name} is not a whole safetensors file: {error}") from error
    kind = infer_diffusers_model_type({key: torch.empty(s, device="meta") for key, s in shapes.items()})
    if _FIRST_LAYER not in shapes:
        raise UnsupportedModel(
            f"{path.name} is no checkpoint of a whole model: {len(shapes)} tensors, the first {min(shapes)}"
        )
    for family in FAMILIES:
        if kind in family.single_files:
            return family
    served = ", ".join(kind for family in FAMILIES for kind in family.single_files)
    raise UnsupportedModel(f"{path.name} is a checkpoint of kind {kind}; served are {served}")


# ------------------------------------------------------------------------------------------------- configs
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
