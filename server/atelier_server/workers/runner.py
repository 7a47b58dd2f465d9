"""The runner: does on the device what the loop asks for.

The one place, with the worker's entry, that knows engine, adapters, diffusion and training together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import monotonic
from traceback import clear_frames

import torch

from atelier_server.adapters.bank import ActiveRows, RowsKey, SlotBank
from atelier_server.adapters.canonical import CanonicalAdapter, blank
from atelier_server.adapters.host import HostTier
from atelier_server.adapters.store import AdapterStore
from atelier_server.core import AdapterUse, BaseInfo, CheckpointId, Costs, TrainingJob
from atelier_server.diffusion.base import load_base
from atelier_server.diffusion.compiling import compile_blocks, eager
from atelier_server.diffusion.conditioning import Conditioning, Framing
from atelier_server.diffusion.controlnet import ControlNets
from atelier_server.diffusion.denoiser import Denoiser, Picture
from atelier_server.diffusion.init_image import InitImages
from atelier_server.diffusion.meter import peak_bytes
from atelier_server.diffusion.trajectory import Trajectory, all_or_none
from atelier_server.engine.runner import Decoded, Memory, OnDevice, TrainingRun, TrainOutcome
from atelier_server.engine.scheduler import ImageTask
from atelier_server.errors import OutOfMemory
from atelier_server.messages import WorkerSettings
from atelier_server.report import AdapterComparison, AdapterReport, ImportTerms, PublishAs
from atelier_server.training.trainer import Trainer
from atelier_server.workers import device
from atelier_server.workers.adapters import AdapterFiles
from atelier_server.workers.craft import Craft
from atelier_server.workers.darkroom import Darkroom
from atelier_server.workers.probe import Probe
from atelier_server.workers.texts import Texts
from atelier_server.workers.trainings import TrainerRuns

# Of the free memory; the rest is for what kernels use inside, and for fragments.
_MEMORY_SHARE = 0.9
_FREE_SECONDS = 0.5  # how long the free memory is taken to stay the same


class TorchRunner:
    """One base, one bank, one denoiser. Called from the loop's thread; only the darkroom works beside it."""

    def __init__(self, settings: WorkerSettings) -> None:
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.base = load_base(
            settings.model,
            settings.device,
            settings.dtype,
            quantization=settings.quantize,
            offload=settings.offload,
        )
        self.bank = SlotBank(slots=settings.slots, max_rank=settings.max_lora_rank)
        for component in ("unet", *self.base.family.text_encoders):
            self.bank.wrap(self.base.modules[component], component)
        # As they were written, where the U-Net runs compiled.
        self._eagerly: Callable[[], AbstractContextManager[object]] = nullcontext
        if settings.compile:
            compile_blocks(self.base.unet)
            self._eagerly = eager
        self.denoiser = Denoiser(self.base.unet, self.base.scheduler_config)
        self._probe = Probe(self.base, self.denoiser, self.bank)
        self._controlnets = ControlNets(dict(settings.controlnets), self.base)
        self._info = device.describe(
            self.base, self.denoiser.prediction_type, self._controlnets.infos, compiled=settings.compile
        )
        self.store = AdapterStore.at(
            Path(settings.data_dir), settings.store, settings.store_cache_bytes, settings.owner
        )
        self._pictures: dict[int, Picture] = {}  # by arrival
        self._texts = Texts(self.base, self.bank)
        self._init_images = InitImages(self.base)
        self._files = AdapterFiles(self.base, self.bank, self.store)
        self._craft = Craft(self.base, self.bank, self._files)
        self.host = HostTier(self._files.read, settings.host_adapter_bytes)
        # Told by the heartbeat's thread, so counted here and not there.
        self._base_bytes = device.weight_bytes(self.base) + self._controlnets.size_bytes
        self._bank_bytes = 0
        self._trainings = TrainerRuns(self._trainer, self._eagerly)
        # On a CPU the libraries are most of a process; nearly nothing of a GPU is taken at this point.
        self._runtime_bytes = max(0, device.memory(self.base.device).allocated - self._base_bytes)
        self._costs = Costs()
        self._free_bytes, self._free_at = 0, -_FREE_SECONDS
        self._rows: tuple[RowsKey, ActiveRows] | None = None
        self._darkroom = Darkroom(self.base, self._info)

    # ------------------------------------------------------------------------------------------- pictures
    def open(self, task: ImageTask, slots: Mapping[CheckpointId, int]) -> None:
        job = task.job
        trajectory = Trajectory.begin(
            job.scheduler,
            self.base.scheduler_config,
            options=job.scheduler_options,
            num_inference_steps=job.num_inference_steps,
            seed=task.seed,
            shape=self.base.latent_shape(job.width, job.height),
            device=self.base.device,
            dtype=self.base.dtype,
            init=self._init_images.latents(job.init) if job.init else None,
            inpainting_unet=self._info.inpainting,
        )
        adapters = [(use, slots[use.checkpoint]) for use in job.adapters]
        condition = partial(self.base.family.condition, framing=Framing.whole(job.width, job.height))
        prompt, negative = self._texts.pair(job, adapters)
        self._pictures[task.arrival] = Picture(
            trajectory=trajectory,
            prompt=condition(prompt),
            negative=condition(negative) if negative else None,
            guidance_scale=job.guidance_scale,
            guidance_rescale=job.guidance_rescale,
            controls=[self._controlnets.control(use) for use in job.controlnets],
        )

    def steps(self, task: ImageTask) -> int:
        return len(self._pictures[task.arrival].trajectory.timesteps)

    def denoise(
        self, tasks: Sequence[ImageTask], bucket: int, slots: Mapping[CheckpointId, int]
    ) -> list[bool]:
        # Texts of one length share a forward: a mask for the shorter ones would change their bits.
        alike: dict[int, list[ImageTask]] = {}
        for task in tasks:
            alike.setdefault(self._pictures[task.arrival].tokens, []).append(task)
        # The loop may try them again, in a smaller forward.
        with all_or_none([self._pictures[task.arrival].trajectory for task in tasks]):
            for group in alike.values():
                self._step(group, bucket, slots)
            if self.base.device.type == "cuda":
                # Not the device: pictures are decoded on a stream beside this one.
                torch.cuda.current_stream(self.base.device).synchronize()
        return [self._pictures[task.arrival].trajectory.finished for task in tasks]

    def _step(self, tasks: Sequence[ImageTask], bucket: int, slots: Mapping[CheckpointId, int]) -> None:
        """One forward of exactly `bucket` rows."""
        pictures = [self._pictures[task.arrival] for task in tasks]
        rows: list[list[tuple[int, float]]] = []
        for task, picture in zip(tasks, pictures, strict=True):
            step = picture.trajectory.step
            row = [(slots[use.checkpoint], use.weight_at(step)) for use in task.job.adapters]
            rows += [row] * task.rows
        rows += [[]] * (bucket - len(rows))
        with self.bank.use(self.gather(rows)):
            self.denoiser.step(pictures, bucket)

    def decode(self, task: ImageTask, done: Callable[[Decoded], None], *, alone: bool = False) -> None:
        latents = self._pictures[task.arrival].trajectory.latents[0]
        decoding = self._darkroom.decode(task, latents, done, tiled=self._large(task))
        if alone:
            decoding.result()

    def preview(self, task: ImageTask, done: Callable[[bytes], None]) -> None:
        self._darkroom.preview(task, self._pictures[task.arrival].trajectory, done)

    def close(self, task: ImageTask) -> None:
        self._pictures.pop(task.arrival, None)

    def _large(self, task: ImageTask) -> bool:
        """Whether decoding it whole would take half the device: by its total memory, so that a size is always
        decoded the same way."""
        needed = self._costs.decode_bytes(task.job.width, task.job.height)
        return needed > self._info.memory_total_bytes // 2

    def gather(self, rows: list[list[tuple[int, float]]]) -> ActiveRows:
        """The bank's rows, gathered anew only when the batch or a slot has changed."""
        key = self.bank.key(rows)
        if self._rows is None or self._rows[0] != key:
            self._rows = None  # not two of them at a time
            self._rows = (key, self.bank.gather(rows))
        return self._rows[1]

    # ------------------------------------------------------------------------------------------- adapters
    def load(self, use: AdapterUse, slot: int) -> str:
        adapter, held = self.host.fetch(use)
        with self._where_it_goes(adapter):
            self.bank.load(slot, adapter)
        self._bank_bytes = self.bank.size_bytes
        return "host" if held else "disk"

    def _where_it_goes(self, adapter: CanonicalAdapter) -> AbstractContextManager[None]:
        """Text encoders that the adapter changes are on the device, and so is what the bank adds to them."""
        names = {*adapter.modules, *(f"{n}." for by in adapter.tokens.values() for n in by)}
        return self.base.at_work(*{name.partition(".")[0] for name in names})

    def prefetch(self, use: AdapterUse) -> None:
        self.host.prefetch(use)

    def clear(self, slot: int) -> None:
        self.bank.clear(slot)

    def import_adapter(
        self, path: str, name: str, new_version: bool, terms: ImportTerms, on_device: OnDevice
    ) -> tuple[CheckpointId, AdapterReport]:
        return self._files.take(
            Path(path), name, new_version, terms, lambda adapter: on_device(lambda: self._tried(adapter))
        )

    def _tried(self, adapter: CanonicalAdapter) -> float | None:
        """How far it moves the U-Net; None where that does not fit the memory of now."""
        try:
            with self._eagerly():  # its single row would compile all graphs anew
                return self._probe.measure(adapter)
        except Exception as error:
            if self.out_of_memory(error) is None:
                raise
            return None

    def export_adapter(self, use: AdapterUse, layout: str, path: str) -> tuple[int, str]:
        return self._files.export(use, layout, Path(path))

    def merge_adapters(
        self, uses: Sequence[AdapterUse], rank: int | None, target: PublishAs
    ) -> tuple[CheckpointId, float]:
        return self._craft.merge(uses, rank, target)

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
        return self._craft.extract(tuned, base, rank, target, progress, public=public)

    def diff_adapters(self, a: AdapterUse, b: AdapterUse) -> AdapterComparison:
        return self._craft.diff(a, b)

    # ------------------------------------------------------------------------------------------ trainings
    def open_training(self, job: TrainingJob) -> TrainingRun:
        return self._trainings.open(job)

    def train(self, runs: Sequence[TrainingRun]) -> list[TrainOutcome]:
        return self._trainings.train(runs)

    def _trainer(self, job: TrainingJob) -> Trainer:
        return Trainer(job, base=self.base, denoiser=self.denoiser, bank=self.bank, store=self.store)

    # --------------------------------------------------------------------------------------------- device
    @property
    def info(self) -> BaseInfo:
        return self._info

    def measure(self) -> Costs:
        """Runs a forward of two rows at native size twice, and decodes one picture."""
        base = self.base
        pixels = base.native_width * base.native_height
        channels, height, width = base.latent_shape(base.native_width, base.native_height)
        shape = (2, base.unet.config.in_channels, height, width)
        latents = torch.zeros(shape, device=base.device, dtype=base.dtype)
        framing = Framing.whole(base.native_width, base.native_height)
        prompts = Conditioning.stack([base.family.condition(self._texts.prompt(""), framing)], 2)
        timesteps = torch.zeros(2, device=base.device)

        def forward() -> None:
            with torch.no_grad():
                self.denoiser.predict(latents, timesteps, prompts).sum().item()  # waits for the device

        with self._eagerly():
            forward_bytes = peak_bytes(forward)
        if self._eagerly is eager:
            self._compile_ahead(forward)
        before = monotonic()
        forward()
        seconds = monotonic() - before
        decode_bytes = peak_bytes(lambda: base.decode_latents(latents[0, :channels]))
        self._costs = Costs(
            row_seconds=seconds / len(latents),
            row_pixel_bytes=forward_bytes / len(latents) / pixels,
            decode_pixel_bytes=decode_bytes / pixels,
            free_bytes=int(_MEMORY_SHARE * device.free_bytes(base.device)),
        )
        return self._costs

    def _compile_ahead(self, forward: Callable[[], None]) -> None:
        """The graphs without an adapter and with one on the attention, before anybody waits for them."""
        forward()
        self.bank.load(1, blank(self.bank.shapes))
        with self.bank.use(self.gather([[(1, 1.0)]] * 2)):
            forward()
        self.bank.clear(1)

    def row_limit(self, width: int, height: int) -> int:
        """How many rows of that size fit the memory of now."""
        now = monotonic()
        if now - self._free_at > _FREE_SECONDS:
            self._free_bytes, self._free_at = int(_MEMORY_SHARE * device.free_bytes(self.base.device)), now
        return self._free_bytes // max(1, self._costs.forward_bytes(1, width, height))

    def out_of_memory(self, error: Exception) -> OutOfMemory | None:
        told = device.out_of_memory(error, self.base.device)
        if told is not None:
            self._rows = None
            # What the failed step held lives in the frames that the error came through.
            clear_frames(error.__traceback__)
            if self.base.device.type == "cuda":
                torch.cuda.empty_cache()
        return told

    def memory(self) -> Memory:
        memory = device.memory(self.base.device)
        parts = {"base": self._base_bytes, "bank": self._bank_bytes}
        parts["training"] = self._trainings.state_bytes
        parts["runtime"] = self._runtime_bytes
        parts["activations"] = max(0, memory.allocated - sum(parts.values()))
        return replace(memory, components=tuple(parts.items()))
