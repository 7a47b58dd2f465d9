"""The seam between the desk and the device: what the loop asks of torch. Torch-free itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from atelier_server.core import AdapterUse, CheckpointId, TrainingJob
from atelier_server.engine.companies import Place
from atelier_server.engine.scheduler import ImageTask
from atelier_server.errors import OutOfMemory
from atelier_server.report import AdapterComparison, AdapterReport, ImportTerms, PublishAs

OnDevice = Callable[[Callable[[], float | None]], float | None]


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a training step says of itself: the mean loss of its micro-steps, and the rate that it used."""

    loss: float
    learning_rate: float


@dataclass(frozen=True, slots=True)
class Published:
    """A checkpoint that has just become visible in the store."""

    use: AdapterUse
    size_bytes: int
    loss: float
    validation_loss: float | None = None
    kept_share: float | None = None


@dataclass(frozen=True, slots=True)
class Took:
    """When something was done, on the monotonic clock."""

    began: float = 0.0
    ended: float = 0.0

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclass(frozen=True, slots=True)
class Decoded:
    """A finished picture as a file, or why there is none."""

    data: bytes
    decode: Took = Took()
    encode: Took = Took()
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on the device (on a CPU: of the process). The components add up to what is allocated."""

    allocated: int
    reserved: int
    peak: int
    components: tuple[tuple[str, int], ...] = ()


# Of one training in a micro-step: its step is done, or not yet (None: gradients are accumulated), or failed.
TrainOutcome = StepReport | Exception | None


class TrainingRun(Protocol):
    """One training on the device. It steps by `Runner.train`, together with others or alone."""

    @property
    def step(self) -> int:
        """Steps done; one may be of several micro-steps."""

    @property
    def place(self) -> Place:
        """What the next micro-step needs, and with whom it may be shared. Asked once it is prepared."""

    @property
    def published(self) -> Published | None:
        """The last checkpoint, also the one that the training goes on from."""

    def prepare(self) -> Iterator[None]:
        """Gets everything ready in small pieces; resumes from the last checkpoint."""

    def publishing(self) -> Iterator[None]:
        """What `publish` would take long for, in small pieces; the training takes no step meanwhile. What has
        been done for the weights of now is not done again."""

    def publish(self) -> Published:
        """Publishes the weights of now, atomically, with all that is needed to go on from here.

        Never asked in the midst of an accumulation.
        """


class Runner(Protocol):
    """Device work, called from the loop's thread; importing and exporting from another."""

    def open(self, task: ImageTask, slots: Mapping[CheckpointId, int]) -> None:
        """Encodes the prompts and draws the noise of a picture whose adapters lie in these slots."""

    def denoise(
        self, tasks: Sequence[ImageTask], bucket: int, slots: Mapping[CheckpointId, int]
    ) -> list[bool]:
        """One denoise step for each task; says for each whether that was its last.

        Where it raises, none of them has moved.
        """

    def steps(self, task: ImageTask) -> int:
        """How many forwards an opened picture takes in all."""

    def decode(self, task: ImageTask, done: Callable[[Decoded], None], *, alone: bool = False) -> None:
        """Turns a finished picture into a file; `done` is called from another thread.

        Beside the loop; `alone`: decoded when this returns, with nothing else on the device meanwhile.
        """

    def preview(self, task: ImageTask, done: Callable[[bytes], None]) -> None:
        """A small PNG of a picture in the making, beside the loop; `done` as above, if at all."""

    def close(self, task: ImageTask) -> None:
        """Forgets a picture, finished or not."""

    def prefetch(self, use: AdapterUse) -> None:
        """Brings a checkpoint nearer beside the loop: it will be loaded soon."""

    def load(self, use: AdapterUse, slot: int) -> str:
        """Copies a checkpoint into a slot; where it came from ("host" or "disk")."""

    def clear(self, slot: int) -> None: ...

    def open_training(self, job: TrainingJob) -> TrainingRun: ...

    def train(self, runs: Sequence[TrainingRun]) -> list[TrainOutcome]:
        """One micro-step of all of these, which have equal companies or are one; what came of it for each.

        What is one training's alone (NonfiniteLoss) is in its outcome, before its weights are touched. Where
        it raises, none of them has moved, and each may be tried again with fewer beside it.
        """

    def import_adapter(
        self, path: str, name: str, new_version: bool, terms: ImportTerms, on_device: OnDevice
    ) -> tuple[CheckpointId, AdapterReport]:
        """Checks and publishes a file or folder; `on_device` runs what has to be tried on the device."""

    def export_adapter(self, use: AdapterUse, layout: str, path: str) -> tuple[int, str]:
        """Writes a checkpoint in a layout: size in bytes and sha256."""

    def merge_adapters(
        self, uses: Sequence[AdapterUse], rank: int | None, target: PublishAs
    ) -> tuple[CheckpointId, float]:
        """Publishes the weighted sum: the checkpoint, and the share of the change that is kept."""

    def extract_adapter(
        self,
        tuned: str,
        base: str,
        rank: int,
        target: PublishAs,
        progress: Callable[[int, int], None],
        *,
        public: bool,
    ) -> tuple[CheckpointId, float]:
        """Publishes the difference of two bases; what `progress` raises ends the work."""

    def diff_adapters(self, a: AdapterUse, b: AdapterUse) -> AdapterComparison:
        """Two checkpoints side by side."""

    def out_of_memory(self, error: Exception) -> OutOfMemory | None:
        """What an out-of-memory tells users, cached memory given back before; None for other errors."""

    def memory(self) -> Memory: ...
