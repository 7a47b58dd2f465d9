"""What decides about a picture: embedded in its file, and told at the end of its stream.

The field names are those of the contract's `Receipt`, in the file's JSON as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from atelier_server.core import BaseInfo, GenerationJob, Mode


@dataclass(frozen=True, slots=True)
class AdapterReceipt:
    """The checkpoint that a reference meant."""

    name: str
    version: int
    step: int
    weight: float
    sha256: str
    weights: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ControlNetReceipt:
    name: str
    sha256: str
    image_sha256: str
    scale: float
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Receipt:
    """Everything that a picture's bits follow from. `batch_bucket` is the largest that it was painted in."""

    base_model: str
    base_sha256: str
    prompt: str
    negative_prompt: str
    adapters: tuple[AdapterReceipt, ...]
    seed: int
    num_images: int
    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    width: int
    height: int
    reproducibility: Mode
    batch_bucket: int
    dtype: str
    device: str
    versions: Mapping[str, str]
    guidance_rescale: float = 0.0
    use_karras_sigmas: bool | None = None
    use_exponential_sigmas: bool | None = None
    use_beta_sigmas: bool | None = None
    timestep_spacing: str | None = None
    rescale_betas_zero_snr: bool | None = None
    eta: float | None = None
    image_sha256: str = ""
    mask_image_sha256: str = ""
    strength: float | None = None
    controlnets: tuple[ControlNetReceipt, ...] = ()
    clip_skip: int = 0
    batch_buckets: tuple[int, ...] = ()
    quantization: str = ""
    base_config_sha256: str = ""
    compiled: bool = False
    device_description: str = ""
    empty_negative_prompt: bool = False

    def embedded(self) -> dict[str, object]:
        """As JSON takes it, without what is not set."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def receipt(
    job: GenerationJob, base: BaseInfo, *, seed: int, num_images: int, buckets: Sequence[int]
) -> Receipt:
    """Of `num_images` pictures of a job, the first of which has `seed`.

    `buckets`: of every forward of one picture, or the largest of all of theirs alone.
    """
    return Receipt(
        base_model=base.reference,
        base_sha256=base.sha256,
        prompt=job.prompt,
        negative_prompt=job.negative_prompt or "",
        adapters=tuple(
            AdapterReceipt(
                # As its user wrote it: a receipt leaves the server, also in the picture's file.
                name=use.checkpoint.name.rpartition("/")[2],
                version=use.checkpoint.version,
                step=use.checkpoint.step,
                weight=use.weight,
                sha256=use.sha256,
                weights=use.weights,
            )
            for use in job.adapters
        ),
        seed=seed,
        num_images=num_images,
        scheduler=job.scheduler,
        num_inference_steps=job.num_inference_steps,
        guidance_scale=job.guidance_scale,
        width=job.width,
        height=job.height,
        reproducibility=job.mode,
        batch_bucket=max(buckets, default=job.bucket),
        batch_buckets=tuple(buckets) if len(set(buckets)) > 1 else (),
        dtype=base.dtype,
        device=base.device,
        versions=dict(base.versions),
        guidance_rescale=job.guidance_rescale,
        image_sha256=job.init.image_sha256 if job.init else "",
        mask_image_sha256=job.init.mask_sha256 if job.init else "",
        strength=job.init.strength if job.init else None,
        controlnets=tuple(
            ControlNetReceipt(use.name, use.sha256, use.image_sha256, use.scale, use.start, use.end)
            for use in job.controlnets
        ),
        clip_skip=job.clip_skip,
        quantization=base.quantization,
        base_config_sha256=base.config_sha256,
        compiled=base.compiled,
        device_description=base.device_description,
        empty_negative_prompt=job.negative_prompt == "",
        **asdict(job.scheduler_options),
    )
