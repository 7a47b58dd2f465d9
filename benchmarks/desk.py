"""The worker's loop and runner in this process: Atelier without its front."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue

from atelier_server.core import AdapterUse, GenerationJob, Mode
from atelier_server.engine.loop import Loop, Message
from atelier_server.engine.samples import SampleDefaults
from atelier_server.messages import Event, GenerationCompleted, ImageReady, JobFailed, Submit, WorkerSettings
from atelier_server.report import ImportTerms
from atelier_server.workers.runner import TorchRunner


class Desk:
    """Submits generations and turns the loop until they are all done."""

    def __init__(
        self,
        model: str,
        data_dir: Path,
        *,
        slots: int = 16,
        max_rank: int = 16,
        controlnets: tuple[tuple[str, str], ...] = (),
        device: str = "cpu",
        dtype: str = "auto",
    ) -> None:
        self.runner = TorchRunner(
            WorkerSettings(
                model=model,
                device=device,
                dtype=dtype,
                data_dir=str(data_dir),
                slots=slots,
                threads=1 if device == "cpu" else 0,
                max_lora_rank=max_rank,
                host_adapter_bytes=0,  # a load from a file is a load from a file
                controlnets=controlnets,
            )
        )
        self._events: list[Event] = []
        self._inbox: SimpleQueue[Message] = SimpleQueue()
        self.loop = Loop(
            runner=self.runner,
            inbox=self._inbox,
            emit=self._events.append,
            slots=slots,
            sample_defaults=SampleDefaults(64, 64, "ddim"),
        )

    def publish(self, files: Sequence[Path]) -> list[AdapterUse]:
        """Imports adapter files into the store."""
        uses = []
        for file in files:
            checkpoint, _ = self.runner.import_adapter(
                str(file), file.stem, False, ImportTerms(), lambda measure: measure()
            )
            record = self.runner.store.last_checkpoint(checkpoint.name, checkpoint.version)
            assert record is not None
            uses.append(AdapterUse(checkpoint, 1.0, record.path, record.sha256))
        return uses

    def generate(self, jobs: Sequence[GenerationJob]) -> dict[str, list[bytes]]:
        """The pictures of every job, in order."""
        self._events.clear()
        for job in jobs:
            self._inbox.put(Submit(job))
        while sum(isinstance(event, GenerationCompleted) for event in self._events) < len(jobs):
            self.loop.turn()
            if failed := [event for event in self._events if isinstance(event, JobFailed)]:
                raise RuntimeError(failed[0].message)
        pictures: dict[str, list[bytes]] = {job.id: [] for job in jobs}
        ready = [event for event in self._events if isinstance(event, ImageReady)]
        for event in sorted(ready, key=lambda event: event.index):
            pictures[event.job_id].append(event.data)
        return pictures


def job(job_id: str, prompt: str, *adapters: AdapterUse, steps: int, seed: int) -> GenerationJob:
    """A guided 64-pixel picture."""
    return GenerationJob(
        id=job_id,
        prompt=prompt,
        negative_prompt="",
        adapters=adapters,
        seed=seed,
        num_images=1,
        num_inference_steps=steps,
        guidance_scale=5.0,
        scheduler="ddim",
        width=64,
        height=64,
        mode=Mode.FAST,
        bucket=0,
    )
