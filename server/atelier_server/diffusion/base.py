"""The resident base model: loaded once, frozen, never written; and what it does besides denoising."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from torch import Tensor

from atelier_server import pocket
from atelier_server.diffusion.families import Family, UnsupportedModel, detect

_log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class BaseModel:
    """Text encoder, VAE and U-Net of one base on one device, in evaluation mode and without gradients."""

    def __init__(
        self, pipeline: StableDiffusionPipeline, *, family: Family, reference: str, sha256: str
    ) -> None:
        self.family = family
        self.reference = reference
        self.sha256 = sha256
        self.unet = pipeline.unet
        self.vae = pipeline.vae
        self.text_encoder = pipeline.text_encoder
        self.tokenizer = pipeline.tokenizer
        self.scheduler_config: dict[str, Any] = dict(pipeline.scheduler.config)
        for module in (self.unet, self.vae, self.text_encoder):
            module.requires_grad_(False).eval()
        self.device: torch.device = self.unet.device
        self.dtype: torch.dtype = self.unet.dtype
        self.latent_scale: int = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.latent_channels: int = self.vae.config.latent_channels
        sample_size = self.unet.config.sample_size
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        self.native_width: int = width * self.latent_scale
        self.native_height: int = height * self.latent_scale
        self.max_prompt_tokens: int = self.tokenizer.model_max_length

    @property
    def num_parameters(self) -> int:
        modules = (self.unet, self.vae, self.text_encoder)
        return sum(p.numel() for module in modules for p in module.parameters())

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a picture of that many pixels."""
        return self.latent_channels, height // self.latent_scale, width // self.latent_scale

    @torch.no_grad()
    def encode_prompt(self, text: str) -> Tensor:
        """Last hidden states of the text encoder, [tokens, dim].

        Always a batch of one, so that the bits do not depend on what else is encoded.
        """
        tokens = self.tokenizer(
            text,
            padding="max_length",
            max_length=self.max_prompt_tokens,
            truncation=True,
            return_tensors="pt",
        )
        return self.text_encoder(tokens.input_ids.to(self.device))[0][0]  # type: ignore[no-any-return]

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latent posterior of [3, H, W] pixels in -1..1, each [C, h, w].

        Both are in the units the U-Net works in (times the VAE's scaling factor).
        """
        posterior = self.vae.encode(pixels[None].to(self.device, self.dtype)).latent_dist
        scale = self.vae.config.scaling_factor
        return posterior.mean[0] * scale, posterior.std[0] * scale

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """[C, h, w] latents to [3, H, W] pixels in 0..1, float32 on the CPU. Always a batch of one."""
        image = self.vae.decode(latents[None] / self.vae.config.scaling_factor, return_dict=False)[0][0]
        return (image / 2 + 0.5).clamp(0, 1).float().cpu()  # type: ignore[no-any-return]


def load_base(reference: str, device: str = "auto", dtype: str = "auto") -> BaseModel:
    """Loads `pocket`, a diffusers folder, a single .safetensors checkpoint, or a hub id.

    A single file takes its configs and tokenizer from a folder of the same name beside it (without the
    suffix), if there is one, and from the hub otherwise. Raises UnsupportedModel or OSError.
    """
    target = torch.device(_resolve_device(device))
    precision = _DTYPES[_resolve_dtype(dtype, target)]
    path = pocket.path() if reference == "pocket" else Path(reference)
    if path.suffix == ".safetensors":
        pipeline, family, files = _load_single_file(path, precision)
    else:
        pipeline, family, files = _load_folder(path if path.is_dir() else _download(reference), precision)
    return BaseModel(pipeline.to(target), family=family, reference=reference, sha256=_digest(files))


def _resolve_device(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UnsupportedModel(f"device {device!r}: this machine has no CUDA device that torch can use")
    return device


def _resolve_dtype(dtype: str, device: torch.device) -> str:
    if dtype != "auto":
        return dtype
    return "float32" if device.type == "cpu" else "bfloat16"


def _download(reference: str) -> Path:
    """The local snapshot of a hub repository."""
    if reference.startswith((".", "/", "~")):
        raise UnsupportedModel("there is no such folder or file")
    folder = DiffusionPipeline.download(reference, use_safetensors=True, safety_checker=None)
    return Path(folder)


def _load_folder(folder: Path, dtype: torch.dtype) -> tuple[StableDiffusionPipeline, Family, list[Path]]:
    index = _read_json(folder / "model_index.json")
    family = detect(str(index.get("_class_name")), _read_json(folder / "unet" / "config.json"))
    full = sorted((folder / "unet").glob("*.safetensors"))
    half = [file for file in full if ".fp16." in file.name]
    variant = "fp16" if half and half == full else None
    if not full:
        raise UnsupportedModel(f"{folder.name}/unet has no .safetensors file (pickled weights are not read)")
    pipeline = family.pipeline.from_pretrained(
        folder,
        dtype=dtype,
        variant=variant,
        use_safetensors=True,
        local_files_only=True,
        safety_checker=None,
        requires_safety_checker=False,
    )
    return pipeline, family, half if variant else [file for file in full if file not in half]


def _load_single_file(path: Path, dtype: torch.dtype) -> tuple[StableDiffusionPipeline, Family, list[Path]]:
    if not path.is_file():
        raise UnsupportedModel("there is no such file")
    beside = path.with_suffix("")
    source = {"config": str(beside), "local_files_only": True} if beside.is_dir() else {}
    pipeline = StableDiffusionPipeline.from_single_file(
        str(path), dtype=dtype, safety_checker=None, requires_safety_checker=False, **source
    )
    family = detect(type(pipeline).__name__, dict(pipeline.unet.config))
    return pipeline, family, [path]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        entries = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        found = ", ".join(entries) or "nothing"
        raise UnsupportedModel(f"{path.parent.name}/{path.name} is missing; found: {found}") from error
    if not isinstance(value, dict):
        raise UnsupportedModel(f"{path.parent.name}/{path.name} is not a JSON object")
    return value


def _digest(files: Iterable[Path]) -> str:
    """SHA-256 over the contents of the files, in their order."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(2**22):
                digest.update(block)
    return digest.hexdigest()
