"""The resident base model: loaded once, frozen, never written; and what it does besides denoising."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from atelier_server.diffusion import prompts
from atelier_server.diffusion.conditioning import TextEmbeds
from atelier_server.diffusion.families import Family, UnsupportedModel
from atelier_server.diffusion.loading import load_pipeline
from atelier_server.diffusion.offload import Offloaded
from atelier_server.diffusion.quantization import Quantization, quantize
from atelier_server.diffusion.text import TextEncoder, WordIds

_log = logging.getLogger(__name__)
# Of a pipeline, beside its components.
_SETTINGS = ("force_zeros_for_empty_prompt", "requires_safety_checker")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class BaseModel:
    """Text encoders, VAE and U-Net of one base on one device, in evaluation mode and without gradients.

    `quantization`: of the U-Net's linear layers. `offloaded`: components that rest in CPU memory.
    """

    def __init__(
        self,
        pipeline: Any,
        *,
        family: Family,
        reference: str,
        sha256: str,
        config_sha256: str = "",
        quantization: Quantization = "",
        offloaded: Mapping[str, Offloaded] = MappingProxyType({}),
    ) -> None:
        self._pipeline = pipeline
        self.family = family
        self.reference = reference
        self.sha256 = sha256
        self.config_sha256 = config_sha256
        self.quantization = quantization
        self.offloaded = offloaded
        self.modules: dict[str, nn.Module] = {name: getattr(pipeline, name) for name in family.components}
        self.unet = pipeline.unet
        self.vae = pipeline.vae
        self.encoders = tuple(
            TextEncoder(name, self.modules[name], getattr(pipeline, tokenizer))
            for name, tokenizer in zip(family.text_encoders, family.tokenizers, strict=True)
        )
        self.scheduler_config: dict[str, Any] = dict(pipeline.scheduler.config)
        # What the U-Net learned to mean "no prompt": the empty text, or zeros.
        self._zeros_for_no_prompt = bool(pipeline.config.get("force_zeros_for_empty_prompt", False))
        for module in self.modules.values():
            module.requires_grad_(False).eval()
        self.device: torch.device = self.unet.device
        self.dtype: torch.dtype = self.unet.dtype
        if family.upcasts_vae and self.dtype == torch.float16 and self.vae.config.force_upcast:
            self.vae.float()
        self.latent_scale: int = 2 ** (len(self.vae.config.block_out_channels) - 1)
        # Sizes of pictures whose multiples the U-Net halves as often as it does without a rest.
        self.size_step: int = self.latent_scale * 2 ** (len(self.unet.config.block_out_channels) - 1)
        self.latent_channels: int = self.vae.config.latent_channels
        # An inpainting model's U-Net takes mask and masked picture beside the latents.
        self.inpainting: bool = self.unet.config.in_channels == 2 * self.latent_channels + 1
        sample_size = self.unet.config.sample_size
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        self.native_width: int = width * self.latent_scale
        self.native_height: int = height * self.latent_scale
        self.max_prompt_tokens: int = min(encoder.max_tokens for encoder in self.encoders)

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for module in self.modules.values() for p in module.parameters())

    @contextmanager
    def at_work(self, *components: str) -> Iterator[None]:
        """Inside, these components are on the device, wherever they rest.

        Everything here sees to it by itself; it is for who touches them from outside, or uses them often.
        """
        with ExitStack() as stack:
            for name in components:
                if (offloaded := self.offloaded.get(name)) is not None:
                    stack.enter_context(offloaded.at_work())
            yield

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a picture of that many pixels."""
        return self.latent_channels, height // self.latent_scale, width // self.latent_scale

    def encode_prompt(
        self, text: str, *, clip_skip: int = 0, words: Mapping[str, WordIds] = MappingProxyType({})
    ) -> TextEmbeds:
        """A prompt as the U-Net hears it, with the text encoders' last `clip_skip` layers left out.

        It may be long, and have weighted parts (`prompts`). `words`: by text encoder, the ids of the learned
        tokens that it may use. Always one text at a time, so that the bits do not depend on what else is
        encoded. ValueError for one that is too long.
        """
        with self.at_work(*self.family.text_encoders):
            return prompts.encode(self.family, self.encoders, text, clip_skip, words)

    def encode_negative(
        self, text: str | None, *, words: Mapping[str, WordIds] = MappingProxyType({})
    ) -> TextEmbeds:
        """As `encode_prompt`; None is what the base learned to take for no prompt at all."""
        embeds = self.encode_prompt(text or "", words=words)
        return embeds.zeros() if self._zeros_for_no_prompt and text is None else embeds

    def encode_caption(self, text: str, *, words: Mapping[str, WordIds] = MappingProxyType({})) -> TextEmbeds:
        """A training picture's caption, word for word; what does not fit the encoders is cut off."""
        ids = [encoder.tokenize(text, words.get(encoder.name)) for encoder in self.encoders]
        with self.at_work(*self.family.text_encoders):
            return self.family.encode(self.encoders, ids, 0)

    def hearing_with(self, modules: Mapping[str, nn.Module]) -> BaseModel:
        """This base, except that texts are encoded by those of `modules` that are text encoders of it."""
        other = copy(self)
        other.encoders = tuple(
            TextEncoder(encoder.name, modules.get(encoder.name, encoder.model), encoder.tokenizer)
            for encoder in self.encoders
        )
        return other

    def pipeline_with(self, modules: Mapping[str, nn.Module]) -> Any:
        """diffusers' pipeline of this base with `modules` in place of its own; saved, `serve` loads it."""
        settings = {key: self._pipeline.config[key] for key in _SETTINGS if key in self._pipeline.config}
        return type(self._pipeline)(**{**self._pipeline.components, **settings, **modules})

    @property
    def max_clip_skip(self) -> int:
        """How many layers may be left out so that one is left to hear."""
        layers: int = min(encoder.model.config.num_hidden_layers for encoder in self.encoders)
        return layers - (2 if len(self.encoders) > 1 else 1)  # SDXL never hears the last one

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latent posterior of [3, H, W] pixels in -1..1, each [C, h, w].

        Both are in the units the U-Net works in (see `_latent_units`).
        """
        with self.at_work("vae"):
            posterior = self.vae.encode(pixels[None].to(self.device, self.vae.dtype)).latent_dist
        shift, scale = self._latent_units()
        # The VAE's channels are last. One such row would turn a whole batch of the U-Net's, and so its bits.
        mean, std = posterior.mean[0].contiguous(), posterior.std[0].contiguous()
        return (mean - shift) * scale, std * scale

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, *, tiled: bool = False) -> Tensor:
        """[C, h, w] latents to [3, H, W] pixels in 0..1, float32 on the CPU. Always a batch of one.

        `tiled` decodes overlapping tiles one after another: less memory, and faint differences in between.
        """
        shift, scale = self._latent_units()
        latents = latents.to(self.vae.dtype) / scale + shift
        decode = self.vae.tiled_decode if tiled else self.vae.decode
        with self.at_work("vae"):
            image = decode(latents[None], return_dict=False)[0][0]
        return (image / 2 + 0.5).clamp(0, 1).float().cpu()  # type: ignore[no-any-return]

    def _latent_units(self) -> tuple[Tensor | float, Tensor | float]:
        """(shift, scale): the U-Net's latents are (the VAE's - shift) * scale."""
        config = self.vae.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or std is None:
            return 0.0, config.scaling_factor

        def channels(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, device=self.device, dtype=self.vae.dtype)[:, None, None]

        return channels(mean), config.scaling_factor / channels(std)


def load_base(
    reference: str,
    device: str = "auto",
    dtype: str = "auto",
    *,
    quantization: Quantization = "",
    offload: Collection[str] = (),
) -> BaseModel:
    """A base from whatever `load_pipeline` takes. Raises UnsupportedModel or OSError.

    `offload`: "text_encoders", "vae"; they rest in CPU memory. On a CPU that is where they are anyway.
    """
    target = torch.device(_resolve_device(device))
    loaded = load_pipeline(reference, _DTYPES[_resolve_dtype(dtype, target)])
    pipeline, sha256 = loaded.pipeline, digest(loaded.files)
    # It decodes one picture at a time; the U-Net stays as it is: its rows heard of their neighbours in this.
    pipeline.vae.to(memory_format=torch.channels_last)
    if quantization:
        quantize(pipeline.unet, quantization, target)
        # Other weights, and so another base.
        sha256 = hashlib.sha256(f"{sha256} {quantization}".encode()).hexdigest()
    resting = _resting(loaded.family, offload, target)
    for name in loaded.family.components:
        if name not in resting:
            getattr(pipeline, name).to(target)
    return BaseModel(
        pipeline,
        family=loaded.family,
        reference=reference,
        sha256=sha256,
        config_sha256=digest(loaded.configs) if loaded.configs else "",
        quantization=quantization,
        offloaded={name: Offloaded.on(getattr(pipeline, name), target) for name in resting},
    )


def _resting(family: Family, offload: Collection[str], device: torch.device) -> tuple[str, ...]:
    """The components that rest in CPU memory."""
    if offload and device.type == "cpu":
        _log.warning("offload %s: no effect, the device is the CPU", ", ".join(offload))
        return ()
    groups = {"text_encoders": family.text_encoders, "vae": ("vae",)}
    return tuple(name for group in offload for name in groups[group])


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


def digest(files: Iterable[Path]) -> str:
    """SHA-256 over the contents of the files, in their order."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(2**22):
                digest.update(block)
    return digest.hexdigest()
