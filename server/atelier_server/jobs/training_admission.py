"""Which trainings may be on the device now, and which wait."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from atelier_server.core import BaseInfo, Costs, Recipe
from atelier_server.errors import OutOfMemory
from atelier_server.jobs.training_memory import Demand, demand
from atelier_server.jobs.training_run import Run


class Admission:
    """At most `most` at a time, as many as fit the memory; the highest priority first, then the oldest.

    Nobody is overtaken by one that happens to be small: a large training would wait for ever. `base` and
    `costs` tell of the worker; `base` raises WorkerNotReady as long as there has been none.
    """

    def __init__(self, most: int, base: Callable[[], BaseInfo], costs: Callable[[], Costs]) -> None:
        self._most = most
        self._base = base
        self._costs = costs

    def check(self, recipe: Recipe) -> None:
        """Raises OutOfMemory for a training that can never fit, WorkerNotReady."""
        needed, room = self._demand(recipe).total, self._room()
        if room is not None and needed > room:
            raise OutOfMemory(
                f"this training needs about {needed} bytes beside the base model, and the device has {room}: "
                "ask for a smaller resolution, train_batch_size or rank, or for gradient_checkpointing",
                {"needed_bytes": str(needed), "free_bytes": str(room)},
            )

    def next(self, runs: Iterable[Run]) -> Run | None:
        """Whose turn it is to go to the device beside those that are there; None: nobody's, now.

        Suspects of a crash are tried one by one, alone.
        """
        runs = list(runs)
        there = [run for run in runs if run.submitted]
        waiting = sorted(
            (run for run in runs if not run.submitted and not run.paused),
            key=lambda run: (not run.suspect, -run.priority, run.number),
        )
        if not waiting or any(run.suspect for run in there) or (there and waiting[0].suspect):
            return None
        first = waiting[0]
        return first if not there or (len(there) < self._most and self._fit([*there, first])) else None

    def _fit(self, runs: list[Run]) -> bool:
        """Whether they can be there together: all that they hold, and the largest of their steps."""
        room, demands = self._room(), [self._demand(run.recipe) for run in runs]
        return room is None or sum(d.state for d in demands) + max(d.step for d in demands) <= room

    def _demand(self, recipe: Recipe) -> Demand:
        return demand(recipe, self._base(), self._costs())

    def _room(self) -> int | None:
        """Bytes for trainings; None where nobody knows."""
        return self._costs().free_bytes or None
