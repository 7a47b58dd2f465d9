"""What the front asks of a worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from atelier_server.core import AdapterUse, CheckpointId, GenerationJob, TrainingJob
from atelier_server.origin import NOWHERE, Origin
from atelier_server.report import ImportTerms, PublishAs


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """The first message to a worker: what it needs of the server's settings. `threads` 0 = one a core.

    `store` is the URL of the adapter store, "" for the data directory; `owner` this server's name in it.
    """

    model: str
    device: str
    dtype: str
    data_dir: str
    slots: int
    threads: int
    max_lora_rank: int
    host_adapter_bytes: int
    compile: bool = False
    log_level: str = "info"
    log_format: Literal["text", "json"] = "text"
    store: str = ""
    store_cache_bytes: int = 0
    owner: str = ""
    controlnets: tuple[tuple[str, str], ...] = ()
    quantize: Literal["", "int8", "fp8"] = ""
    offload: tuple[str, ...] = ()
    training_share: float = 0.25


@dataclass(frozen=True, slots=True)
class Submit:
    job: GenerationJob | TrainingJob
    origin: Origin = NOWHERE


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stops a job at its next step. A training publishes what it has learned first."""

    job_id: str


@dataclass(frozen=True, slots=True)
class Pause:
    """Stops a training at its next step, with a checkpoint; answered by `TrainingPaused` if it was there."""

    job_id: str


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """Answered by `AdapterLoaded` with the same `call_id`. `pin`: it keeps its slot until it is unloaded."""

    call_id: str
    use: AdapterUse
    pin: bool = False


@dataclass(frozen=True, slots=True)
class UnloadAdapter:
    """Frees the slots of these checkpoints; answered by `AdaptersUnloaded`."""

    call_id: str
    checkpoints: tuple[CheckpointId, ...]


@dataclass(frozen=True, slots=True)
class ImportAdapter:
    """Checks the file or folder at `path` against the base and publishes it as step 0 of a new version.

    Answered by `AdapterImported` or `CallFailed`.
    """

    call_id: str
    path: str
    name: str
    new_version: bool
    terms: ImportTerms


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
class MergeAdapters:
    """Publishes the weighted sum of `uses` as step 0 of a new version; of at most `rank` if given.

    Answered by `AdapterMade` or `CallFailed`.
    """

    call_id: str
    uses: tuple[AdapterUse, ...]
    rank: int | None
    target: PublishAs


@dataclass(frozen=True, slots=True)
class ExtractAdapter:
    """Publishes the difference of two bases, to a rank; references as `serve --model` takes them.

    `base` "" is the resident base. `public`: only what everybody may read, none of the server's own files
    and nothing that its token opens. Answered by `CallProgress`, then `AdapterMade` or `CallFailed`.
    """

    call_id: str
    tuned: str
    base: str
    rank: int
    target: PublishAs
    public: bool


@dataclass(frozen=True, slots=True)
class DiffAdapters:
    """Answered by `AdaptersDiffed` or `CallFailed`."""

    call_id: str
    a: AdapterUse
    b: AdapterUse


@dataclass(frozen=True, slots=True)
class AbandonCall:
    """Nobody waits for this call's answer any more: long ones end."""

    call_id: str


@dataclass(frozen=True, slots=True)
class Drain:
    """Finish running generations, checkpoint trainings, then exit."""


Command = (
    Submit
    | Cancel
    | Pause
    | LoadAdapter
    | UnloadAdapter
    | ImportAdapter
    | ExportAdapter
    | MergeAdapters
    | ExtractAdapter
    | DiffAdapters
    | AbandonCall
    | Drain
)
