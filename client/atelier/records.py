"""What the server keeps and is, as frozen dataclasses named and shaped like the contract's messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from atelier.events import TrainingState


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A published, immutable set of LoRA weights. `loss` is None for an import."""

    step: int
    sha256: str
    size_bytes: int
    create_time: datetime | None
    loss: float | None
    resident: bool
    tags: tuple[str, ...] = ()
    damaged: bool = False
    tier: str = "unspecified"
    last_used_time: datetime | None = None
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class UnmatchedPart:
    """Something in a file that the base takes no change from: its name there, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class KindCount:
    """How many modules are of a kind: "lora", "locon", "dora", "loha", "lokr", "full", "norm"."""

    kind: str
    modules: int


@dataclass(frozen=True, slots=True)
class RankCount:
    rank: int
    modules: int


@dataclass(frozen=True, slots=True)
class AlphaCount:
    alpha: float
    modules: int


@dataclass(frozen=True, slots=True)
class LearnedToken:
    placeholder: str
    vectors: int
    encoders: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BlockNorm:
    """How large the change of a block is (Frobenius)."""

    block: str
    norm: float


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """What an import understood of a file; labels are the file's own, the modules alone decided if it fits.

    `coverage`: what share of it fits; below 1 it was taken in part, and `unmatched` tells why. `probe`: how
    far the U-Net's output moves, None where it was not measured. `difference_bytes`: what it takes on the
    device beside its slot.
    """

    format: str
    confidence: float
    software: str
    family: str
    evidence: str
    base_family: str
    matched: tuple[str, ...]
    unmatched: tuple[UnmatchedPart, ...]
    coverage: float
    kinds: tuple[KindCount, ...]
    ranks: tuple[RankCount, ...]
    alphas: tuple[AlphaCount, ...]
    tokens: tuple[LearnedToken, ...]
    triggers: tuple[str, ...]
    metadata: Mapping[str, str]
    norms: tuple[BlockNorm, ...]
    probe: float | None = None
    difference_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Adapter:
    """One version of an adapter with its checkpoints in the order of their steps.

    `thumbnail` is a small WebP file, b"" if there is none or it was not asked for; `tier` is device,
    host, disk or remote.
    """

    name: str
    version: int
    tags: tuple[str, ...]
    checkpoints: tuple[Checkpoint, ...]
    recommended_step: int
    trigger: str
    rank: int
    lora_alpha: float
    base_model: str
    base_sha256: str
    training: str
    create_time: datetime | None
    family: str = ""
    note: str = ""
    thumbnail: bytes = field(default=b"", repr=False)
    damaged: bool = False
    size_bytes: int = 0
    last_used_time: datetime | None = None
    delete_time: datetime | None = None
    expire_time: datetime | None = None
    tier: str = "unspecified"
    recipe: Mapping[str, Any] = field(default_factory=dict)
    report: AdapterReport | None = None


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """`adapter` is the checkpoint in full; `loaded` is False if it was in a slot already."""

    adapter: str
    loaded: bool


@dataclass(frozen=True, slots=True)
class ImportedAdapter:
    adapter: Adapter
    detected_format: str
    matched_modules: int
    report: AdapterReport | None = None


@dataclass(frozen=True, slots=True)
class ExportedAdapter:
    """The file at `path` holds the checkpoint `adapter`; its digest has been checked."""

    adapter: str
    size_bytes: int
    sha256: str
    path: Path


@dataclass(frozen=True, slots=True)
class Training:
    """A training as it stands. `recipe` holds the fields that were set, by the contract's names.

    `kept_bases`, which `get_training` alone tells: folders on the server for `atelier serve --model`.
    """

    id: str
    adapter: str
    version: int
    state: TrainingState
    step: int
    loss: float
    recipe: Mapping[str, Any]
    last_seq: int
    create_time: datetime | None
    end_time: datetime | None
    reason: str
    message: str
    kept_bases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TrainingImage:
    """A picture to learn from: a PNG, JPEG or WebP file. No caption means the instance prompt."""

    data: bytes = field(repr=False)
    filename: str = ""
    caption: str = ""


@dataclass(frozen=True, slots=True)
class BaseModel:
    reference: str
    family: str
    sha256: str
    native_width: int
    native_height: int
    prediction_type: str
    default_scheduler: str
    max_prompt_tokens: int
    num_parameters: int
    inpainting: bool = False
    quantization: str = ""
    training_methods: tuple[str, ...] = ()
    training_optimizers: tuple[str, ...] = ()
    training_precisions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Device:
    name: str
    description: str
    dtype: str
    memory_total_bytes: int
    memory_allocated_bytes: int


@dataclass(frozen=True, slots=True)
class Limits:
    """What a single request may ask for."""

    max_num_images: int
    max_inference_steps: int
    max_width: int
    max_height: int
    max_adapters_per_image: int
    max_lora_rank: int
    max_prompt_characters: int
    max_train_steps: int
    max_train_images: int
    max_image_bytes: int
    max_image_pixels: int
    max_adapter_bytes: int
    max_queued_generations: int
    max_train_batch_size: int
    max_request_bytes: int = 0
    max_generate_calls: int = 0
    max_train_calls: int = 0
    max_control_calls: int = 0
    max_uploads: int = 0
    max_queued_trainings: int = 0


@dataclass(frozen=True, slots=True)
class Quotas:
    """What the caller's tenant may have at once; None is without bound."""

    max_images: int | None = None
    max_trainings: int | None = None
    max_stored_bytes: int | None = None
    max_train_steps_per_day: int | None = None


@dataclass(frozen=True, slots=True)
class AdapterSlots:
    total: int
    used: int
    adapters: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ControlNet:
    """One that the server has loaded, for `generate(controlnets=...)`."""

    name: str
    reference: str
    sha256: str


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """`ready`: the worker takes Generate and Train; otherwise `message` says why not. `tenant` is whose
    the call was.
    """

    ready: bool
    message: str
    base_model: BaseModel
    device: Device
    limits: Limits
    slots: AdapterSlots
    versions: dict[str, str]
    worker_restarts: int
    schedulers: tuple[str, ...]
    tenant: str = ""
    quotas: Quotas = Quotas()
    controlnets: tuple[ControlNet, ...] = ()


@dataclass(frozen=True, slots=True)
class MergedAdapter:
    """`kept`: the share of the change's squared norm that the result keeps; 1 without a rank."""

    adapter: Adapter
    kept: float


@dataclass(frozen=True, slots=True)
class ExtractedAdapter:
    """`kept`: the share of the difference's squared norm that the rank could hold."""

    adapter: Adapter
    kept: float


@dataclass(frozen=True, slots=True)
class ModuleDiff:
    """A module that two adapters change in different forms; rank 0 is a full difference."""

    name: str
    kind_a: str
    rank_a: int
    alpha_a: float
    kind_b: str
    rank_b: int
    alpha_b: float


@dataclass(frozen=True, slots=True)
class BlockDiff:
    """Norms of both changes and of their difference; `cosine` is None where one of the norms is 0."""

    block: str
    norm_a: float
    norm_b: float
    norm_difference: float
    cosine: float | None


@dataclass(frozen=True, slots=True)
class AdapterDiff:
    """Two checkpoints side by side. `only_a`, `only_b`: modules that the other does not change."""

    a: str
    b: str
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    common: int
    differing: tuple[ModuleDiff, ...]
    blocks: tuple[BlockDiff, ...]
    whole: BlockDiff
