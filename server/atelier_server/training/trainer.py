"""DreamBooth with LoRA (arXiv 2208.12242, 2106.09685) on the U-Net's attention, one micro-step at a time.

The base is the one that serves. The weights being learned are float32 leaves of the job's own; they become
visible to anybody else only as a checkpoint in the store. All chance comes from one CPU generator, whose
state is part of every checkpoint: a training that goes on from one ends with the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.optimization import get_scheduler
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, skip_init

from atelier_server.adapters.bank import SlotBank
from atelier_server.adapters.canonical import CanonicalAdapter, LoraModule
from atelier_server.adapters.layers import Leaf, LeafSet
from atelier_server.adapters.store import ADAPTER_FILE, AdapterStore, CheckpointRecord
from atelier_server.adapters.stored import decode_stored, write_stored
from atelier_server.core import CheckpointId, TrainingJob
from atelier_server.diffusion.base import BaseModel
from atelier_server.diffusion.denoiser import Denoiser
from atelier_server.errors import (
    AdapterMismatch,
    DataLoss,
    InvalidRequest,
    NonfiniteLoss,
    UnsupportedFormat,
    Violation,
)
from atelier_server.training.checkpoint import TrainingState
from atelier_server.training.dataset import Batch, Dataset, Order

TARGETS = (".to_q", ".to_k", ".to_v", ".to_out.0")


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one micro-step says of itself: the loss of its batch, and the rate that it used."""

    loss: float
    learning_rate: float


class LoraTrainer:
    """One job. Whoever drives it calls `prepare` to its end, then `train_step` and `publish` as it likes."""

    def __init__(
        self, job: TrainingJob, *, base: BaseModel, denoiser: Denoiser, bank: SlotBank, store: AdapterStore
    ) -> None:
        self._job = job
        self._recipe = job.recipe
        self._base = base
        self._denoiser = denoiser
        self._bank = bank
        self._store = store
        self._generator = torch.Generator().manual_seed(job.recipe.seed)
        self._dataset = Dataset()
        self._losses: list[float] = []  # since the last checkpoint
        self._last: Batch | None = None
        self.step = 0
        """Steps done."""
        self.published: CheckpointRecord | None = None
        """The last checkpoint, also the one that the training goes on from."""

    def prepare(self) -> Iterator[None]:
        """Caches latents and embeddings, a small piece of device work between yields; then begins or resumes.

        Raises InvalidRequest for a picture that cannot be read, DataLoss for a checkpoint that cannot.
        """
        yield from self._dataset.fill(self._job.images, self._recipe, self._base, self._generator)
        resume_at = CheckpointId(self._job.name, self._job.version, self._job.resume_step)
        resuming = self._job.resume_step > 0
        self._leaves = self._trainable(self._read(resume_at) if resuming else self._initial())
        self._begin()
        if resuming:
            with self._store.checkout(resume_at) as folder:
                self._state.restore(folder, resume_at.step)
            self.published = self._find(resume_at)
            self.step = resume_at.step

    def train_step(self) -> StepReport:
        """Forward, backward, optimizer. The rate is the one that this step used.

        Raises NonfiniteLoss with the step in its metadata, before the weights are touched.
        """
        recipe = self._recipe
        batch = self._last = self._draw()
        rate = self._optimizer.param_groups[0]["lr"]
        self._optimizer.zero_grad()  # also what a step that ran out of memory left
        with self._bank.train(self._leaves), self._checkpointing():
            loss = self._loss(batch)
            loss.backward()  # type: ignore[no-untyped-call]
        norm = clip_grad_norm_(self._leaves.parameters(), recipe.max_grad_norm)
        value = loss.item()
        if not bool(torch.isfinite(loss.detach()) & torch.isfinite(norm)):
            raise self._nonfinite(self.step + 1, value)
        self._optimizer.step()
        self._optimizer.zero_grad()  # their memory is the pictures' until the next step
        self._lr_scheduler.step()
        self.step += 1
        self._losses.append(value)
        return StepReport(value, rate)

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
        loss = sum(self._losses) / len(self._losses) if self._losses else None
        self.published = self._store.publish(
            checkpoint, self._write, loss=loss, rank=self._recipe.rank, lora_alpha=self._recipe.lora_alpha
        )
        self._losses.clear()
        return self.published

    def adapter(self) -> CanonicalAdapter:
        """A copy of the weights of now, on the CPU."""
        return CanonicalAdapter(
            {
                name: LoraModule(_copy(leaf.A), _copy(leaf.B), self._recipe.lora_alpha)
                for name, leaf in self._leaves.leaves.items()
            }
        )

    def state_bytes(self) -> int:
        """What the training holds on the base's device between two steps: weights, optimizer, caches."""
        device = self._base.device.type
        kept = [*self._leaves.parameters(), *self._dataset.tensors()]
        kept += [value for state in self._optimizer.state.values() for value in state.values()]
        return sum(t.nbytes for t in kept if isinstance(t, Tensor) and t.device.type == device)

    # -------------------------------------------------------------------------------------- beginning
    def _begin(self) -> None:
        recipe = self._recipe
        self._optimizer = torch.optim.AdamW(
            self._leaves.parameters(),
            lr=recipe.learning_rate,
            betas=(recipe.adam_beta1, recipe.adam_beta2),
            weight_decay=recipe.adam_weight_decay,
            eps=recipe.adam_epsilon,
        )
        try:
            self._lr_scheduler = get_scheduler(
                recipe.lr_scheduler,
                self._optimizer,
                num_warmup_steps=recipe.lr_warmup_steps,
                num_training_steps=recipe.max_train_steps,
            )
        except ValueError as error:
            raise InvalidRequest.of([Violation("recipe.lr_scheduler", str(error))]) from error
        self._order = Order([], 0)
        self._state = TrainingState(
            names=[f"{name}.{part}" for name in self._leaves.leaves for part in ("A", "B")],
            optimizer=self._optimizer,
            lr_scheduler=self._lr_scheduler,
            generator=self._generator,
            order=self._order,
            batch_size=recipe.train_batch_size,
        )

    def _initial(self) -> CanonicalAdapter:
        """PEFT's own initial weights: what it injects into this U-Net after `torch.manual_seed(seed)`."""
        targets = {name: layer for name, layer in self._bank.layers.items() if name.endswith(TARGETS)}
        skeleton = nn.Module()
        for name, layer in targets.items():
            if isinstance(layer, nn.Linear):
                # Not initialised: memory that is never touched, and no random number drawn.
                shape = (layer.in_features, layer.out_features)
                _put(skeleton, name, skip_init(nn.Linear, *shape, bias=False))  # type: ignore[no-untyped-call]
        config = LoraConfig(
            r=self._recipe.rank,
            lora_alpha=self._recipe.lora_alpha,
            init_lora_weights="gaussian",
            target_modules=list(targets),
        )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self._recipe.seed)
            inject_adapter_in_model(config, skeleton)
        weights = get_peft_model_state_dict(skeleton)
        return CanonicalAdapter(
            {
                name: LoraModule(
                    weights[f"{name}.lora_A.weight"],
                    weights[f"{name}.lora_B.weight"],
                    self._recipe.lora_alpha,
                )
                for name in targets
            }
        )

    def _read(self, checkpoint: CheckpointId) -> CanonicalAdapter:
        try:
            adapter = decode_stored(self._store.file(checkpoint).read_bytes())
            self._bank.check(adapter)
        except (OSError, UnsupportedFormat, AdapterMismatch) as error:
            raise DataLoss(f"the weights of {checkpoint} cannot be read: {error}") from error
        return adapter

    def _trainable(self, adapter: CanonicalAdapter) -> LeafSet:
        """Leaves in the order of the base's layers, whatever the order of a file."""

        def leaf(weights: Tensor) -> nn.Parameter:
            return nn.Parameter(weights.detach().to(self._base.device, torch.float32, copy=True))

        scale = self._recipe.lora_alpha / self._recipe.rank
        modules = adapter.low_rank
        return LeafSet(
            {
                name: Leaf(leaf(modules[name].A), leaf(modules[name].B), scale)
                for name in self._bank.layers
                if name in modules
            }
        )

    def _find(self, checkpoint: CheckpointId) -> CheckpointRecord | None:
        version = self._store.version(checkpoint.name, checkpoint.version)
        return next((record for record in version.checkpoints if record.id == checkpoint), None)

    # ------------------------------------------------------------------------------------------ steps
    def _loss(self, batch: Batch) -> Tensor:
        device = self._base.device
        return self._denoiser.loss(
            batch.latents.to(device),
            batch.noise.to(device),
            batch.timesteps.to(device),
            batch.conditioning,
            self._recipe.snr_gamma,
        ).mean()

    @torch.no_grad()
    def _loss_now(self) -> float:
        """The last batch's loss once more, with the weights that the step made of it; draws nothing.

        A step's own loss is that of the weights before it: after one that was too large, these may be finite
        and yet paint nothing.
        """
        if not all(bool(p.isfinite().all()) for p in self._leaves.parameters()):
            return math.nan
        if self._last is None:
            return 0.0  # no step yet: the weights are the first ones, or those of a checkpoint
        with self._bank.train(self._leaves):
            return self._loss(self._last).item()

    def _draw(self) -> Batch:
        examples = self._dataset.examples
        indices = self._order.take(self._recipe.train_batch_size, len(examples), self._generator)
        return Batch.draw(
            [examples[index] for index in indices],
            self._dataset,
            condition=self._base.family.condition,
            caption_dropout=self._recipe.caption_dropout,
            num_train_timesteps=self._denoiser.num_train_timesteps,
            generator=self._generator,
        )

    @contextmanager
    def _checkpointing(self) -> Iterator[None]:
        """Gradient checkpointing for this micro-step alone, if the recipe asks for it.

        diffusers' blocks heed it in evaluation mode too, as long as gradients are on: the mode of the U-Net,
        which serves between two steps, is never touched.
        """
        if not self._recipe.gradient_checkpointing:
            yield
            return
        unet = self._base.unet
        unet.enable_gradient_checkpointing()
        try:
            yield
        finally:
            unet.disable_gradient_checkpointing()

    def _write(self, folder: Path) -> None:
        write_stored(self.adapter(), folder / ADAPTER_FILE)
        self._state.save(folder, self.step)

    def _nonfinite(self, step: int, loss: float) -> NonfiniteLoss:
        message = (
            f"training {self._job.id} became non-finite at step {step} (loss {loss}); lower the learning rate"
        )
        return NonfiniteLoss(message, {"step": str(step)})


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    """`root.NAME = module`, with plain modules for the parts of the name that are missing."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, module)


def _copy(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().to("cpu", copy=True)
