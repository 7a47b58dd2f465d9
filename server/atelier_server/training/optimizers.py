"""Optimizers and learning-rate schedules by the names of the contract."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from prodigyopt import Prodigy
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from atelier_server.core import Recipe
from atelier_server.core.recipe import OPTIMIZERS
from atelier_server.errors import InvalidRequest, Violation
from atelier_server.training.parts import Part


def optimizers_on(device: torch.device) -> tuple[str, ...]:
    """What there is on a device: 8-bit AdamW is a CUDA kernel of bitsandbytes."""
    without = device.type != "cuda" or importlib.util.find_spec("bitsandbytes") is None
    return tuple(name for name in OPTIMIZERS if not (name == "adamw8bit" and without))


def optimizer_of(parts: Sequence[Part], recipe: Recipe, device: torch.device) -> Optimizer:
    """One parameter group a part, with its learning rate. Raises InvalidRequest for what cannot be."""
    if recipe.optimizer not in (known := optimizers_on(device)):
        why = "it needs a CUDA GPU and bitsandbytes" if recipe.optimizer in OPTIMIZERS else "is not known"
        told = f"{recipe.optimizer!r}: {why}; there is {', '.join(known)}"
        raise InvalidRequest.of([Violation("recipe.optimizer", told)])
    groups = [
        {"params": list(part.parameters.values()), "lr": part.learning_rate, "name": part.name}
        for part in parts
    ]
    common: dict[str, Any] = {
        "lr": parts[0].learning_rate,  # what the polynomial schedule takes for the whole
        "betas": (recipe.adam_beta1, recipe.adam_beta2),
        "eps": recipe.adam_epsilon,
        "weight_decay": recipe.adam_weight_decay,
    }
    if recipe.optimizer == "prodigy":
        return _prodigy(parts, groups, common)
    if recipe.optimizer == "adamw8bit":
        bitsandbytes = importlib.import_module("bitsandbytes")  # only where it is asked for: it is large
        made: Optimizer = bitsandbytes.optim.AdamW8bit(groups, **common)
        return made
    # Not `fused`: on a CPU it reads a gradient that lies transposed, as that of B does, in the wrong order.
    return AdamW(groups, **common)


def _prodigy(parts: Sequence[Part], groups: list[dict[str, Any]], common: dict[str, Any]) -> Optimizer:
    """As diffusers' scripts make it (arXiv 2306.06101). Its steps have one size for all parts."""
    if len({part.learning_rate for part in parts}) > 1:
        rates = ", ".join(f"{part.name} {part.learning_rate:g}" for part in parts)
        told = f"'prodigy' has one learning rate for all that learns, here there are: {rates}"
        raise InvalidRequest.of([Violation("recipe.optimizer", told)])
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that its weight decay is decoupled
        made: Optimizer = Prodigy(
            groups, **common, decouple=True, use_bias_correction=True, safeguard_warmup=True
        )
    return made


def schedule_of(optimizer: Optimizer, recipe: Recipe, steps: int) -> LambdaLR:
    """diffusers' schedule over so many steps. Raises InvalidRequest for one that cannot be."""
    warmup = recipe.lr_warmup_steps
    if recipe.lr_scheduler == "polynomial":
        # Without a step after the warm-up it divides by zero, as in a phase that is shorter than the recipe.
        warmup, steps = min(warmup, max(steps, 1) - 1), max(steps, 1)
    try:
        schedule: LambdaLR = get_scheduler(
            recipe.lr_scheduler,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=steps,
            num_cycles=recipe.lr_num_cycles,
            power=recipe.lr_power,
        )
    except ValueError as error:
        raise InvalidRequest.of([Violation("recipe.lr_scheduler", str(error))]) from error
    return schedule
