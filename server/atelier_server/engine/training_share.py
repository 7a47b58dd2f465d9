"""How the device is split between pictures and trainings while both are wanted. Knows no clock: it is told.

Trainings are owed their share of the seconds that pictures take, and get it in one piece behind at least
`PATIENCE` denoise steps. So all but one of so many intervals between two denoise steps are as short as
without a training, whatever the share; a micro-step after each denoise step would lengthen all of them.
"""

from __future__ import annotations

PATIENCE = 32


class TrainingShare:
    """`share` in [0, 1) of the seconds. 0: trainings run while nobody waits for a picture, and only then."""

    def __init__(self, share: float) -> None:
        self._ratio = share / (1 - share)
        self._owed = 0.0  # seconds; below 0 once a micro-step has taken more than there was
        self._denoised = 0  # steps since nothing was owed

    @property
    def is_due(self) -> bool:
        """Whether trainings come next though pictures wait."""
        return self._owed > 0 and self._denoised >= PATIENCE

    def painted(self, seconds: float) -> None:
        """A denoise step, while trainings waited."""
        self._owed += seconds * self._ratio
        self._denoised += 1

    def trained(self, seconds: float, *, pictures_wait: bool) -> None:
        """A micro-step. Where nobody waited for a picture it costs nothing, and pays what is owed."""
        self._owed -= seconds
        if self._owed <= 0:
            self._denoised = 0
            if not pictures_wait:
                self._owed = 0.0

    def forget(self) -> None:
        """No training is there any more: nothing is saved up for the next."""
        self._owed, self._denoised = 0.0, 0
