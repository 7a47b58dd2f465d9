"""One picture's way from noise to latents.

A scheduler object a picture: `step()` keeps its state on the object and takes one timestep for all rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from atelier_server.core import SchedulerOptions, steps_walked
from atelier_server.diffusion.init_image import InitLatents
from atelier_server.diffusion.outlook import Outlook
from atelier_server.diffusion.schedulers import make_scheduler
from atelier_server.errors import InvalidRequest, Violation

# How many steps more may be proposed to who asked for too few.
_SOME = 8


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """What an inpainted picture keeps of another: `image` and its `noise` [1, C, h, w], where `mask` is 0."""

    image: Tensor
    noise: Tensor
    mask: Tensor


@dataclass(slots=True)
class Trajectory:
    """A picture's scheduler, its timesteps, its latents [1, C, h, w].

    All noise comes from one CPU generator a picture, in the order in which diffusers' pipelines draw, so it
    depends on nothing but the seed and the shapes.
    """

    scheduler: Any
    timesteps: list[Tensor]
    latents: Tensor
    step_options: dict[str, Any]
    kept: Kept | None = None
    extra_channels: Tensor | None = None  # [1, 1 + C, h, w]: what an inpainting model's U-Net sees besides
    index: int = 0
    shown: Tensor | None = None  # the last model input, without the channels beside it
    outlook: Outlook | None = None  # the last step's

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
        init: InitLatents | None = None,
        inpainting_unet: bool = False,
    ) -> Trajectory:
        """At plain noise, or at the noised picture `init`. `inpainting_unet`: it takes mask and picture."""
        scheduler = _ready(name, config, options, num_inference_steps)
        generator = torch.Generator("cpu").manual_seed(seed)
        accepted = inspect.signature(scheduler.step).parameters
        # What diffusers' pipelines pass: eta (DDIM's and TCD's share of noise; 0 by default), the generator.
        passed = {"eta": options.eta or 0.0, "generator": generator}
        trajectory = cls(
            scheduler=scheduler,
            timesteps=list(scheduler.timesteps),
            latents=torch.empty(0),
            step_options={key: value for key, value in passed.items() if key in accepted},
        )

        noise = partial(_noise, (1, *shape), generator, device, dtype)
        if init is None:
            trajectory._skip(0)
            trajectory.latents = noise() * scheduler.init_noise_sigma
        else:
            trajectory._skip(num_inference_steps - steps_walked(num_inference_steps, init.strength))
            trajectory._start_at(init, noise, generator, inpainting_unet)
        trajectory._check_signal()
        return trajectory

    def _start_at(
        self,
        init: InitLatents,
        noise: Callable[[], Tensor],
        generator: torch.Generator,
        inpainting_unet: bool,
    ) -> None:
        """At the noised picture; an inpainted one of full strength at noise alone."""
        from_noise = init.mask is not None and init.strength == 1.0
        image = None if from_noise and inpainting_unet else init.image.sample(generator)
        fresh = noise()
        self.latents = (
            fresh * self.scheduler.init_noise_sigma
            if image is None or from_noise
            else self._noised(image.to(fresh), fresh)
        )
        if init.mask is None or init.masked is None:
            return
        mask = init.mask.to(fresh)
        # Drawn also where nobody looks at it: the noise of the steps comes after it.
        masked = init.masked.sample(generator).to(fresh)
        if inpainting_unet:
            self.extra_channels = torch.cat([mask, masked], dim=1)
        elif image is not None:
            self.kept = Kept(image.to(fresh), fresh, mask)

    def _skip(self, steps: int) -> None:
        """Leaves out the first steps: those in which a picture to begin with would still be noise.

        Also where it leaves out none it tells the scheduler where to begin: of two equal timesteps, as beta
        sigmas have them, a look-up would take the second, and miss one at the end.
        """
        first = steps * self.scheduler.order
        self.timesteps = self.timesteps[first:]
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(first)

    def _check_signal(self) -> None:
        """InvalidRequest where noise is predicted at a timestep that is noise alone: it tells of no picture.

        arXiv 2305.08891, section 3.2. The sigma schedulers keep a little signal there.
        """
        alphas = getattr(self.scheduler, "alphas_cumprod", None)
        if self.prediction_type == "epsilon" and alphas is not None and not alphas[int(self.timestep)]:
            fault = (
                "the base predicts noise, of which nothing can be learned without a signal; set it to false"
            )
            raise InvalidRequest.of([Violation("rescale_betas_zero_snr", fault)])

    def _noised(self, image: Tensor, noise: Tensor) -> Tensor:
        """`image` as noisy as this timestep has it, [1, C, h, w]."""
        return self.scheduler.add_noise(image, noise, self.timestep[None])  # type: ignore[no-any-return]

    @property
    def prediction_type(self) -> str:
        """What the U-Net predicts: epsilon, v_prediction or sample."""
        return str(self.scheduler.config.prediction_type)

    @property
    def finished(self) -> bool:
        return self.index >= len(self.timesteps)

    @property
    def step(self) -> int:
        """Steps done; those of Heun and KDPM2 have two timesteps."""
        return self.index // int(self.scheduler.order)

    @property
    def timestep(self) -> Tensor:
        return self.timesteps[self.index]

    def model_input(self) -> Tensor:
        """[1, C, h, w], scaled as the scheduler wants the U-Net to see it, with the channels beside it."""
        scaled: Tensor = self.scheduler.scale_model_input(self.latents, self.timestep)
        self.shown = scaled
        return scaled if self.extra_channels is None else torch.cat([scaled, self.extra_channels], dim=1)

    def mark(self) -> Callable[[], None]:
        """What brings it back to where it stands now; to be called once at most."""
        generator: torch.Generator | None = self.step_options.get("generator")
        drawn = generator.get_state() if generator is not None else None
        # Schedulers shift their lists in place, and pndm adds to a tensor; others they replace.
        state = {k: _copied(v) for k, v in vars(self.scheduler).items()}
        latents, index, shown, outlook = self.latents, self.index, self.shown, self.outlook

        def back() -> None:
            if generator is not None and drawn is not None:
                generator.set_state(drawn)
            vars(self.scheduler).clear()
            vars(self.scheduler).update(state)
            self.latents, self.index, self.shown, self.outlook = latents, index, shown, outlook

        return back

    def advance(self, prediction: Tensor) -> None:
        """One scheduler step with the U-Net's (guided) prediction [1, C, h, w]."""
        if self.shown is not None:
            self.outlook = Outlook(self.shown, self.timestep, prediction)
        self.latents = self.scheduler.step(
            prediction, self.timestep, self.latents, **self.step_options, return_dict=False
        )[0]
        self.index += 1
        if self.kept is not None:
            kept = self.kept.image if self.finished else self._noised(self.kept.image, self.kept.noise)
            self.latents = (1 - self.kept.mask) * kept + self.kept.mask * self.latents


def _copied(value: Any) -> Any:
    """A list, and what has latents' dimensions, anew."""
    if isinstance(value, list):
        return list(value)
    return value.clone() if isinstance(value, Tensor) and value.ndim > 1 else value


@contextmanager
def all_or_none(trajectories: Iterable[Trajectory]) -> Iterator[None]:
    """Where the block raises, these stand where they stood before it, and can take the same step again."""
    marks = [trajectory.mark() for trajectory in trajectories]
    try:
        yield
    except BaseException:
        for back in marks:
            back()
        raise


def _ready(name: str, config: Mapping[str, Any], options: SchedulerOptions, steps: int) -> Any:
    """A scheduler with its timesteps. InvalidRequest with the nearest number that would do, if this does not.

    pndm cannot do with one or two steps, lcm and tcd not with more than they were distilled for.
    """

    def attempt(steps: int) -> Any | None:
        scheduler = make_scheduler(name, config, options)
        try:
            # They stay on the CPU: index look-ups in `step()` would synchronise the device otherwise.
            scheduler.set_timesteps(steps)
        except ValueError:
            return None
        # Leading timesteps begin at 1: as many as the base has would end behind its last.
        return scheduler if max(scheduler.timesteps) < scheduler.config.num_train_timesteps else None

    if (scheduler := attempt(steps)) is not None:
        return scheduler
    near = sorted(range(1, steps + _SOME), key=lambda other: abs(other - steps))
    right = next((f"; {other} would" for other in near if attempt(other) is not None), "")
    raise InvalidRequest.of([Violation("num_inference_steps", f"{steps} do not suit {name}{right}")])


def _noise(
    shape: tuple[int, ...], generator: torch.Generator, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """One draw on the CPU, moved to the device."""
    return torch.randn(shape, generator=generator, dtype=dtype).to(device)
