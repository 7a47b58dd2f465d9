"""What a piece of device work takes at its peak, counted tensor by tensor.

The same figure on every device, unlike an allocator's or a process's: what libraries use inside a kernel is
not in it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes of new tensors that are alive at one time while `work` runs."""
    meter = _Meter()
    with meter:
        work()
    return meter.peak


class _Meter(TorchDispatchMode):
    """Storages by identity, from the operation that made them until they are freed. Those that were there
    before count for nothing; they are held, so that no new one takes their identity."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live = 0
        self._known: dict[int, object] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for storage in _storages((args, kwargs)):
            self._known.setdefault(storage._cdata, storage)
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in self._known:
                size = storage.nbytes()
                self._live += size
                self._known[storage._cdata] = weakref.finalize(storage, self._freed, storage._cdata, size)
        self.peak = max(self.peak, self._live)
        return result

    def _freed(self, identity: int, size: int) -> None:
        self._live -= size
        del self._known[identity]


def _storages(values: object) -> Iterator[torch.UntypedStorage]:
    return (value.untyped_storage() for value in tree_leaves(values) if isinstance(value, torch.Tensor))
