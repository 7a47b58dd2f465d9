"""What a running Generate or Train tells: frozen dataclasses, named and shaped like the contract's messages.

Times are aware datetimes in UTC, durations seconds, sizes bytes.
"""

from __future__ import annotations

import base64
import html
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path


class Picture:
    """What can be saved, and shown by Jupyter, because it has the bytes of a picture file."""

    __slots__ = ()

    data: bytes
    mime_type: str

    def save(self, path: str | Path) -> Path:
        """Writes the file as it came; the suffix does not change its format."""
        target = Path(path)
        target.write_bytes(self.data)
        return target

    def data_uri(self) -> str:
        return f"data:{self.mime_type};base64,{base64.b64encode(self.data).decode('ascii')}"

    def _repr_png_(self) -> bytes | None:
        return self.data if self.mime_type == "image/png" else None

    def _repr_mimebundle_(self, **_choice: object) -> dict[str, str]:
        encoded = base64.b64encode(self.data).decode("ascii")
        return {self.mime_type: encoded, "text/plain": repr(self)}


# -------------------------------------------------------------------------------------------- generation
@dataclass(frozen=True, slots=True)
class Queued:
    """`position` requests are before this one; 0 is next. Comes again when a lost worker's work is redone."""

    position: int


@dataclass(frozen=True, slots=True)
class Progress:
    """Denoise steps done and in all, over all pictures of the request."""

    step: int
    total: int


@dataclass(frozen=True, slots=True)
class Preview(Picture):
    """A rough look at picture `index` after `step` steps."""

    index: int
    step: int
    mime_type: str
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Image(Picture):
    """A finished picture, whole: `data` is the file. The same `seed` alone paints it again."""

    index: int
    mime_type: str
    data: bytes = field(repr=False)
    seed: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of the attempt that finished went, in seconds."""

    queue_seconds: float = 0.0
    encode_seconds: float = 0.0
    denoise_seconds: float = 0.0
    decode_seconds: float = 0.0
    total_seconds: float = 0.0
    restarts: int = 0


@dataclass(frozen=True, slots=True)
class ReceiptAdapter:
    """The checkpoint that a reference meant, in full. `weights` are one a step, if they changed."""

    name: str
    version: int
    step: int
    weight: float
    sha256: str
    weights: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ReceiptControlNet:
    """A ControlNet that guided the pictures, and by what."""

    name: str
    sha256: str
    image_sha256: str
    scale: float
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Receipt:
    """All that is needed to paint the same pictures again."""

    base_model: str
    base_sha256: str
    adapters: tuple[ReceiptAdapter, ...]
    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    width: int
    height: int
    reproducibility: str
    batch_bucket: int
    dtype: str
    device: str
    versions: dict[str, str]
    create_time: datetime | None
    prompt: str
    negative_prompt: str
    seed: int
    num_images: int
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
    controlnets: tuple[ReceiptControlNet, ...] = ()
    clip_skip: int = 0
    batch_buckets: tuple[int, ...] = ()
    quantization: str = ""
    base_config_sha256: str = ""
    compiled: bool = False
    device_description: str = ""
    empty_negative_prompt: bool = False


@dataclass(frozen=True, slots=True)
class Completed:
    """The last event of a generation. `batch_bucket` is the largest row bucket that a forward had."""

    seed: int
    timings: Timings
    batch_bucket: int
    receipt: Receipt


GenerationEvent = Queued | Progress | Preview | Image | Completed


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """What `generate` returns: the pictures in the order of their index, and how they came about."""

    images: tuple[Image, ...]
    seed: int
    timings: Timings
    batch_bucket: int
    receipt: Receipt

    def _repr_html_(self) -> str:
        alt = html.escape(self.receipt.prompt)
        return "".join(
            f'<img src="{image.data_uri()}" alt="{alt}" title="seed {image.seed}">' for image in self.images
        )


# ---------------------------------------------------------------------------------------------- training
class TrainingState(StrEnum):
    UNSPECIFIED = "unspecified"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self in (TrainingState.SUCCEEDED, TrainingState.FAILED, TrainingState.CANCELLED)


@dataclass(frozen=True, slots=True)
class TrainingEvent:
    """What all events of a training share. `seq` counts from 1; `watch_training` goes on after any."""

    seq: int
    training: str
    create_time: datetime | None


@dataclass(frozen=True, slots=True)
class TrainingAccepted(TrainingEvent):
    """The training is written down: it survives its client from here on. Estimates are 0 where unknown."""

    adapter: str
    version: int
    estimated_seconds: float
    estimated_bytes: int


@dataclass(frozen=True, slots=True)
class TrainingProgress(TrainingEvent):
    step: int
    max_train_steps: int
    loss: float
    learning_rate: float
    seconds_left: float


@dataclass(frozen=True, slots=True)
class CheckpointPublished(TrainingEvent):
    """`adapter`, e.g. otto@v1@750, can be used from now on. `loss` is the mean since the checkpoint before.

    `validation_loss` is that on pictures which are not learned; `kept_share` is what the adapter keeps of a
    DreamBooth's change. None where there is none.
    """

    step: int
    adapter: str
    sha256: str
    size_bytes: int
    loss: float
    validation_loss: float | None = None
    kept_share: float | None = None


@dataclass(frozen=True, slots=True)
class Sample(TrainingEvent, Picture):
    """Validation prompt number `index`, painted with the checkpoint of `step`."""

    step: int
    index: int
    prompt: str
    seed: int
    mime_type: str
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class TrainingWarning(TrainingEvent):
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class TrainingRestarted(TrainingEvent):
    """The training goes on from the checkpoint of `from_step`."""

    from_step: int
    reason: str


@dataclass(frozen=True, slots=True)
class TrainingCompleted(TrainingEvent):
    """The last event. `adapter` is the recommended checkpoint; `reason` and `message` say why one failed."""

    state: TrainingState
    step: int
    adapter: str
    seconds: float
    reason: str
    message: str
