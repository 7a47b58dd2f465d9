"""From a model reference to a diffusers pipeline: hub ids, folders, single files; safetensors only."""

from __future__ import annotations

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

from atelier_server import pocket
from atelier_server.diffusion.component import load_component, read_json, tensor_shapes
from atelier_server.diffusion.families import FAMILIES, Family, UnsupportedModel, detect

# Every latent diffusion checkpoint of one file has it: the U-Net's first convolution.
_FIRST_LAYER = "model.diffusion_model.input_blocks.0.0.weight"


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A pipeline on the CPU, the files with its weights, and those with its configs and tokenizers.

    Each in an order that is always the same.
    """

    pipeline: Any
    family: Family
    files: tuple[Path, ...]
    configs: tuple[Path, ...] = ()


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
    family = _family_of(folder, read_json(folder / "model_index.json"))
    parts: dict[str, Any] = {}
    files: tuple[Path, ...] = ()
    for name, cls in family.components.items():
        parts[name], found = load_component(cls, folder / name, dtype)
        files += found
    for tokenizer in family.tokenizers:
        _check_tokenizer(folder / tokenizer)
    try:  # what is left: tokenizers and the scheduler
        pipeline = family.pipeline.from_pretrained(
            folder, dtype=dtype, local_files_only=True, **parts, **family.without
        )
    except (ValueError, OSError, TypeError) as error:
        raise UnsupportedModel(f"{folder.name} cannot be read: {error}") from error
    return _checked(Loaded(pipeline, family, files, _configs(folder, family)))


def _configs(folder: Path, family: Family) -> tuple[Path, ...]:
    """All that is not weights and changes what is painted."""
    parts = (*family.components, *family.tokenizers, "scheduler")
    files = [path for part in parts for kind in ("*.json", "*.txt") for path in (folder / part).glob(kind)]
    return (folder / "model_index.json", *sorted(files))


def _checked(loaded: Loaded) -> Loaded:
    """UnsupportedModel for components that do not go together."""
    if reason := loaded.family.misfit(loaded.pipeline):
        raise UnsupportedModel(reason)
    return loaded


def _family_of(folder: Path, index: Mapping[str, Any]) -> Family:
    unet = read_json(folder / "unet" / "config.json") if "unet" in index else {}
    return detect(index, unet)


def _check_tokenizer(folder: Path) -> None:
    """UnsupportedModel where transformers would make do with an empty vocabulary."""
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if "tokenizer.json" not in found and not {"vocab.json", "merges.txt"} <= found:
        told = ", ".join(sorted(found)) or "nothing"
        where = f"{folder.parent.name}/{folder.name}"
        raise UnsupportedModel(
            f"{where} has neither tokenizer.json nor vocab.json and merges.txt; found: {told}"
        )


# ------------------------------------------------------------------------------------------------ one file
def _load_file(path: Path, dtype: torch.dtype) -> Loaded:
    if not path.is_file():
        raise UnsupportedModel("there is no such file")
    beside = path.with_suffix("")
    if beside.is_dir():
        family = _family_of(beside, read_json(beside / "model_index.json"))
        source = {"config": str(beside), "local_files_only": True}
        configs = _configs(beside, family)
    else:
        family, source, configs = _family_of_file(path), {}, ()
    with whole(path):
        pipeline = family.pipeline.from_single_file(str(path), dtype=dtype, **family.without, **source)
        pipeline.to("cpu")
    return _checked(Loaded(pipeline, family, (path,), configs))


@contextmanager
def whole(path: Path) -> Iterator[None]:
    """Raises UnsupportedModel for a single file that has no values for some of the tensors that it should."""
    try:
        yield
    except NotImplementedError as error:  # torch's, for a tensor that nothing was written to
        raise UnsupportedModel(f"{path.name} is not whole: it lacks tensors of the model") from error


def _family_of_file(path: Path) -> Family:
    """By the names and shapes of the tensors; their values are not read."""
    shapes = tensor_shapes(path)
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
