"""Pocket, the embedded base model: a Stable Diffusion folder that ships with the package.

See MODEL_CARD.md beside this file for what it can paint and where its pictures came from.
"""

from __future__ import annotations

from pathlib import Path


def path() -> Path:
    """The model's folder in the layout of diffusers' StableDiffusionPipeline."""
    return Path(__file__).resolve().parent
