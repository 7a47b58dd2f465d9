"""Micro-steps of several trainings at once, and with fewer where so many do not fit the memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from atelier_server.engine.failures import Failures
from atelier_server.engine.runner import Runner, TrainingRun, TrainOutcome


class TrainingSteps:
    """`crowded` is told of too many trainings at once."""

    def __init__(self, runner: Runner, failures: Failures, crowded: Callable[[Sequence[str]], None]) -> None:
        self._runner = runner
        self._failures = failures
        self._crowded = crowded

    def take(self, runs: Sequence[tuple[str, TrainingRun]]) -> list[TrainOutcome]:
        """A micro-step of each, by training's id. What fails for all is tried again in halves: nobody fails
        for what is another's, or for their number. Never raises.
        """
        try:
            return self._runner.train([run for _, run in runs])
        except Exception as error:
            if len(runs) == 1:
                return [error]
            if self._failures.out_of_memory(error, "train") is not None:
                self._crowded([training for training, _ in runs])
        half = (len(runs) + 1) // 2
        return [*self.take(runs[:half]), *self.take(runs[half:])]
