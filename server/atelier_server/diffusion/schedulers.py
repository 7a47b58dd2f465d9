"""diffusers' schedulers under the contract's names, with their options. None is written here."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import diffusers

from atelier_server.core import SIGMA_KINDS, SchedulerOptions

_PLAIN = SchedulerOptions()
# Name -> diffusers class and what is set on top of the base's scheduler config.
_REGISTRY: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp-2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp-2m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "dpmpp-3m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
    "dpmpp-sde": ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "kdpm2-a": ("KDPM2AncestralDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}
# Their classes have no step for a U-Net that predicts the picture itself.
_NO_SAMPLE = ("pndm", "euler-a", "kdpm2", "kdpm2-a")


def make_scheduler(name: str, config: Mapping[str, Any], options: SchedulerOptions = _PLAIN) -> Any:
    """A fresh scheduler object, built with `from_config` of the base's scheduler config.

    `options` must be among those that the class has (`options_of`); eta is not the object's but `step`'s.
    """
    class_name, overrides = _REGISTRY[name]
    chosen = {key: value for key, value in options.given.items() if key != "eta"}
    if any(chosen.get(kind) for kind in SIGMA_KINDS):
        # The classes take one kind at a time: the user's, whatever the base has.
        chosen = {kind: False for kind in SIGMA_KINDS if kind in options_of(name)} | chosen
    return getattr(diffusers, class_name).from_config(dict(config), **{**overrides, **chosen})


def options_of(name: str) -> tuple[str, ...]:
    """Which `SchedulerOptions` the class of a scheduler has."""
    kind = getattr(diffusers, _REGISTRY[name][0])
    accepted = {*inspect.signature(kind.__init__).parameters, *inspect.signature(kind.step).parameters}
    return tuple(field.name for field in fields(SchedulerOptions) if field.name in accepted)


def all_options() -> Iterator[tuple[str, tuple[str, ...]]]:
    """(scheduler, its options) for every scheduler of the contract."""
    return ((name, options_of(name)) for name in _REGISTRY)


def usable_schedulers(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of the contract whose classes work with what the base predicts."""
    lacking = _NO_SAMPLE if config.get("prediction_type") == "sample" else ()
    return tuple(name for name in _REGISTRY if name not in lacking)


def default_scheduler(config: Mapping[str, Any]) -> str:
    """The contract's name for the base's own scheduler; ddim where it has none that can be used."""
    for name in usable_schedulers(config):
        class_name, overrides = _REGISTRY[name]
        if class_name == config.get("_class_name") and not overrides:
            return name
    return "ddim"
