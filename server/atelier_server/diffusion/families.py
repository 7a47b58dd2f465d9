"""Model families: how a base is told, how it hears its texts, and what else its U-Net wants to know.

One entry a family in `FAMILIES`; denoiser and trainer ask the family and know none by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from atelier_server.diffusion.conditioning import Conditioning, Framing, TextEmbeds
from atelier_server.diffusion.text import TextEncoder


class UnsupportedModel(ValueError):
    """The files are a model, but of no family that is served here."""


_UNET_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(UNet2DConditionModel.__init__).parameters.items()
}


@dataclass(frozen=True)
class Family:
    """Latent diffusion with one text encoder: the U-Net hears its last states, normalised, and nothing else.

    `components` are the parts with weights and their classes, the text encoders in the order in which their
    states are put side by side. `inpainting` is what inpainting models are saved as: their U-Nets take mask
    and masked picture beside the latents. `single_files` are what diffusers calls checkpoints of the family,
    `without` names what else its pipeline has and we do not load.
    """

    name: str
    pipeline: type[DiffusionPipeline]
    inpainting: type[DiffusionPipeline]
    components: Mapping[str, type[Any]]
    unet_facts: Mapping[str, object]
    single_files: tuple[str, ...]
    without: Mapping[str, object]
    upcasts_vae: bool = False
    """Whether the pipeline heeds the VAE's `force_upcast`: its decoder overflows in float16."""

    @property
    def text_encoders(self) -> tuple[str, ...]:
        return tuple(name for name in self.components if name.startswith("text_encoder"))

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """Of the text encoders, in their order."""
        return tuple(name.replace("text_encoder", "tokenizer") for name in self.text_encoders)

    def mismatch(self, index: Mapping[str, Any], unet_config: Mapping[str, Any]) -> str:
        """Why a model_index.json and its U-Net's config are not of this family; "" if they are."""
        pipeline_class = index.get("_class_name")
        if pipeline_class not in (self.pipeline.__name__, self.inpainting.__name__):
            return f"its pipeline is {pipeline_class}"
        for name, cls in self.components.items():
            found = (index.get(name) or [None, None])[1]
            if found != cls.__name__:
                return f"its {name} is {found or 'missing'} instead of {cls.__name__}"
        # Old configs leave out what has its default.
        config = {**_UNET_DEFAULTS, **unet_config}
        for key, value in self.unet_facts.items():
            if config[key] != value:
                return f"its U-Net has {key}={config[key]!r} instead of {value!r}"
        if (channels := config["in_channels"]) not in _IN_CHANNELS:
            return f"its U-Net has in_channels={channels} instead of 4, or 9 of an inpainting model"
        if config["sample_size"] is None:
            return "its U-Net has no sample_size, the size at which it learned to paint"
        return ""

    def misfit(self, pipeline: Any) -> str:
        """Why components, each of them whole, do not go together; "" if they do."""
        unet, vae, scheduler = pipeline.unet.config, pipeline.vae.config, pipeline.scheduler
        heard = unet.cross_attention_dim
        made = sum(getattr(pipeline, name).config.hidden_size for name in self.text_encoders)
        if {made} != ({*heard} if isinstance(heard, list | tuple) else {heard}):
            return f"its U-Net hears {heard} numbers a token (cross_attention_dim), its texts have {made}"
        if unet.out_channels != vae.latent_channels:
            return (
                f"its U-Net has out_channels={unet.out_channels}, "
                f"its VAE latent_channels={vae.latent_channels}"
            )
        if "beta_schedule" not in inspect.signature(type(scheduler).__init__).parameters:
            return f"its scheduler is {type(scheduler).__name__}, which knows no betas: it is of another kind"
        if (predicted := scheduler.config.get("prediction_type", "epsilon")) not in _PREDICTIONS:
            served = ", ".join(_PREDICTIONS)
            return f"its scheduler has prediction_type={predicted!r}; served are {served}"
        for name, tokenizer in zip(self.text_encoders, self.tokenizers, strict=True):
            known, spelt = getattr(pipeline, name).config.vocab_size, len(getattr(pipeline, tokenizer))
            if spelt > known:
                return f"its {tokenizer} has {spelt} tokens, its {name} knows {known}"
        return ""

    def encode(self, encoders: Sequence[TextEncoder], ids: Sequence[Tensor], clip_skip: int) -> TextEmbeds:
        """A text, of which each encoder has its ids [1, tokens], heard `clip_skip` layers before the end."""
        (encoder,) = encoders
        return TextEmbeds(encoder.normalize(encoder.encode(ids[0]).states[clip_skip]))

    def condition(self, text: TextEmbeds, framing: Framing) -> Conditioning:  # noqa: ARG002 - SDXL hears it
        """A row of the U-Net's conditioning."""
        return Conditioning(text.states)


class ExtendedFamily(Family):
    """SDXL (arXiv 2307.01952): two encoders' penultimate states side by side, and pooled text and framing."""

    def misfit(self, pipeline: Any) -> str:
        unet = pipeline.unet.config
        pooled = getattr(pipeline, self.text_encoders[-1]).config.projection_dim
        told = pooled + _FRAMING * (unet.addition_time_embed_dim or 0)
        if (heard := unet.projection_class_embeddings_input_dim) != told:
            return (
                f"its U-Net has projection_class_embeddings_input_dim={heard}, "
                f"pooled text and framing have {told}"
            )
        return super().misfit(pipeline)

    def encode(self, encoders: Sequence[TextEncoder], ids: Sequence[Tensor], clip_skip: int) -> TextEmbeds:
        encoded = [encoder.encode(its) for encoder, its in zip(encoders, ids, strict=True)]
        states = [one.states[1 + clip_skip] for one in encoded]
        return TextEmbeds(torch.cat(states, dim=-1), encoded[-1].projected)

    def condition(self, text: TextEmbeds, framing: Framing) -> Conditioning:
        assert text.pooled is not None
        times = text.states.new_tensor([*framing.original, *framing.corner, *framing.target])
        return Conditioning(text.states, {"text_embeds": text.pooled, "time_ids": times})


_PARTS: Mapping[str, type[Any]] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
}
_NO_EYES = {"feature_extractor": None, "image_encoder": None}
_NO_CHECKER = {**_NO_EYES, "safety_checker": None, "requires_safety_checker": False}
_IN_CHANNELS = (4, 9)
_FRAMING = 6  # numbers: original size, corner and target size
_PREDICTIONS = ("epsilon", "v_prediction", "sample")
# Nothing that we do not condition on.
_PLAIN = {"time_cond_proj_dim": None, "class_embed_type": None, "encoder_hid_dim": None}

# Stable Diffusion 1.x (arXiv 2112.10752) and whatever has its layout, `pocket` among it.
SD1 = Family(
    name="sd1",
    pipeline=StableDiffusionPipeline,
    inpainting=StableDiffusionInpaintPipeline,
    components=_PARTS,
    unet_facts={**_PLAIN, "addition_embed_type": None, "use_linear_projection": False},
    single_files=("v1", "inpainting"),
    without=_NO_CHECKER,
)
# Stable Diffusion 2.x: OpenCLIP's text encoder (its files leave out the last layer, so that the last states
# are the penultimate ones), often v-prediction.
SD2 = Family(
    name="sd2",
    pipeline=StableDiffusionPipeline,
    inpainting=StableDiffusionInpaintPipeline,
    components=_PARTS,
    unet_facts={**_PLAIN, "addition_embed_type": None, "use_linear_projection": True},
    single_files=("v2", "inpainting_v2"),
    without=_NO_CHECKER,
)
SDXL = ExtendedFamily(
    name="sdxl",
    pipeline=StableDiffusionXLPipeline,
    inpainting=StableDiffusionXLInpaintPipeline,
    components={**_PARTS, "text_encoder_2": CLIPTextModelWithProjection},
    unet_facts={**_PLAIN, "addition_embed_type": "text_time"},
    single_files=("xl_base", "xl_inpaint"),
    without=_NO_EYES,
    upcasts_vae=True,
)

FAMILIES = (SD1, SD2, SDXL)


def detect(index: Mapping[str, Any], unet_config: Mapping[str, Any]) -> Family:
    """The family of a model_index.json and its U-Net's config.

    Raises UnsupportedModel, which says what was found and what is served.
    """
    reasons = []
    for family in FAMILIES:
        reason = family.mismatch(index, unet_config)
        if not reason:
            return family
        reasons.append(f"not {family.name}: {reason}")
    parts = sorted((name, part[1]) for name, part in index.items() if isinstance(part, list) and part[1])
    told = ", ".join(f"{name} {cls}" for name, cls in parts) or "nothing"
    raise UnsupportedModel(f"found {index.get('_class_name')} of {told}; {'; '.join(reasons)}")
