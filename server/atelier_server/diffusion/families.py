"""Model families: what a base must look like to be served, one entry a family, no if-ladders elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import StableDiffusionPipeline


class UnsupportedModel(ValueError):
    """The files are a model, but of no family that is served here."""


@dataclass(frozen=True, slots=True)
class Family:
    """A family, told by its pipeline class and by facts of its U-Net's config."""

    name: str
    pipeline: type[StableDiffusionPipeline]
    pipeline_classes: tuple[str, ...]
    unet_facts: Mapping[str, object]

    def mismatch(self, pipeline_class: str, unet_config: Mapping[str, Any]) -> str:
        """Why a model is not of this family; empty if it is."""
        if pipeline_class not in self.pipeline_classes:
            return f"its pipeline is {pipeline_class}"
        for key, value in self.unet_facts.items():
            if unet_config.get(key) != value:
                return f"its U-Net has {key}={unet_config.get(key)!r} instead of {value!r}"
        return ""


# Stable Diffusion 1.x (arXiv 2112.10752) and whatever has its layout, `pocket` among it.
SD1 = Family(
    name="sd1",
    pipeline=StableDiffusionPipeline,
    pipeline_classes=("StableDiffusionPipeline",),
    unet_facts={"in_channels": 4, "addition_embed_type": None, "use_linear_projection": False},
)

FAMILIES = (SD1,)


def detect(pipeline_class: str, unet_config: Mapping[str, Any]) -> Family:
    """The family of a model. Raises UnsupportedModel, which says what was found and what is served."""
    reasons = []
    for family in FAMILIES:
        reason = family.mismatch(pipeline_class, unet_config)
        if not reason:
            return family
        reasons.append(f"not {family.name}: {reason}")
    raise UnsupportedModel("; ".join(reasons))
