"""Which adapter lies in which device slot. Pure bookkeeping: the runner moves the tensors.

Slot 0 is the bank's empty slot and never given out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Set

from atelier_server.core import CheckpointId


class Residency:
    """Slots 1..n with least-recently-used eviction. Invariant: a checkpoint lies in at most one slot.

    What is `pin`ned is evicted only where nothing else is left; what a batch pins (`pinned` below), not for
    that batch.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._resident: OrderedDict[CheckpointId, int] = OrderedDict()  # least recently used first
        self._pins: set[CheckpointId] = set()
        self._free = list(range(slots, 0, -1))
        self.evictions = 0
        # Least recently used first; replaced, never changed, so that other threads may read it.
        self.resident: tuple[CheckpointId, ...] = ()

    def slot(self, checkpoint: CheckpointId) -> int | None:
        return self._resident.get(checkpoint)

    def can_admit(self, checkpoints: Set[CheckpointId]) -> bool:
        """Whether all of these can lie in slots at one time, beside those that stay."""
        return len(checkpoints | self._pins) <= self._slots

    def has_room(self, pinned: Set[CheckpointId]) -> bool:
        """Whether a slot is free, or holds an adapter that is not `pinned`."""
        return bool(self._free) or any(self._may_go(checkpoint, pinned) for checkpoint in self._resident)

    def acquire(self, checkpoint: CheckpointId, pinned: Set[CheckpointId]) -> tuple[int, bool]:
        """The slot of a checkpoint, and whether it must be loaded there.

        Evicts the least recently used adapter that is not `pinned`; the caller has asked
        `can_admit` or `has_room`.
        """
        if (slot := self._resident.get(checkpoint)) is not None:
            self._resident.move_to_end(checkpoint)
            self.resident = tuple(self._resident)
            return slot, False
        if not self._free:
            victim = next((c for c in self._resident if self._may_go(c, pinned)), None)
            if victim is None:  # a picture that could not be painted otherwise goes before a pin
                victim = next(c for c in self._resident if c not in pinned)
                self._pins.discard(victim)
            self._free.append(self._resident.pop(victim))
            self.evictions += 1
        slot = self._free.pop()
        self._resident[checkpoint] = slot
        self.resident = tuple(self._resident)
        return slot, True

    def pin(self, checkpoint: CheckpointId) -> None:
        """It lies in a slot, and stays there until it is unpinned."""
        self._pins.add(checkpoint)

    def unpin(self, checkpoints: Iterable[CheckpointId]) -> None:
        self._pins.difference_update(checkpoints)

    def _may_go(self, checkpoint: CheckpointId, pinned: Set[CheckpointId]) -> bool:
        return checkpoint not in pinned and checkpoint not in self._pins

    def release(self, checkpoints: Iterable[CheckpointId]) -> list[int]:
        """Frees the slots of these checkpoints, and says which they were."""
        slots = [self._resident.pop(c) for c in checkpoints if c in self._resident]
        self._free.extend(slots)
        self.resident = tuple(self._resident)
        return slots
