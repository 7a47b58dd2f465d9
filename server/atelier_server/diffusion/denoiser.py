"""The U-Net as a denoiser: one forward for serving, one loss for training, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from diffusers.training_utils import compute_snr
from torch import Tensor

from atelier_server.diffusion.conditioning import Conditioning
from atelier_server.diffusion.controlnet import Control, Residuals, Scaled, residuals
from atelier_server.diffusion.trajectory import Trajectory


@dataclass(slots=True)
class Picture:
    """A picture in the making. `negative` is None when there is no guidance."""

    trajectory: Trajectory
    prompt: Conditioning
    negative: Conditioning | None
    guidance_scale: float
    guidance_rescale: float = 0.0
    controls: Sequence[Control] = ()

    @property
    def tokens(self) -> int:
        """How long the texts are; those of one forward are of one length."""
        return self.prompt.prompt_embeds.shape[0]

    @property
    def rows(self) -> int:
        return 1 if self.negative is None else 2

    def scaled_controls(self) -> Scaled:
        """The ControlNets of the next step, with their scales."""
        at = self.trajectory.index, len(self.trajectory.timesteps)
        scaled = ((control, control.scale_at(*at)) for control in self.controls)
        return [(control, scale) for control, scale in scaled if scale]


class Denoiser:
    """Predicts noise (or velocity) for rows that have nothing in common but the latent's shape."""

    def __init__(self, unet: UNet2DConditionModel, scheduler_config: Mapping[str, Any]) -> None:
        self.unet = unet
        self._noise_scheduler = DDPMScheduler.from_config(dict(scheduler_config))
        self.num_train_timesteps: int = self._noise_scheduler.config.num_train_timesteps
        self.prediction_type: str = self._noise_scheduler.config.prediction_type

    def predict(
        self,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        control: Residuals | None = None,
    ) -> Tensor:
        """The prediction [b, C, h, w] for [b, C, h, w] latents at [b] timesteps."""
        prediction: Tensor = self.unet(
            latents,
            timesteps,
            encoder_hidden_states=conditioning.prompt_embeds,
            added_cond_kwargs=dict(conditioning.added),
            down_block_additional_residuals=None if control is None else tuple(control.down),
            mid_block_additional_residual=None if control is None else control.mid,
            return_dict=False,
        )[0]
        return prediction

    @torch.no_grad()
    def step(self, pictures: Sequence[Picture], bucket: int) -> None:
        """Moves every picture one timestep on, all in one forward of exactly `bucket` rows.

        Rows follow the order of the pictures, the negative prompt's row first; the rest is zeros.
        """
        latents: list[Tensor] = []
        timesteps: list[Tensor] = []
        conditions: list[Conditioning] = []
        controls: list[Scaled] = []
        for picture in pictures:
            model_input = picture.trajectory.model_input()
            controls += [picture.scaled_controls()] * picture.rows
            for conditioning in (picture.negative, picture.prompt):
                if conditioning is not None:
                    latents.append(model_input)
                    timesteps.append(picture.trajectory.timestep.float())
                    conditions.append(conditioning)
        if (padding := bucket - len(latents)) < 0:
            raise ValueError(f"{len(latents)} rows do not fit a bucket of {bucket}")
        latents += [torch.zeros_like(latents[0])] * padding
        timesteps += [torch.zeros(())] * padding
        batch = (
            torch.cat(latents),
            torch.stack(timesteps).to(latents[0].device),
            Conditioning.stack(conditions, bucket),
        )
        prediction = self.predict(*batch, residuals(controls, *batch))
        row = 0
        for picture in pictures:
            picture.trajectory.advance(_guided(prediction[row : row + picture.rows], picture))
            row += picture.rows

    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Latents [b, C, h, w] with the noise of timesteps [b]: what a training step shows the U-Net."""
        return self._noise_scheduler.add_noise(latents, noise, timesteps)  # type: ignore[no-any-return]

    def error(
        self,
        prediction: Tensor,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        *,
        snr_gamma: float | None = None,
        masks: Tensor | None = None,
    ) -> Tensor:
        """Mean squared error of each row against what the base predicts (noise, velocity or sample), [b].

        `snr_gamma` turns on Min-SNR weighting (arXiv 2303.09556). `masks` [b, 1, h, w] weigh the latent
        pixels, before the mean over all of them, as kohya's masked loss does.
        """
        target = self._target(latents, noise, timesteps)
        squares = F.mse_loss(prediction.float(), target.float(), reduction="none")
        error = (squares if masks is None else squares * masks).flatten(1).mean(1)
        if snr_gamma is None:
            return error
        snr = compute_snr(self._noise_scheduler, timesteps)
        divisor = snr + 1 if self.prediction_type == "v_prediction" else snr
        weighted: Tensor = error * snr.clamp(max=snr_gamma) / divisor
        return weighted

    def _target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "v_prediction":
            return self._noise_scheduler.get_velocity(latents, noise, timesteps)  # type: ignore[no-any-return]
        if self.prediction_type == "sample":
            return latents
        raise ValueError(f"prediction_type {self.prediction_type!r} is none of epsilon, v_prediction, sample")


def _guided(prediction: Tensor, picture: Picture) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598) over rows [negative, prompt], or the only row as it is.

    `guidance_rescale` brings the contrast back towards the prompt's own (arXiv 2305.08891, section 3.4).
    """
    if prediction.shape[0] == 1:
        return prediction
    negative, prompt = prediction.chunk(2)
    guided = negative + picture.guidance_scale * (prompt - negative)
    if picture.guidance_rescale:
        guided = rescale_noise_cfg(guided, prompt, guidance_rescale=picture.guidance_rescale)
    return guided
