"""What a training needs besides its weights to go on to the same bits, as safetensors and JSON (no pickle).

training-state.safetensors     Adam's moments by parameter, the state of the generator
training-state.json            step, rate schedule, order of the pictures
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from atelier_server.errors import DataLoss
from atelier_server.training.dataset import Order

_TENSORS = "training-state.safetensors"
_REST = "training-state.json"
_RNG = "generator"


@dataclass(frozen=True, slots=True)
class _Rest:
    """The JSON part."""

    step: int
    batch_size: int
    learning_rates: list[float]
    lr_scheduler: dict[str, Any]
    order: list[int]
    cursor: int


@dataclass(frozen=True, slots=True, eq=False)
class TrainingState:
    """The moving parts of a trainer, saved and restored in place. `names` are those of the parameters."""

    names: Sequence[str]
    optimizer: Optimizer
    lr_scheduler: LambdaLR
    generator: torch.Generator
    order: Order
    batch_size: int

    def save(self, folder: Path, step: int) -> None:
        """Writes both files into `folder`."""
        saved = self.optimizer.state_dict()
        tensors = {
            f"{self.names[index]}.{key}": value.detach().cpu().contiguous()
            for index, moments in saved["state"].items()
            for key, value in moments.items()
        }
        tensors[_RNG] = self.generator.get_state()
        rest = _Rest(
            step=step,
            batch_size=self.batch_size,
            learning_rates=[group["lr"] for group in saved["param_groups"]],
            lr_scheduler=self.lr_scheduler.state_dict(),
            order=self.order.permutation,
            cursor=self.order.cursor,
        )
        # Not save_file: its own error hides that the disk is full.
        (folder / _TENSORS).write_bytes(safetensors.torch.save(tensors))
        (folder / _REST).write_text(json.dumps(asdict(rest), sort_keys=True))

    def restore(self, folder: Path, step: int) -> None:
        """Brings everything back to where `save` found it.

        Raises DataLoss if the files are missing, damaged, or of another training.
        """
        try:
            tensors = safetensors.torch.load((folder / _TENSORS).read_bytes())
            rest = _Rest(**json.loads((folder / _REST).read_text()))
            self._restore(tensors, rest, step)
        except (OSError, SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
            raise DataLoss(f"the training cannot go on from step {step}: {error!r}") from error

    def _restore(self, tensors: dict[str, Tensor], rest: _Rest, step: int) -> None:
        if (rest.step, rest.batch_size) != (step, self.batch_size):
            raise ValueError(f"the state is of step {rest.step} and batches of {rest.batch_size}")
        self.generator.set_state(tensors.pop(_RNG))
        content = self.optimizer.state_dict()
        indices = {name: index for index, name in enumerate(self.names)}
        for key, value in tensors.items():
            name, _, moment = key.rpartition(".")
            content["state"].setdefault(indices[name], {})[moment] = value
        for group, rate in zip(content["param_groups"], rest.learning_rates, strict=True):
            group["lr"] = rate
        self.optimizer.load_state_dict(content)
        self.lr_scheduler.load_state_dict(rest.lr_scheduler)
        self.order.permutation, self.order.cursor = list(rest.order), rest.cursor
