"""ControlNets (arXiv 2302.05543): loaded beside the base, and what they add to the U-Net's rows."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from huggingface_hub import snapshot_download
from torch import Tensor

from atelier_server.diffusion.base import BaseModel, digest
from atelier_server.diffusion.component import load_component, read_json
from atelier_server.diffusion.conditioning import Conditioning
from atelier_server.diffusion.families import UnsupportedModel
from atelier_server.diffusion.images import decode_guide
from atelier_server.diffusion.loading import whole
from atelier_server.guides import ControlNetInfo, ControlUse

_KEPT = 8

_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(ControlNetModel.__init__).parameters.items()
}
# What a ControlNet has to have in common with the U-Net whose activations it adds to.
_SHARED = (
    "cross_attention_dim",
    "block_out_channels",
    "layers_per_block",
    "addition_embed_type",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
)
# What else we count on; of an inpainting model too, it sees the latents alone.
_FACTS = {
    "in_channels": 4,
    "conditioning_channels": 3,
    "global_pool_conditions": False,
    "class_embed_type": None,
}


@dataclass(frozen=True, slots=True, eq=False)
class ControlNet:
    """One on the base's device, frozen. `sha256` is that of its weights' files."""

    name: str
    reference: str
    sha256: str
    model: Any


@dataclass(frozen=True, slots=True, eq=False)
class Control:
    """What a picture takes of one ControlNet: an image [3, H, W] in 0..1, a scale, and for which steps.

    `start` and `end` are shares of the steps, as diffusers' control_guidance_start and _end.
    """

    net: ControlNet
    image: Tensor
    scale: float
    start: float = 0.0
    end: float = 1.0

    def scale_at(self, step: int, steps: int) -> float:
        """0 where the step is not wholly between start and end."""
        return 0.0 if step / steps < self.start or (step + 1) / steps > self.end else self.scale


@dataclass(frozen=True, slots=True, eq=False)
class Residuals:
    """What is added to the U-Net's skip connections and to its middle, b rows each."""

    down: Sequence[Tensor]
    mid: Tensor


Scaled = Sequence[tuple[Control, float]]
"""A row's ControlNets of one step, with their scales, none of which is 0."""


@torch.no_grad()
def residuals(
    rows: Sequence[Scaled], latents: Tensor, timesteps: Tensor, conditioning: Conditioning
) -> Residuals | None:
    """Of latents [b, C, h, w] of which the first rows have these ControlNets; None if none has any.

    Each ControlNet runs on all b rows: at a fixed number of rows the bits of a row do not depend on how many
    of the others use it. Rows that do not use it get zeros.
    """
    nets = {scaled.net.name: scaled.net for row in rows for scaled, _ in row}
    total: Residuals | None = None
    for name in sorted(nets):
        mine = [next(((c, s) for c, s in row if c.net.name == name), None) for row in rows]
        mine += [None] * (len(latents) - len(rows))
        added = _of_one(nets[name], mine, latents, timesteps, conditioning)
        total = added if total is None else _sum(total, added)
    return total


def _of_one(
    net: ControlNet,
    rows: Sequence[tuple[Control, float] | None],
    latents: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
) -> Residuals:
    like = next(row[0].image for row in rows if row is not None)
    images = torch.stack([torch.zeros_like(like) if row is None else row[0].image for row in rows])
    scales = torch.tensor([0.0 if row is None else row[1] for row in rows]).to(latents)
    unused = torch.tensor([row is None for row in rows], device=latents.device)[:, None, None, None]
    down, mid = net.model(
        # An inpainting model's U-Net sees more channels than latents.
        latents[:, : net.model.config.in_channels],
        timesteps,
        encoder_hidden_states=conditioning.prompt_embeds,
        controlnet_cond=images.to(latents),
        conditioning_scale=scales[:, None, None, None],
        added_cond_kwargs=dict(conditioning.added),
        return_dict=False,
    )
    # Not only multiplied by 0: what overflows there would not be a number.
    return Residuals([tensor.masked_fill_(unused, 0) for tensor in down], mid.masked_fill_(unused, 0))


def _sum(a: Residuals, b: Residuals) -> Residuals:
    return Residuals([x + y for x, y in zip(a.down, b.down, strict=True)], a.mid + b.mid)


class ControlNets:
    """All that are loaded, and the last few pictures that guided them."""

    def __init__(self, references: Mapping[str, str], base: BaseModel) -> None:
        """Raises UnsupportedModel that names the one which is missing or does not fit the base."""
        self._nets = load_controlnets(references, base)
        self._device = base.device
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    @property
    def infos(self) -> tuple[ControlNetInfo, ...]:
        return tuple(ControlNetInfo(net.name, net.reference, net.sha256) for net in self._nets.values())

    @property
    def size_bytes(self) -> int:
        return sum(p.nbytes for net in self._nets.values() for p in net.model.parameters())

    def control(self, use: ControlUse) -> Control:
        """The pictures of one request share theirs."""
        if (image := self._kept.get(use.image_sha256)) is None:
            image = self._kept[use.image_sha256] = decode_guide(use.image).to(self._device)
        self._kept.move_to_end(use.image_sha256)
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return Control(self._nets[use.name], image, use.scale, use.start, use.end)


# ------------------------------------------------------------------------------------------------- loading
def load_controlnets(references: Mapping[str, str], base: BaseModel) -> dict[str, ControlNet]:
    """By name. Raises UnsupportedModel that names the one which is missing or does not fit the base."""
    nets = {}
    for name, reference in references.items():
        try:
            nets[name] = _load(name, reference, base)
        except (UnsupportedModel, OSError, ValueError) as error:
            raise UnsupportedModel(f"controlnet {name}={reference}: {error}") from error
    return nets


def _load(name: str, reference: str, base: BaseModel) -> ControlNet:
    path = Path(reference)
    if path.suffix == ".safetensors":
        model, files = _from_file(path, base)
    else:
        model, files = _from_folder(path if path.is_dir() else _download(reference), base)
    return ControlNet(name, reference, digest(files), model.requires_grad_(False).eval().to(base.device))


def _from_folder(folder: Path, base: BaseModel) -> tuple[Any, Sequence[Path]]:
    _check(read_json(folder / "config.json"), base)
    return load_component(ControlNetModel, folder, base.dtype)


def _from_file(path: Path, base: BaseModel) -> tuple[Any, Sequence[Path]]:
    """Under diffusers' names or the original ones. Its config.json is that of the folder of the same name
    beside it, if there is one; else diffusers guesses and fetches it.
    """
    if not path.is_file():
        raise UnsupportedModel("there is no such file")
    beside = path.with_suffix("")
    source: dict[str, Any] = {}
    if beside.is_dir():
        _check(read_json(beside / "config.json"), base)
        source = {"config": str(beside), "local_files_only": True}
    with whole(path):
        model = ControlNetModel.from_single_file(str(path), dtype=base.dtype, **source)
    _check({"_class_name": type(model).__name__, **model.config}, base)
    return model, [path]


def _check(config: Mapping[str, Any], base: BaseModel) -> None:
    if reason := mismatch(config, base.unet.config, base.family.name, base.latent_scale):
        raise UnsupportedModel(reason)


def _download(reference: str) -> Path:
    if reference.startswith((".", "/", "~")):
        raise UnsupportedModel("there is no such folder")
    wanted = ["config.json", "diffusion_pytorch_model*.safetensors"]
    return Path(snapshot_download(reference, allow_patterns=wanted))


def mismatch(
    config: Mapping[str, Any], unet_config: Mapping[str, Any], family: str, latent_scale: int
) -> str:
    """Why a ControlNet's config does not fit the U-Net's, and latents so much smaller; "" if it does."""
    if (found := config.get("_class_name")) != "ControlNetModel":
        return f"is {found} instead of ControlNetModel"
    full = {**_DEFAULTS, **config}
    for key, value in _FACTS.items():
        if full[key] != value:
            return f"has {key}={full[key]!r} instead of {value!r}"
    for key in _SHARED:
        theirs, ours = _plain(full[key]), _plain(unet_config[key])
        if theirs != ours:
            return f"does not fit the base ({family}): its {key} is {theirs!r}, the base's {ours!r}"
    scale = 2 ** (len(full["conditioning_embedding_out_channels"]) - 1)
    if scale != latent_scale:
        return f"does not fit the base ({family}): pictures become {scale} times smaller, not {latent_scale}"
    return ""


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, list | tuple) else value
