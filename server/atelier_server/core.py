"""The nouns that every room shares, and the messages between front and worker.

Everything here is frozen, cheap to pickle, and free of torch, protobuf and gRPC. `Command`s go down to the
worker, `Event`s come up from it; nothing else crosses the process border.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum

ADAPTER_NAME = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
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


class State(StrEnum):
    """The life of a training."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self in (State.SUCCEEDED, State.FAILED, State.CANCELLED)


class Mode(StrEnum):
    """The reproducibility promise of a generation."""

    FAST = "fast"
    STRICT = "strict"


class ImageFormat(StrEnum):
    """The file format of a finished picture."""

    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"

    @property
    def mime_type(self) -> str:
        return f"image/{self.value}"


# ---------------------------------------------------------------------------------------------- adapters
@dataclass(frozen=True, slots=True)
class AdapterRef:
    """What a user writes: NAME[@STEP|@TAG][:WEIGHT]."""

    name: str
    selector: str = ""
    weight: float = 1.0

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
        return f"{self.name}@{self.step}"


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """A checkpoint at a weight, as a generation uses it. `path` is its safetensors file."""

    checkpoint: CheckpointId
    weight: float
    path: str
    sha256: str


# ------------------------------------------------------------------------------------------------- jobs
@dataclass(frozen=True, slots=True)
class GenerationJob:
    """A validated request for pictures, with every default filled in.

    `bucket` is the exact number of rows of a forward in strict mode, 0 in fast mode. `alone` asks the
    scheduler not to batch it with others: the last try of a request whose worker died twice.
    """

    id: str
    prompt: str
    negative_prompt: str
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

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1.0

    @property
    def rows_per_image(self) -> int:
        return 2 if self.guided else 1


@dataclass(frozen=True, slots=True)
class TrainingImage:
    """An uploaded picture on disk, with its caption ("" = the instance prompt)."""

    path: str
    caption: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train: `TrainingRecipe` of the contract with every default filled in."""

    instance_prompt: str
    resolution: int
    method: str = "lora"
    max_train_steps: int = 500
    learning_rate: float = 1e-4
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    train_batch_size: int = 4
    rank: int = 8
    lora_alpha: float = 8.0
    random_crop: bool = False
    random_flip: bool = False
    seed: int = 0
    checkpointing_steps: int = 100
    validation_prompts: tuple[str, ...] = ()
    validation_steps: int = 30
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 0.01
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    snr_gamma: float | None = None
    caption_dropout: float = 0.0


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """A training to begin or to go on with.

    `resume_step` is the step of the last checkpoint in the store (0 = from the beginning), `sampled` the
    (step, prompt index) pairs whose sample pictures are kept already.
    """

    id: str
    name: str
    version: int
    recipe: Recipe
    images: tuple[TrainingImage, ...]
    resume_step: int = 0
    sampled: frozenset[tuple[int, int]] = frozenset()


# --------------------------------------------------------------------------------------------- commands
@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """The first message to a worker: what it needs of the server's settings. `threads` 0 = one a core."""

    model: str
    device: str
    dtype: str
    data_dir: str
    slots: int
    threads: int
    max_lora_rank: int
    max_adapters_per_image: int


@dataclass(frozen=True, slots=True)
class Submit:
    job: GenerationJob | TrainingJob


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stops a job at its next step. A training publishes what it has learned first."""

    job_id: str


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """Answered by `AdapterLoaded` with the same `call_id`."""

    call_id: str
    use: AdapterUse


@dataclass(frozen=True, slots=True)
class UnloadAdapter:
    """Frees the slots of these checkpoints; answered by `AdaptersUnloaded`."""

    call_id: str
    checkpoints: tuple[CheckpointId, ...]


@dataclass(frozen=True, slots=True)
class ImportAdapter:
    """Checks the safetensors file at `path` against the base and publishes it as step 0 of a new version.

    Answered by `AdapterImported` or `CallFailed`.
    """

    call_id: str
    path: str
    name: str
    new_version: bool
    trigger: str


@dataclass(frozen=True, slots=True)
class ExportAdapter:
    """Writes the checkpoint in `layout` ("diffusers", "kohya", "peft") to `path`.

    Answered by `AdapterExported` or `CallFailed`.
    """

    call_id: str
    use: AdapterUse
    layout: str
    path: str


@dataclass(frozen=True, slots=True)
class Drain:
    """Finish running generations, checkpoint trainings, then exit."""


Command = Submit | Cancel | LoadAdapter | UnloadAdapter | ImportAdapter | ExportAdapter | Drain


# ----------------------------------------------------------------------------------------------- events
@dataclass(frozen=True, slots=True)
class BaseInfo:
    """The resident base model."""

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


@dataclass(frozen=True, slots=True)
class WorkerReady:
    base: BaseInfo
    slots: int


@dataclass(frozen=True, slots=True)
class WorkerFailed:
    """The worker cannot start at all (a bad model reference, say); it exits after this."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Queued:
    job_id: str
    position: int


@dataclass(frozen=True, slots=True)
class Progress:
    """Denoise steps of a generation, over all its pictures."""

    job_id: str
    step: int
    total: int


@dataclass(frozen=True, slots=True)
class ImageReady:
    job_id: str
    index: int
    seed: int
    mime_type: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Timings:
    queue_seconds: float = 0.0
    encode_seconds: float = 0.0
    denoise_seconds: float = 0.0
    decode_seconds: float = 0.0
    total_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class GenerationCompleted:
    job_id: str
    timings: Timings
    bucket: int


@dataclass(frozen=True, slots=True)
class JobFailed:
    """A job ended for a reason of its own. `reason` is a key of `errors.by_reason`."""

    job_id: str
    reason: str
    message: str
    metadata: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class JobCancelled:
    """A generation stopped because nobody reads it. A training ends with `TrainingCompleted`."""

    job_id: str


@dataclass(frozen=True, slots=True)
class TrainingStarted:
    """The training has its data and its weights; `from_step` is above 0 after a restart."""

    job_id: str
    from_step: int


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    job_id: str
    step: int
    max_train_steps: int
    loss: float
    learning_rate: float
    seconds_left: float


@dataclass(frozen=True, slots=True)
class CheckpointPublished:
    job_id: str
    checkpoint: CheckpointId
    sha256: str
    size_bytes: int
    loss: float


@dataclass(frozen=True, slots=True)
class SampleReady:
    job_id: str
    step: int
    index: int
    prompt: str
    seed: int
    mime_type: str
    data: bytes


@dataclass(frozen=True, slots=True)
class TrainingWarning:
    job_id: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class TrainingCompleted:
    """The training ended well (SUCCEEDED) or on request (CANCELLED) at `step`."""

    job_id: str
    state: State
    step: int
    seconds: float


@dataclass(frozen=True, slots=True)
class AdapterLoaded:
    call_id: str
    loaded: bool


@dataclass(frozen=True, slots=True)
class AdaptersUnloaded:
    call_id: str
    unloaded: int


@dataclass(frozen=True, slots=True)
class AdapterImported:
    call_id: str
    checkpoint: CheckpointId
    detected_format: str
    matched_modules: int


@dataclass(frozen=True, slots=True)
class AdapterExported:
    call_id: str
    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class CallFailed:
    """A call (not a job) could not be done. `reason` is a key of `errors.by_reason`."""

    call_id: str
    reason: str
    message: str
    metadata: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Sent about once a second and whenever residency changes, also in the middle of long work."""

    queued_generations: int
    running_images: int
    running_trainings: int
    resident: tuple[CheckpointId, ...]
    memory_allocated_bytes: int
    memory_reserved_bytes: int
    memory_peak_bytes: int
    component_bytes: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """One observation for a metric of `metrics.py`: its name, its value, its labels in order."""

    metric: str
    value: float
    labels: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """Made by the front's WorkerHandle, never sent: the process is gone."""

    exit_code: int | None


Event = (
    WorkerReady
    | WorkerFailed
    | WorkerLost
    | Queued
    | Progress
    | ImageReady
    | GenerationCompleted
    | JobFailed
    | JobCancelled
    | TrainingStarted
    | TrainingProgress
    | CheckpointPublished
    | SampleReady
    | TrainingWarning
    | TrainingCompleted
    | AdapterLoaded
    | AdaptersUnloaded
    | AdapterImported
    | AdapterExported
    | CallFailed
    | Heartbeat
    | Sample
)
