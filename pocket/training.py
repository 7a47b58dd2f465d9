"""The loop that all trainings of pocket share: budget, learning rate, averaged weights, checkpoints.

A training is interrupted and resumed without a trace: the pictures and the noise of step n come from the seed
and n alone, whichever process draws them, and a checkpoint (`state.safetensors`: weights, averages, moments,
progress) holds the rest; `state.json` beside it is for people. Knows nothing of pictures.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pocket import peers

Report = Callable[[str], None]
Batch = dict[str, Tensor]
Losses = dict[str, Tensor]
_STATE = "state.safetensors"


class Task(Protocol):
    """What a training teaches."""

    network: nn.Module  # everything that learns

    def rates(self) -> list[tuple[float, list[nn.Parameter]]]:
        """Parameters by their share of the learning rate."""
        ...

    def batch(self, generator: torch.Generator) -> Batch:
        """What one step learns from, on the CPU, drawn from `generator`; does not touch the network, because
        processes that have no GPU draw it."""
        ...

    def losses(self, batch: Batch, generator: torch.Generator) -> Losses:
        """The scalars of one step; `generator` is the device's, for noise; "loss" is what is minimised."""
        ...


@dataclass(frozen=True, slots=True)
class Budget:
    """When a training ends: after `minutes` of its own time or `max_steps`, whichever comes first."""

    minutes: float
    max_steps: int = 10**9
    learning_rate: float = 1e-3
    ema_decay: float = 0.998
    warmup_steps: int = 100
    save_seconds: float = 120.0
    report_steps: int = 100
    seed: int = 0
    workers: int = 0  # processes that draw batches; 0 draws them in this one


@dataclass(slots=True)
class Progress:
    """How far a training has come; `history` holds [step, seconds, loss] a report."""

    step: int = 0
    seconds: float = 0.0
    history: list[tuple[int, float, float]] = field(default_factory=list)


class Trainer:
    """Runs a task in its folder, from its last checkpoint if there is one."""

    def __init__(self, task: Task, folder: Path, budget: Budget, report: Report) -> None:
        self.task, self.folder, self.budget, self.report = task, folder, budget, report
        self.progress = Progress()
        groups = [
            {"params": parameters, "share": share, "lr": 0.0} for share, parameters in task.rates() if share
        ]
        self._learning: list[Tensor] = [parameter for group in groups for parameter in _parameters(group)]
        self._optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01)
        self._averages = [parameter.detach().clone() for parameter in self._learning]
        if (folder / _STATE).exists():
            self._resume()

    def run(self) -> None:
        """Trains to the end of the budget; the network then holds the averaged weights."""
        self.task.network.train()
        self._steps()
        self._save()
        with torch.no_grad():
            for parameter, average in zip(self._learning, self._averages, strict=True):
                parameter.copy_(average)
        self.task.network.eval()

    def _steps(self) -> None:
        losses: list[float] = []
        batches = self._batches()
        saved = since = time.monotonic()
        while (done := peers.agreed(self._share_done())) < 1:
            losses.append(self._step(next(batches), done))
            now = time.monotonic()
            self.progress.seconds += now - since
            since = now
            if self.progress.step % self.budget.report_steps == 0:
                self._note(losses)
                losses = []
            if now - saved > self.budget.save_seconds:
                self._save()
                saved = since = time.monotonic()

    def _batches(self) -> Iterator[Batch]:
        """The batches of the steps that are still to come."""
        steps = range(self.progress.step, self.budget.max_steps)
        on_gpu, workers = device().type == "cuda", self.budget.workers
        loader = DataLoader(
            _Batches(self.task, self.budget.seed),
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            # Forked: the pictures are shared with the workers and not copied.
            multiprocessing_context="fork" if workers else None,
            pin_memory=on_gpu,
        )
        for batch in loader:
            yield {name: value.to(device(), non_blocking=on_gpu) for name, value in batch.items()}

    def _step(self, batch: Batch, done: float) -> float:
        generator = torch.Generator(device()).manual_seed(_seed(self.budget.seed, self.progress.step))
        rate = self.budget.learning_rate * self._schedule(done)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["share"]
        loss = self.task.losses(batch, generator)["loss"]
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss of step {self.progress.step} is {loss.item()}")
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        peers.average_gradients(self._learning)
        nn.utils.clip_grad_norm_(self._learning, 1.0)
        self._optimizer.step()
        self.progress.step += 1
        decay = min(self.budget.ema_decay, (self.progress.step + 1) / (self.progress.step + 15))
        with torch.no_grad():
            torch._foreach_lerp_(self._averages, self._learning, 1 - decay)
        return loss.item()

    def _share_done(self) -> float:
        by_time = self.progress.seconds / (60 * self.budget.minutes)
        return max(by_time, self.progress.step / self.budget.max_steps)

    def _schedule(self, done: float) -> float:
        """Warm-up, then a cosine down to 3 %."""
        warm = min(1.0, (self.progress.step + 1) / self.budget.warmup_steps)
        return warm * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * done)))

    def _note(self, losses: list[float]) -> None:
        if peers.rank():
            return
        progress, mean = self.progress, sum(losses) / len(losses)
        progress.history.append((progress.step, round(progress.seconds, 1), round(mean, 5)))
        self.report(f"step {progress.step}  loss {mean:.4f}  {progress.seconds:.0f} s")

    def _save(self) -> None:
        """Writes beside the last checkpoint first, so that a kill leaves one of the two whole."""
        if peers.rank():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"network.{name}": value for name, value in self.task.network.state_dict().items()}
        for number, (parameter, average) in enumerate(zip(self._learning, self._averages, strict=True)):
            tensors[f"average.{number}"] = average
            for name, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"moment.{number}.{name}"] = torch.as_tensor(value)
        whole = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        metadata = {"progress": json.dumps(asdict(self.progress))}
        save_file(whole, self.folder / "state.part", metadata)
        (self.folder / "state.part").replace(self.folder / _STATE)
        text = json.dumps({"budget": asdict(self.budget), "progress": asdict(self.progress)}, indent=1)
        (self.folder / "state.json").write_text(text + "\n", encoding="utf-8")

    def _resume(self) -> None:
        with safe_open(self.folder / _STATE, "pt") as state:
            entries = json.loads(state.metadata()["progress"])
            tensors = {name: state.get_tensor(name) for name in state.keys()}  # noqa: SIM118
        entries["history"] = [tuple(entry) for entry in entries["history"]]
        self.progress = Progress(**entries)
        weights = {
            name.removeprefix("network."): v for name, v in tensors.items() if name.startswith("network.")
        }
        self.task.network.load_state_dict(weights)
        with torch.no_grad():
            for number, (parameter, average) in enumerate(zip(self._learning, self._averages, strict=True)):
                average.copy_(tensors[f"average.{number}"])
                prefix = f"moment.{number}."
                moments = {
                    name.removeprefix(prefix): v.to(parameter.device if v.dim() else "cpu")
                    for name, v in tensors.items()
                    if name.startswith(prefix)
                }
                if moments:
                    self._optimizer.state[parameter] = moments
        self.report(f"resumed at step {self.progress.step}")


class _Batches(Dataset[Batch]):
    """A task's batches by step."""

    def __init__(self, task: Task, seed: int) -> None:
        self._task, self._seed = task, seed

    def __getitem__(self, step: int) -> Batch:
        return self._task.batch(torch.Generator().manual_seed(_seed(self._seed, step)))


def _seed(seed: int, step: int) -> int:
    """Another for each step and each of the processes that train together."""
    return (seed * 1_000_003 + step) * peers.count() + peers.rank()


def device() -> torch.device:
    """The GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast() -> torch.autocast:
    """bfloat16 for forwards: about twice as fast as float32 on a GPU and on CPUs with avx512_bf16."""
    return torch.autocast(device().type, torch.bfloat16)


def _parameters(group: dict[str, Any]) -> list[nn.Parameter]:
    return list(group["params"])
