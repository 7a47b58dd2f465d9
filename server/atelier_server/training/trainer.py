"""A training, whatever its method, one micro-step at a time.

    for _ in trainer.prepare(): ...                  # caches, first weights or those of a checkpoint
    outcomes = micro_step([trainer, others...])      # company.py: begin(), one forward, finish()
    trainer.publish()

It is put together of parts that each know one thing:

    Dataset    which pictures there are                                        dataset.py, pictures.py
    Rows       which of them make the next micro-step, and what it measures    rows.py, batch.py, objective.py
    Method     what is learned, which of it when, what adapter comes of it     methods/
    Texts      captions as the U-Net hears them, kept or within the graph      texts.py
    Learning   accumulation, clipping, optimizer, schedule, average of a phase learning.py

The base is the one that serves. What is being learned becomes visible to anybody else only as a checkpoint in
the store. All chance comes from one CPU generator, whose state is part of every checkpoint, with everything
else that moves: a training that goes on from one ends with the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from atelier_server.adapters.bank import SlotBank
from atelier_server.adapters.canonical import CanonicalAdapter
from atelier_server.adapters.store import ADAPTER_FILE, AdapterStore, CheckpointRecord
from atelier_server.adapters.stored import decode_stored, write_stored
from atelier_server.core import CheckpointId, TrainingJob
from atelier_server.diffusion.base import BaseModel
from atelier_server.diffusion.denoiser import Denoiser
from atelier_server.errors import AdapterMismatch, DataLoss, NonfiniteLoss, UnsupportedFormat
from atelier_server.training.batch import Batch
from atelier_server.training.checkpoint import (
    check_state,
    read_state,
    recipe_sha256,
    weights_in,
    write_state,
)
from atelier_server.training.company import Gradients, MicroBatch, StepReport, loss_of, micro_step
from atelier_server.training.dataset import Dataset
from atelier_server.training.kept_bases import KeptBases
from atelier_server.training.learning import Learning
from atelier_server.training.methods import method_of
from atelier_server.training.parts import Phase
from atelier_server.training.rows import Rows


class Trainer:
    """One job. `begin` and `finish` are for its company (`company.Member`)."""

    def __init__(
        self, job: TrainingJob, *, base: BaseModel, denoiser: Denoiser, bank: SlotBank, store: AdapterStore
    ) -> None:
        self._job = job
        self._recipe = job.recipe
        self._base = base
        self._bank = bank
        self._store = store
        self._generator = torch.Generator().manual_seed(job.recipe.seed)
        self._dataset = Dataset()
        self._method = method_of(job.recipe, base=base, denoiser=denoiser, bank=bank)
        self._rows = Rows(
            job.recipe, base=base, denoiser=denoiser, bank=bank, method=self._method, dataset=self._dataset
        )
        self._bases = KeptBases(Path(job.bases) if job.bases else None)
        self._micro_losses: list[float] = []  # of the step that is being made
        self._losses: list[float] = []  # of steps since the last checkpoint
        self._drawn: Batch | None = None  # of a micro-step that has not ended
        self._last: Batch | None = None
        self.step = 0
        """Steps done: of the optimizer, whatever the micro-steps in each."""
        self.bucket = 0
        """The exact number of rows of its forwards, for life; 0 until it is settled."""
        self.published: CheckpointRecord | None = None
        """The last checkpoint, also the one that the training goes on from."""

    # ----------------------------------------------------------------------------------------- beginning
    def prepare(self) -> Iterator[None]:
        """Caches latents and embeddings, a small piece of device work between yields; then begins or resumes.

        Raises InvalidRequest for a picture that cannot be read or a recipe that the base cannot follow,
        DataLoss for a checkpoint that cannot be read.
        """
        yield from self._dataset.fill(self._job, self._base, self._generator)
        self._method.begin()
        if self._job.resume_step > 0:
            self._resume(CheckpointId(self._job.name, self._job.version, self._job.resume_step))
        else:
            self._enter(self._method.phases[0])
        if self._recipe.exact or self._recipe.batch_bucket:
            self.settle(self._recipe.batch_bucket)
        if not self._hears:
            yield from self._rows.texts.keep(self._dataset.captions(self._recipe))

    def _enter(self, phase: Phase) -> None:
        """From here on the parts of this phase learn."""
        self._phase = phase
        self._method.enter(phase)
        parts = [part for part in self._method.parts if part.name in phase.parts]
        self._learning = Learning(
            parts,
            self._recipe,
            phase.end - phase.begin,
            device=self._base.device,
            scaled=self._rows.precision.scaled,
        )
        self._rows.texts.forget()

    @property
    def _hears(self) -> bool:
        return self._method.hears(self._phase)

    # ------------------------------------------------------------------------------------------- company
    @property
    def rows(self) -> int:
        """Of a micro-step."""
        return self._rows.count

    def settle(self, bucket: int = 0) -> None:
        """Decides about the bucket, unless that has been done: at least its own rows."""
        if not self.bucket:
            self.bucket = max(bucket, self.rows)

    @property
    def kind(self) -> Hashable | None:
        """Equal for trainings whose rows could be in one forward. None: its rows are for themselves."""
        if self._recipe.exact or self._recipe.aspect_ratio_buckets or not self._method.shares:
            return None
        size = self._recipe.resolution
        shape = self._base.latent_shape(size, size)
        return shape, self._recipe.gradient_checkpointing, self._rows.precision

    @property
    def company(self) -> Hashable | None:
        """Trainings of equal companies share forwards as long as their rows fit the bucket. None: none.

        Of a training that is prepared and settled.
        """
        kind = self.kind
        return None if kind is None or self.bucket == self.rows else (kind, self.bucket)

    # -------------------------------------------------------------------------------------- a micro-step
    def begin(self) -> MicroBatch:
        """The rows of the next micro-step, texts heard within the graph where they learn."""
        if self._drawn is None:
            self._drawn = self._rows.draw(self._generator)
        return self._micro_batch(self._drawn)

    def finish(self, loss: Tensor, gradients: Gradients) -> StepReport | None:
        """Takes the gradients of the micro-step; at the end of a step, the optimizer's. None before that.

        The rate is the one that the step used. Raises NonfiniteLoss with the step in its metadata, before the
        weights are touched.
        """
        self._last, self._drawn = self._drawn, None
        value = loss.item()
        self._micro_losses.append(value)
        ends = self._learning.add(gradients)
        if not math.isfinite(value) or (ends and not self._learning.clip()):
            self._learning.forget()
            raise self._nonfinite(self.step + 1, value)
        if not ends:
            return None
        rate = self._learning.rate
        self._learning.step()
        self._method.after_step(self._phase)
        self.step += 1
        mean = sum(self._micro_losses) / len(self._micro_losses)
        self._micro_losses.clear()
        self._losses.append(mean)
        if self.step == self._phase.end and self._phase is not self._method.phases[-1]:
            self._enter(self._method.phases[self._method.phases.index(self._phase) + 1])
        return StepReport(mean, rate)

    def train_step(self) -> StepReport:
        """One whole step, alone. Raises what `finish` raises."""
        self.settle()
        while True:
            (outcome,) = micro_step([self])
            if isinstance(outcome, Exception):
                raise outcome
            if outcome is not None:
                return outcome

    def _micro_batch(self, batch: Batch) -> MicroBatch:
        return self._rows.micro_batch(
            batch,
            bucket=self.bucket,
            parameters=self._learning.parameters,
            hears=self._hears,
            scale=self._learning.scale,
        )

    # --------------------------------------------------------------------------------------- checkpoints
    def publishing(self) -> Iterator[None]:
        """What `publish` would take long for, in small pieces, for the weights of now.

        Raises StorageFull.
        """
        if not self._finite:
            return  # which `publish` tells
        if not self._recipe.use_ema:
            yield from self._publishing()
        else:
            with self._learning.averaged():  # in one piece: nobody else may find the weights like this
                for _ in self._publishing():
                    pass
            yield
        if self._method.full_modules and not self._ended:
            state = self._state()
            yield from self._bases.keep_state(self.step, lambda folder: write_state(state, folder))

    def _publishing(self) -> Iterator[None]:
        yield from self._method.extracting()
        if modules := self._method.full_modules:
            yield from self._bases.keep(self.step, lambda: self._base.pipeline_with(modules))

    @property
    def _ended(self) -> bool:
        return self.step >= self._recipe.max_train_steps

    def publish(self) -> CheckpointRecord:
        """Publishes the weights of now, with all that is needed to go on from here to the same bits.

        Raises NonfiniteLoss if the last step blew the weights up, StorageFull, AdapterNotFound if the
        version has been deleted.
        """
        checkpoint = CheckpointId(self._job.name, self._job.version, self.step)
        if self.published is not None and self.published.id == checkpoint:
            return self.published
        if not math.isfinite(loss_now := self._loss_now()):
            raise self._nonfinite(self.step, loss_now)
        with self._learning.averaged():
            adapter = self._method.adapter()
            validation_loss = self._rows.validation_loss(self.bucket or self.rows, hears=self._hears)
        largest = adapter.largest
        self.published = self._store.publish(
            checkpoint,
            partial(self._write, adapter),
            loss=sum(self._losses) / len(self._losses) if self._losses else None,
            validation_loss=validation_loss,
            rank=largest.rank if largest else 0,
            lora_alpha=largest.alpha if largest else 0.0,
            kept_share=self._method.kept_share,
        )
        self._losses.clear()
        self._bases.prune({self.step, self._recommended()})
        return self.published

    def adapter(self) -> CanonicalAdapter:
        """A copy of the weights of now, on the CPU; of their averages, if the recipe asks for these."""
        with self._learning.averaged():
            return self._method.adapter()

    def state_bytes(self) -> int:
        """What the training holds on the base's device between two steps: weights, optimizer, caches."""
        kept = [p for part in self._method.parts for p in part.parameters.values()]
        held = [*self._learning.tensors(), *self._dataset.tensors(), *self._rows.texts.tensors()]
        return sum(t.nbytes for t in (*kept, *held) if t.device.type == self._base.device.type)

    @torch.no_grad()
    def _loss_now(self) -> float:
        """The last batch's loss once more, with the weights that the step made of it; draws nothing.

        A step's own loss is that of the weights before it: after one that was too large, these may be finite
        and yet paint nothing.
        """
        if not self._finite:
            return math.nan
        if self._last is None:
            return 0.0  # no step yet: the weights are the first ones, or those of a checkpoint
        return loss_of(self._micro_batch(self._last))

    @property
    def _finite(self) -> bool:
        return all(bool(p.isfinite().all()) for p in self._parameters().values())

    def _parameters(self) -> dict[str, Tensor]:
        """All that the training has learned and learns."""
        return {name: p for part in self._method.parts for name, p in part.parameters.items()}

    def _write(self, adapter: CanonicalAdapter, folder: Path) -> None:
        write_stored(adapter, folder / ADAPTER_FILE)
        kept = self._bases.path(self.step)
        # A whole U-Net's lies with its kept base, and not at all where nothing is left to learn.
        write_state({"kept": self.step} if kept and kept.exists() else self._state(), folder)

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "phase": self._phase.name,
            "bucket": self.bucket,
            "batch_size": self._recipe.train_batch_size,
            "recipe_sha256": recipe_sha256(self._recipe),
            "base_sha256": self._base.sha256,
            "weights": self._parameters(),
            "constants": dict(self._method.constants()),
            "learning": self._learning.state_dict(),
            "micro_losses": self._micro_losses,
            "generator": self._generator.get_state(),
            "order": self._rows.orders.state_dict(),
        }

    def _resume(self, checkpoint: CheckpointId) -> None:
        """Brings everything back to where it was. Raises DataLoss if the files do not allow it."""
        try:
            adapter = decode_stored(self._store.file(checkpoint).read_bytes())
            self._bank.check(adapter)
            with self._store.checkout(checkpoint) as folder:
                tree = read_state(folder)
            if "kept" in tree and checkpoint.step >= self._recipe.max_train_steps:
                self._enter(self._method.phases[-1])
            else:
                self._restore(self._bases.state(tree), checkpoint.step, adapter)
        except (UnsupportedFormat, AdapterMismatch) as error:
            raise DataLoss(f"the weights of {checkpoint} cannot be read: {error}") from error
        except (OSError, SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
            raise DataLoss(f"the training cannot go on from {checkpoint}: {error!r}") from error
        self.published = self._find(checkpoint)
        self.step = checkpoint.step
        self._bases.prune({self.step, self._recommended()})  # not one that was never published

    def _restore(self, tree: dict[str, Any], step: int, adapter: CanonicalAdapter) -> None:
        """Of version 0.1 the bucket was the batch."""
        phase = next(p for p in reversed(self._method.phases) if p.begin <= step)
        check_state(tree, self._recipe, step=step, base_sha256=self._base.sha256, phase=phase.name)
        self._method.take_constants(tree.get("constants", {}))
        weights = weights_in(tree, adapter)
        with torch.no_grad():
            for name, parameter in self._parameters().items():
                parameter.copy_(weights[name])
        self._enter(phase)
        self._learning.load_state_dict(tree["learning"])
        self._micro_losses = list(tree.get("micro_losses", ()))
        self._generator.set_state(tree["generator"])
        self._rows.orders.load_state_dict(tree["order"])
        self.bucket = tree.get("bucket", self.rows)

    def _recommended(self) -> int:
        """The step of the checkpoint that the adapter's name means now."""
        recommended = self._store.version(self._job.name, self._job.version).recommended
        return recommended.id.step if recommended else 0

    def _find(self, checkpoint: CheckpointId) -> CheckpointRecord | None:
        version = self._store.version(checkpoint.name, checkpoint.version)
        return next((record for record in version.checkpoints if record.id == checkpoint), None)

    def _nonfinite(self, step: int, loss: float) -> NonfiniteLoss:
        message = (
            f"training {self._job.id} became non-finite at step {step} (loss {loss}); lower the learning rate"
        )
        return NonfiniteLoss(message, {"step": str(step)})
