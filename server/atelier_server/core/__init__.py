"""The nouns that every room shares: adapters, jobs, recipes.

Everything here is frozen, cheap to pickle, and free of torch, protobuf and gRPC.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace

from atelier_server.core.choices import ImageFormat, Mode, Priority, State
from atelier_server.core.recipe import METHODS, Recipe, TrainingAbilities
from atelier_server.guides import ControlNetInfo, ControlUse

__all__ = ["METHODS", "ImageFormat", "Mode", "Priority", "Recipe", "State", "TrainingAbilities"]

ADAPTER_NAME = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
# TENANT/NAME, or NAME alone for the default tenant's: what the store calls an adapter.
SCOPED_NAME = re.compile(rf"({ADAPTER_NAME.pattern}/)?{ADAPTER_NAME.pattern}")
ROW_BUCKETS = (2, 4, 8, 16)
SCHEDULERS = (
    "ddim",
    "ddpm",
    "pndm",
    "lms",
    "euler",
    "euler-a",
    "heun",
    "dpmpp-2m",
    "dpmpp-2m-sde",
    "dpmpp-3m-sde",
    "dpmpp-sde",
    "kdpm2",
    "kdpm2-a",
    "unipc",
    "deis",
    "lcm",
    "tcd",
)


# ---------------------------------------------------------------------------------------------- adapters
@dataclass(frozen=True, slots=True)
class AdapterRef:
    """What a user writes: NAME[@STEP|@TAG|@vN@STEP][:WEIGHT].

    `weights` are one a step, `weight` the first of them then. `sha256` pins the checkpoint in any version.
    """

    name: str
    selector: str = ""
    weight: float = 1.0
    weights: tuple[float, ...] = ()
    sha256: str = ""

    def __str__(self) -> str:
        selector = f"@{self.selector}" if self.selector else ""
        weight = f":{self.weight:g}" if self.weight != 1.0 else ""
        return f"{self.name}{selector}{weight}"


@dataclass(frozen=True, slots=True, order=True)
class CheckpointId:
    """One immutable checkpoint of the store."""

    name: str
    version: int
    step: int

    def __str__(self) -> str:
        """In full: NAME@vN@STEP is a reference, and means this one whatever is published later."""
        return f"{self.name}@v{self.version}@{self.step}"


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """A checkpoint at a weight, as a generation uses it. `path` is its safetensors file.

    `weights`, if there are any, are one a step; the last one holds, and `weight` is the first.
    """

    checkpoint: CheckpointId
    weight: float
    path: str
    sha256: str
    weights: tuple[float, ...] = ()

    def weight_at(self, step: int) -> float:
        """The weight in a step, counted from 0."""
        return self.weights[min(step, len(self.weights) - 1)] if self.weights else self.weight


# ------------------------------------------------------------------------------------------------- jobs
TIMESTEP_SPACINGS = ("linspace", "leading", "trailing")
SIGMA_KINDS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


@dataclass(frozen=True, slots=True)
class SchedulerOptions:
    """Options of diffusers' scheduler classes, under their names. None: as the base model has it."""

    use_karras_sigmas: bool | None = None
    use_exponential_sigmas: bool | None = None
    use_beta_sigmas: bool | None = None
    timestep_spacing: str | None = None
    rescale_betas_zero_snr: bool | None = None
    eta: float | None = None

    @property
    def given(self) -> dict[str, bool | str | float]:
        """Those that are set."""
        values = ((one.name, getattr(self, one.name)) for one in fields(self))
        return {name: value for name, value in values if value is not None}


@dataclass(frozen=True, slots=True)
class InitImage:
    """The picture that a generation begins with, as PNG, JPEG or WebP of the size that is asked for.

    `strength` in (0, 1]. With a mask, only where that is half-bright or brighter is painted anew.
    """

    image: bytes
    image_sha256: str
    strength: float
    mask: bytes = b""
    mask_sha256: str = ""

    def forgotten(self) -> InitImage:
        """Without the bytes: what a receipt needs."""
        return replace(self, image=b"", mask=b"")


def steps_walked(num_inference_steps: int, strength: float) -> int:
    """How many of the steps image-to-image takes: the last ones, as diffusers counts them."""
    return min(int(num_inference_steps * strength), num_inference_steps)


@dataclass(frozen=True, slots=True)
class GenerationJob:
    """A validated request for pictures, with every default filled in.

    `bucket` is the exact number of rows of a forward in strict mode, 0 in fast mode. `alone` asks the
    scheduler not to batch it with others: the last try of a request whose worker died twice.
    """

    id: str
    prompt: str
    negative_prompt: str | None
    adapters: tuple[AdapterUse, ...]
    seed: int
    num_images: int
    num_inference_steps: int
    guidance_scale: float
    scheduler: str
    width: int
    height: int
    mode: Mode
    bucket: int
    image_format: ImageFormat = ImageFormat.PNG
    alone: bool = False
    guidance_rescale: float = 0.0
    scheduler_options: SchedulerOptions = SchedulerOptions()
    init: InitImage | None = None
    controlnets: tuple[ControlUse, ...] = ()
    clip_skip: int = 0
    preview_steps: int = 0  # a preview every so many steps; 0 = none
    buckets: tuple[int, ...] = ()  # of each of a picture's forwards, where they differ; the last one holds
    # Whose it is, where several share the device; and how it counts among them.
    client: str = ""
    priority: Priority = Priority.NORMAL

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1.0

    @property
    def steps(self) -> int:
        """Steps that a picture takes: fewer than `num_inference_steps` where it begins with another."""
        n = self.num_inference_steps
        return steps_walked(n, self.init.strength) if self.init else n

    def bucket_at(self, forward: int) -> int:
        """The exact number of rows of a picture's forward, counted from 0; 0 in fast mode."""
        return self.buckets[min(forward, len(self.buckets) - 1)] if self.buckets else self.bucket

    @property
    def rows_per_image(self) -> int:
        return 2 if self.guided else 1


@dataclass(frozen=True, slots=True)
class TrainingImage:
    """An uploaded picture on disk, with its caption ("" = the instance prompt)."""

    path: str
    caption: str


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """A training to begin or to go on with.

    `resume_step` is the step of the last checkpoint in the store (0 = from the beginning), `sampled` the
    (step, prompt index) pairs whose sample pictures are kept already; `class_images` are the files of the
    class pictures that are, by their numbers. `bases` is the folder for full weights of a base that is
    learned whole, "" where they are not kept.
    """

    id: str
    name: str
    version: int
    recipe: Recipe
    images: tuple[TrainingImage, ...]
    resume_step: int = 0
    sampled: frozenset[tuple[int, int]] = frozenset()
    bases: str = ""
    class_images: tuple[tuple[int, str], ...] = ()

    @property
    def priority(self) -> Priority:
        """How it counts among trainings."""
        return self.recipe.priority


# ---------------------------------------------------------------------------------------------- the base
@dataclass(frozen=True, slots=True)
class Costs:
    """What painting costs on this device, measured at the start.

    `row_seconds`: a row of the smallest forward at the base's native size. `row_pixel_bytes`: what a forward
    needs beside the weights, for each row and pixel; `decode_pixel_bytes`: the same for decoding a picture.
    `free_bytes`: what there was for it.
    """

    row_seconds: float = 0.0
    row_pixel_bytes: float = 0.0
    decode_pixel_bytes: float = 0.0
    free_bytes: int = 0

    def forward_bytes(self, rows: int, width: int, height: int) -> int:
        return int(rows * width * height * self.row_pixel_bytes)

    def decode_bytes(self, width: int, height: int) -> int:
        return int(width * height * self.decode_pixel_bytes)


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """The resident base model. `schedulers` are those that it can be used with; `scheduler_options`: which
    `SchedulerOptions` each of all has; `inpainting`: its U-Net wants a picture and a mask besides;
    `training`: how it can be taught; `quantization`: of the U-Net's linear layers ("", int8, fp8);
    `config_sha256`: over its configs, "" where a single file has none; `compiled`: its U-Net runs so.
    """

    reference: str
    family: str
    sha256: str
    native_width: int
    native_height: int
    prediction_type: str
    default_scheduler: str
    max_prompt_tokens: int
    num_parameters: int
    device: str
    device_description: str
    dtype: str
    memory_total_bytes: int
    versions: tuple[tuple[str, str], ...]
    inpainting: bool = False
    controlnets: tuple[ControlNetInfo, ...] = ()
    max_clip_skip: int = 0
    schedulers: tuple[str, ...] = SCHEDULERS
    scheduler_options: tuple[tuple[str, tuple[str, ...]], ...] = ()
    training: TrainingAbilities = field(default_factory=TrainingAbilities)
    quantization: str = ""
    config_sha256: str = ""
    compiled: bool = False
