"""diffusers' schedulers under the contract's names. None is written here.

One object a picture: `step()` keeps its state on the object and takes one timestep for all rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

from atelier_server.errors import InvalidRequest, Violation

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


def make_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """A fresh scheduler object, built with `from_config` of the base's scheduler config."""
    class_name, overrides = _REGISTRY[name]
    return getattr(diffusers, class_name).from_config(dict(config), **overrides)


def default_scheduler(config: Mapping[str, Any]) -> str:
    """The contract's name for the base's own scheduler; ddim where it has none."""
    for name, (class_name, overrides) in _REGISTRY.items():
        if class_name == config.get("_class_name") and not overrides:
            return name
    return "ddim"


@dataclass(slots=True)
class Trajectory:
    """One picture's way from noise to latents: its scheduler, its generator, its latents [1, C, h, w].

    The noise is one CPU draw a picture, so it depends on nothing but the seed and the shape.
    """

    scheduler: Any
    generator: torch.Generator
    latents: Tensor
    timesteps: list[Tensor]
    step_options: dict[str, Any]
    index: int = 0

    @classmethod
    def begin(
        cls,
        name: str,
        config: Mapping[str, Any],
        *,
        num_inference_steps: int,
        seed: int,
        shape: tuple[int, int, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> Trajectory:
        scheduler = make_scheduler(name, config)
        # Timesteps stay on the CPU: index look-ups in `step()` would synchronise the device otherwise.
        try:
            scheduler.set_timesteps(num_inference_steps)
        except ValueError as error:
            # pndm cannot do with one or two, lcm and tcd not with more than they were distilled for.
            raise InvalidRequest.of(
                [Violation("num_inference_steps", f"{num_inference_steps} do not suit {name}: {error}")]
            ) from error
        generator = torch.Generator("cpu").manual_seed(seed)
        noise = torch.randn((1, *shape), generator=generator, dtype=dtype).to(device)
        accepted = inspect.signature(scheduler.step).parameters
        # What diffusers' pipelines pass by default: eta 0 (DDIM's and TCD's noise share) and the generator.
        defaults = {"eta": 0.0, "generator": generator}
        options = {key: value for key, value in defaults.items() if key in accepted}
        return cls(
            scheduler=scheduler,
            generator=generator,
            latents=noise * scheduler.init_noise_sigma,
            timesteps=list(scheduler.timesteps),
            step_options=options,
        )

    @property
    def finished(self) -> bool:
        return self.index >= len(self.timesteps)

    @property
    def timestep(self) -> Tensor:
        return self.timesteps[self.index]

    def model_input(self) -> Tensor:
        """[1, C, h, w], scaled as the scheduler wants the U-Net to see it."""
        return self.scheduler.scale_model_input(self.latents, self.timestep)  # type: ignore[no-any-return]

    def advance(self, prediction: Tensor) -> None:
        """One scheduler step with the U-Net's (guided) prediction [1, C, h, w]."""
        self.latents = self.scheduler.step(
            prediction, self.timestep, self.latents, **self.step_options, return_dict=False
        )[0]
        self.index += 1
