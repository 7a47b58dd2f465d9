"""The rows of a training's micro-steps: drawn, put into words, and what is measured of the U-Net's answer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Generator, Tensor, nn

from atelier_server.adapters.bank import SlotBank
from atelier_server.core import Recipe
from atelier_server.diffusion.base import BaseModel
from atelier_server.diffusion.conditioning import Conditioning, TextEmbeds
from atelier_server.diffusion.denoiser import Denoiser
from atelier_server.training.batch import Batch, Orders
from atelier_server.training.company import MicroBatch, Stage, loss_of
from atelier_server.training.dataset import Dataset
from atelier_server.training.methods.method import Method
from atelier_server.training.objective import Objective
from atelier_server.training.precision import Precision
from atelier_server.training.texts import Texts
from atelier_server.training.validation import validation_batches


class Rows:
    """`denoiser` is the base's, whatever U-Net the method trains."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        base: BaseModel,
        denoiser: Denoiser,
        bank: SlotBank,
        method: Method,
        dataset: Dataset,
    ) -> None:
        self._recipe = recipe
        self._base = base
        self._denoiser = denoiser
        self._bank = bank
        self._method = method
        self._dataset = dataset
        self._objective = Objective(recipe, method.denoiser)
        self._plain = Objective.plain(recipe, method.denoiser)
        self._checked: list[Batch] = []  # of the validation
        # A U-Net of its own is float32 whatever the base is.
        self.precision = Precision.of(recipe, base.device, base.dtype if method.shares else torch.float32)
        self.texts = Texts(base, bank, method, keeps=recipe.cache_text_embeddings)
        self.orders = Orders(dataset, recipe)

    @property
    def count(self) -> int:
        """Of a micro-step."""
        return self._objective.rows

    def draw(self, generator: Generator) -> Batch:
        """Those of the next micro-step. Where it raises, nothing has been drawn."""
        before = generator.get_state(), self.orders.state_dict()
        try:
            examples, instances = self.orders.take(generator)
            batch = Batch.draw(
                examples,
                instances,
                self._recipe,
                num_train_timesteps=self._denoiser.num_train_timesteps,
                generator=generator,
            )
        except BaseException:
            generator.set_state(before[0])
            self.orders.load_state_dict(before[1])
            raise
        return self._objective.shown(batch).to(self._base.device)

    def micro_batch(
        self,
        batch: Batch,
        *,
        bucket: int,
        parameters: Sequence[nn.Parameter] = (),
        hears: bool,
        scale: Tensor | None = None,
    ) -> MicroBatch:
        """`hears`: the texts are heard anew, within the graph of what learns."""
        return self._measured(
            batch, self._objective, bucket=bucket, parameters=parameters, hears=hears, scale=scale
        )

    def validation_loss(self, bucket: int, *, hears: bool) -> float | None:
        """Of the pictures that no step sees, with the weights of now; None where there are none."""
        if not self._dataset.held_out:
            return None
        if not self._checked:
            timesteps = self._denoiser.num_train_timesteps
            rows = self._recipe.train_batch_size
            held = self._dataset.held_out
            self._checked = validation_batches(held, rows, self._recipe, timesteps)
        total = 0.0
        with torch.no_grad():
            for batch in self._checked:
                there = batch.to(self._base.device)
                total += batch.instances * loss_of(
                    self._measured(there, self._plain, bucket=bucket, hears=hears)
                )
        return total / sum(batch.instances for batch in self._checked)

    def _measured(
        self,
        batch: Batch,
        objective: Objective,
        *,
        bucket: int,
        parameters: Sequence[nn.Parameter] = (),
        hears: bool,
        scale: Tensor | None = None,
    ) -> MicroBatch:
        noisy = objective.noisy(batch)
        with self.precision.context():
            texts = self.texts.hear(batch.captions, learning=hears)
            kept = self._kept(batch, noisy) if objective.preserves_output else None
        return MicroBatch(
            noisy=noisy,
            timesteps=batch.timesteps,
            conditioning=self._conditioning(texts, batch, slice(None)),
            leaves=self._method.leaves,
            parameters=parameters,
            loss=partial(objective.loss, batch, kept),
            stage=Stage(
                self._bank,
                self._method.denoiser,
                bucket,
                self._recipe.gradient_checkpointing,
                self.precision,
            ),
            scale=scale,
        )

    @torch.no_grad()
    def _kept(self, batch: Batch, noisy: Tensor) -> Tensor:
        """What the base, without anything learned, predicts for the rows that come again."""
        again = slice(len(noisy) - batch.instances, None)
        texts = self.texts.of_base(batch.captions[again])
        conditioning = self._conditioning(texts, batch, again).to(self._base.dtype)
        shown = noisy[again].to(self._base.dtype)
        return self._denoiser.predict(shown, batch.timesteps[again], conditioning)

    def _conditioning(self, texts: Sequence[TextEmbeds], batch: Batch, rows: slice) -> Conditioning:
        condition = self._base.family.condition
        framings = batch.framings[rows]
        return Conditioning.stack([condition(*pair) for pair in zip(texts, framings, strict=True)])
