"""What a worker tells the front."""

from __future__ import annotations

from dataclasses import dataclass, field

from atelier_server.core import BaseInfo, CheckpointId, Costs, State
from atelier_server.errors import Violation
from atelier_server.origin import Origin
from atelier_server.report import AdapterComparison, AdapterReport


@dataclass(frozen=True, slots=True)
class WorkerReady:
    base: BaseInfo
    slots: int
    costs: Costs


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
class PreviewReady:
    """A glance at picture `index` after `step` forwards of it."""

    job_id: str
    index: int
    step: int
    mime_type: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Timings:
    queue_seconds: float = 0.0
    encode_seconds: float = 0.0
    denoise_seconds: float = 0.0
    decode_seconds: float = 0.0
    image_encode_seconds: float = 0.0
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
    violations: tuple[Violation, ...] = ()


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
    validation_loss: float | None = None
    kept_share: float | None = None


@dataclass(frozen=True, slots=True)
class ClassImageReady:
    """A class picture of a training with prior preservation. The last one is followed by `TrainingPaused`:
    the training begins once it is submitted with all of them.
    """

    job_id: str
    number: int
    mime_type: str
    data: bytes


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
class TrainingPaused:
    """The training has left the device; it can go on from `step`, its last checkpoint.

    `reason` is "" where that was asked for, else what is in its way (STORAGE_FULL).
    """

    job_id: str
    step: int
    reason: str = ""
    message: str = ""


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
    report: AdapterReport


@dataclass(frozen=True, slots=True)
class AdapterExported:
    call_id: str
    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class AdapterMade:
    """`kept`: the share of the change's squared norm that the rank could hold."""

    call_id: str
    checkpoint: CheckpointId
    kept: float


@dataclass(frozen=True, slots=True)
class AdaptersDiffed:
    call_id: str
    comparison: AdapterComparison


@dataclass(frozen=True, slots=True)
class CallProgress:
    """How far a long call has come."""

    call_id: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class CallFailed:
    """A call (not a job) could not be done. `reason` is a key of `errors.by_reason`."""

    call_id: str
    reason: str
    message: str
    metadata: tuple[tuple[str, str], ...] = ()
    violations: tuple[Violation, ...] = ()


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Sent about once a second and whenever residency changes, also in the middle of long work.

    `turns` counts the steps that the device has begun; `idle`: it waits for something to do.
    """

    queued_generations: int
    running_images: int
    running_trainings: int
    resident: tuple[CheckpointId, ...]
    memory_allocated_bytes: int
    memory_reserved_bytes: int
    memory_peak_bytes: int
    component_bytes: tuple[tuple[str, int], ...] = ()
    host_adapters: int = 0
    host_contents: frozenset[str] = frozenset()
    turns: int = 0
    idle: bool = True


@dataclass(frozen=True, slots=True)
class Sample:
    """One observation for a metric of `metrics.py`: its name, its value, its labels in order."""

    metric: str
    value: float
    labels: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Span:
    """A finished phase of a job whose origin is traced. Times are nanoseconds since 1970."""

    name: str
    origin: Origin
    start_ns: int
    end_ns: int
    attributes: tuple[tuple[str, str | int | float], ...] = ()


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
    | PreviewReady
    | GenerationCompleted
    | JobFailed
    | JobCancelled
    | TrainingStarted
    | TrainingProgress
    | CheckpointPublished
    | ClassImageReady
    | SampleReady
    | TrainingWarning
    | TrainingPaused
    | TrainingCompleted
    | AdapterLoaded
    | AdaptersUnloaded
    | AdapterImported
    | AdapterExported
    | AdapterMade
    | AdaptersDiffed
    | CallProgress
    | CallFailed
    | Heartbeat
    | Sample
    | Span
)
