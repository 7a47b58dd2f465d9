"""Parts of a base that rest in CPU memory, and are on the device only while they are used."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn


class Offloaded:
    """One frozen module. It may be used by several threads at once, and again inside of a use.

    Its weights are never written, so they are copied one way only: back at rest, the module has the very
    tensors that it rested with. `fetch` makes the copy that it works with; `settle` waits until the device is
    done with it.
    """

    def __init__(
        self, module: nn.Module, *, fetch: Callable[[Tensor], Tensor], settle: Callable[[], None]
    ) -> None:
        self._module = module
        self._fetch = fetch
        self._settle = settle
        self._resting = {name: tensor.data for name, tensor in _tensors(module)}
        self._users = 0
        self._lock = threading.Lock()

    @classmethod
    def on(cls, module: nn.Module, device: torch.device) -> Offloaded:
        """For a GPU. The module lies on the CPU; its memory is pinned, from which the GPU copies fastest."""
        for _, tensor in _tensors(module):
            tensor.data = tensor.data.pin_memory()
        # Waiting copies: whoever comes next may be on another stream. So is whoever frees them.
        return cls(
            module,
            fetch=lambda tensor: tensor.to(device),
            settle=lambda: torch.cuda.current_stream(device).synchronize(),
        )

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Inside, the module is on the device."""
        with self._lock:
            if not self._users:
                self._move()
            self._users += 1
        try:
            yield
        finally:
            self._settle()
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._rest()

    def _move(self) -> None:
        try:
            for _, tensor in _tensors(self._module):
                tensor.data = self._fetch(tensor.data)
        except BaseException:  # the device is full: nothing stays there by half
            self._rest()
            raise

    def _rest(self) -> None:
        for name, tensor in _tensors(self._module):
            tensor.data = self._resting[name]


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())
