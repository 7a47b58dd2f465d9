"""One picture's way from noise to latents.

A scheduler object a picture: `step()` keeps its state on the object and takes one timestep for all rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atelier_server.core import SchedulerOptions
from atelier_server.diffusion.schedulers import make_scheduler
from atelier_server.errors import InvalidRequest, Violation


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
        options: SchedulerOptions,
        num_inference_steps: int,
        seed: int,
        shape: tuple[int, int, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> Trajectory:
        scheduler = make_scheduler(name, config, options)
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
        # What diffusers' pipelines pass: eta (DDIM's and TCD's share of noise; 0 by default), the generator.
        passed = {"eta": options.eta or 0.0, "generator": generator}
        return cls(
            scheduler=scheduler,
            generator=generator,
            latents=noise * scheduler.init_noise_sigma,
            timesteps=list(scheduler.timesteps),
            step_options={key: value for key, value in passed.items() if key in accepted},
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
