"""One micro-step of several trainings: rows of one forward, each with its own training's weights and loss.

    outcomes = micro_step([otto, bolt])      # of equal `company`, or one alone

The forward has exactly the `bucket` rows of the trainings, padded with zero rows. What a training learns does
not depend on who shares it, nor on which rows it gets: every product of its own has the shapes of its own
rows, and those of the base have the bucket's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from atelier_server.adapters.bank import SlotBank
from atelier_server.adapters.leaves import LeafSet
from atelier_server.diffusion.conditioning import Conditioning
from atelier_server.diffusion.denoiser import Denoiser
from atelier_server.errors import AtelierError
from atelier_server.training.precision import Precision

Gradients = Sequence[Tensor]
"""One a parameter, zeros where the loss does not depend on it: a token that no caption of the rows has."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a training step says of itself: the mean loss of its micro-steps, and the rate that it used."""

    loss: float
    learning_rate: float


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """Where a forward runs. `bucket` is its exact number of rows."""

    bank: SlotBank
    denoiser: Denoiser
    bucket: int
    gradient_checkpointing: bool
    precision: Precision


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """A training's part of a forward: b rows, on the base's device.

    noisy [b,C,h,w], timesteps [b], b rows of conditioning, which may come out of the graph of text encoders
    that learn. `loss` makes a scalar of the rows' prediction [b,C,h,w]; `parameters` are those that learn,
    and their gradients those of `scale` times the loss.
    """

    noisy: Tensor
    timesteps: Tensor
    conditioning: Conditioning
    leaves: LeafSet
    parameters: Sequence[nn.Parameter]
    loss: Callable[[Tensor], Tensor]
    stage: Stage
    scale: Tensor | None = None


Outcome = StepReport | Exception | None
"""Of one training's micro-step: its step is done, or failed, or has more micro-steps to come (None)."""


class Member(Protocol):
    """A training as its company sees it."""

    def begin(self) -> MicroBatch:
        """The rows of the next micro-step. Asked twice without an end of it, they are the same."""

    def finish(self, loss: Tensor, gradients: Gradients) -> StepReport | None:
        """Ends the micro-step. Raises NonfiniteLoss before any weight is touched."""


def micro_step(members: Sequence[Member]) -> list[Outcome]:
    """Forward and backward of all in one, then each one's own end of it.

    What is one training's alone (NonfiniteLoss) is its outcome. Where it raises, nothing of any has moved:
    the same micro-step may be tried again, also with fewer of them.
    """
    outcomes: list[Outcome] = [None] * len(members)
    begun: list[tuple[int, MicroBatch]] = []
    for index, member in enumerate(members):
        try:
            begun.append((index, member.begin()))
        except AtelierError as error:
            outcomes[index] = error
    learned = _learned([batch for _, batch in begun]) if begun else []
    for (index, _), (loss, gradients) in zip(begun, learned, strict=True):
        try:
            outcomes[index] = members[index].finish(loss, gradients)
        except Exception as error:
            outcomes[index] = error
    return outcomes


@torch.no_grad()
def loss_of(batch: MicroBatch) -> float:
    """The loss of one training's rows with the weights of now."""
    with _losses([batch]) as (loss,):
        return loss.item()


def _learned(batches: Sequence[MicroBatch]) -> list[tuple[Tensor, Gradients]]:
    """Each one's loss, and the gradients of its parameters."""
    parameters = [parameter for batch in batches for parameter in batch.parameters]
    with _losses(batches) as losses:
        scaled = [
            loss if batch.scale is None else loss * batch.scale
            for batch, loss in zip(batches, losses, strict=True)
        ]
        total = torch.stack(scaled).sum()
        # One backward of the sum: rows have nothing in common, so neither have the gradients. Not `backward`,
        # which would leave half of them behind where it runs out of memory.
        gradients = (
            torch.autograd.grad(total, parameters, materialize_grads=True)
            if total.requires_grad
            else [torch.zeros_like(parameter) for parameter in parameters]
        )
    result: list[tuple[Tensor, Gradients]] = []
    for batch, loss in zip(batches, losses, strict=True):
        count = len(batch.parameters)
        result.append((loss.detach(), gradients[:count]))
        gradients = gradients[count:]
    return result


@contextmanager
def _losses(batches: Sequence[MicroBatch]) -> Iterator[list[Tensor]]:
    """The forward, and each one's loss. The backward belongs inside: see `SlotBank.train`."""
    stage = batches[0].stage
    counts = [len(batch.timesteps) for batch in batches]
    if (padding := stage.bucket - sum(counts)) < 0:
        raise ValueError(f"{sum(counts)} rows do not fit a bucket of {stage.bucket}")
    rows: list[LeafSet | None] = [
        batch.leaves for batch, count in zip(batches, counts, strict=True) for _ in range(count)
    ]
    whole = len(batches) == 1 and not padding
    with (
        stage.bank.train(batches[0].leaves if whole else rows + [None] * padding),
        _checkpointing(stage),
    ):
        conditioning = Conditioning.concatenated([batch.conditioning for batch in batches], stage.bucket)
        dtype = stage.denoiser.unet.dtype  # a private one is float32 whatever the base is
        with stage.precision.context():
            prediction = stage.denoiser.predict(
                _padded([batch.noisy for batch in batches], padding).to(dtype),
                _padded([batch.timesteps for batch in batches], padding),
                conditioning.to(dtype),
            )
        pieces = torch.split(prediction, [*counts, padding] if padding else counts)
        yield [batch.loss(piece) for batch, piece in zip(batches, pieces, strict=False)]


def _padded(rows: Sequence[Tensor], padding: int) -> Tensor:
    """All rows, and `padding` rows of zeros after them."""
    like = rows[0]
    return torch.cat([*rows, like.new_zeros(padding, *like.shape[1:])]) if padding or len(rows) > 1 else like


@contextmanager
def _checkpointing(stage: Stage) -> Iterator[None]:
    """Gradient checkpointing for this micro-step alone, if it is asked for.

    diffusers' blocks heed it in evaluation mode too, as long as gradients are on: the mode of the U-Net,
    which serves between two steps, is never touched.
    """
    if not stage.gradient_checkpointing:
        yield
        return
    unet = stage.denoiser.unet
    unet.enable_gradient_checkpointing()
    try:
        yield
    finally:
        unet.disable_gradient_checkpointing()
