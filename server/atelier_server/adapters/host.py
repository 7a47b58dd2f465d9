"""The tier between the device's slots and the store: adapters in host memory, least recently used first out.

Reading a file, checking its digest and parsing it is most of what bringing an adapter to the device costs. It
can be done ahead, on a thread, while a request waits in the queue or its texts are encoded.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from atelier_server.adapters.canonical import CanonicalAdapter, Module, tensors_of
from atelier_server.core import AdapterUse

Read = Callable[[AdapterUse], CanonicalAdapter]
# The content: another checkpoint with the same bytes is the same adapter.
_Key = tuple[str, str]


class HostTier:
    """At most `max_bytes` of adapters, read by `read`. Any number of threads may ask."""

    def __init__(self, read: Read, max_bytes: int) -> None:
        self._read = read
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._held: OrderedDict[_Key, Future[CanonicalAdapter]] = OrderedDict()
        # To be read ahead, and not begun. By future: a key may come again while its first is still in line.
        self._queued: dict[_Key, Future[CanonicalAdapter]] = {}
        self._size_bytes = 0
        self._ahead = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")

    def fetch(self, use: AdapterUse) -> tuple[CanonicalAdapter, bool]:
        """The adapter, and whether it was here already (or on its way). Raises what `read` raises."""
        mine, future = self._reserve(use)
        # Who needs it now does not wait behind what others will need.
        mine = mine or self._begin(use, future)
        if mine:
            self._fill(use, future)
        return future.result(), not mine

    def prefetch(self, use: AdapterUse) -> None:
        """Reads it on a thread if it is not here. A failure is told to whoever fetches it."""
        mine, future = self._reserve(use, ahead=True)
        if mine:
            self._ahead.submit(self._fill_ahead, use, future)

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def contents(self) -> frozenset[str]:
        """The digests of the files that are here."""
        with self._lock:
            return frozenset(sha256 for (_, sha256), future in self._held.items() if future.done())

    def __len__(self) -> int:
        return len(self._held)

    def _reserve(self, use: AdapterUse, *, ahead: bool = False) -> tuple[bool, Future[CanonicalAdapter]]:
        """Whether the caller has to fill the future, and the future."""
        with self._lock:
            known = self._held.get(_key(use))
            if known is not None:
                self._held.move_to_end(_key(use))
                return False, known
            future: Future[CanonicalAdapter] = Future()
            self._held[_key(use)] = future
            if ahead:
                self._queued[_key(use)] = future
            return True, future

    def _begin(self, use: AdapterUse, future: Future[CanonicalAdapter]) -> bool:
        """Whether this one was queued to be read ahead, and now is the caller's to read."""
        with self._lock:
            if self._queued.get(_key(use)) is not future:
                return False
            del self._queued[_key(use)]
            return True

    def _fill_ahead(self, use: AdapterUse, future: Future[CanonicalAdapter]) -> None:
        if self._begin(use, future):
            self._fill(use, future)

    def _fill(self, use: AdapterUse, future: Future[CanonicalAdapter]) -> None:
        try:
            adapter = self._read(use)
        except BaseException as error:
            with self._lock:
                del self._held[_key(use)]
            future.set_exception(error)
            return
        with self._lock:
            future.set_result(adapter)
            self._size_bytes += size_bytes(adapter)
            self._shrink()

    def _shrink(self) -> None:
        """Drops the least recently used until the rest fits; whoever still holds one keeps it."""
        for key in [key for key, future in self._held.items() if future.done()]:
            if self._size_bytes <= self._max_bytes:
                return
            self._size_bytes -= size_bytes(self._held.pop(key).result())


def size_bytes(adapter: CanonicalAdapter) -> int:
    """Of all its tensors."""
    modules = sum(tensor.nbytes for module in adapter.modules.values() for _, tensor in tensors_of(module))
    return modules + sum(vectors.nbytes for token in adapter.tokens.values() for vectors in token.values())


def pinned(adapter: CanonicalAdapter) -> CanonicalAdapter:
    """The same adapter in page-locked memory, from which a GPU copies without waiting for the CPU."""
    return replace(adapter, modules={name: _pinned(module) for name, module in adapter.modules.items()})


def _pinned(module: Module) -> Module:
    parts: dict[str, Any] = {name: tensor.pin_memory() for name, tensor in tensors_of(module)}
    return replace(module, **parts)


def _key(use: AdapterUse) -> _Key:
    return use.path, use.sha256
