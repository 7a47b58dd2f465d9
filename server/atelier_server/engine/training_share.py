"""How the device is split between pictures and trainings while both are wanted. Knows no clock: it is told.

Trainings are owed their share of the seconds that pictures take. They get it a little at a time, where their
micro-steps lengthen an interval between two denoise steps by a quarter at most, and what that does not pay in
one piece behind at least `PATIENCE` denoise steps. So all but one of so many intervals are at most a quarter
longer than without a training, whatever the share.
"""

from __future__ import annotations

from math import inf

PATIENCE = 32
STRETCH = 0.25  # of a denoise step


class TrainingShare:
    """`share` in [0, 1) of the seconds. 0: trainings run while nobody waits for a picture, and only then."""

    def __init__(self, share: float) -> None:
        self._ratio = share / (1 - share)
        self.forget()

    def forget(self) -> None:
        """No training is there any more: nothing is saved up for the next."""
        self._owed = 0.0  # seconds; below 0 once a micro-step has taken more than there was
        self._denoised = 0  # steps since hardly anything was owed
        self._room = 0.0  # seconds that the interval of now may still be stretched by
        self._micro_step = inf  # seconds of the last one

    @property
    def is_due(self) -> bool:
        """Whether trainings come next though pictures wait."""
        if self._denoised >= PATIENCE:
            return self._owed > 0
        return self._micro_step <= min(self._owed, self._room)

    def painted(self, seconds: float) -> None:
        """A denoise step, while trainings waited."""
        self._owed += seconds * self._ratio
        self._denoised += 1
        self._room = seconds * STRETCH

    def trained(self, seconds: float, *, pictures_wait: bool) -> None:
        """A micro-step. Where nobody waited for a picture it costs nothing, and pays what is owed."""
        self._owed -= seconds
        self._room -= seconds
        self._micro_step = seconds
        if self._owed < seconds:  # less than the next one takes
            self._denoised = 0
        if not pictures_wait:
            self._owed = max(0.0, self._owed)
