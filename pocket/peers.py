"""Several processes that train together: each draws its own pictures, gradients are averaged.

`torchrun --nproc-per-node 2 -m pocket unet ...` starts them. On two CPU cores two processes of one thread get
half again as far as one process of two threads. Without torchrun a process is alone and nothing here does
anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch import distributed as dist


@contextmanager
def joined() -> Iterator[None]:
    """Inside, this process knows its peers, if torchrun started it."""
    if not dist.is_torchelastic_launched():
        yield
        return
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """This process's number: 0 is the one that reports and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait() -> None:
    """Returns when every process has come this far."""
    if dist.is_initialized():
        dist.barrier()


def agreed(value: float) -> float:
    """The value of process 0, for all: clocks differ, decisions must not."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(shared, 0)
    return float(shared)


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Replaces each gradient by its mean over the processes; a missing one counts as zero."""
    if not dist.is_initialized():
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    means = torch.split(flat, [parameter.numel() for parameter in parameters])
    for parameter, mean in zip(parameters, means, strict=True):
        parameter.grad = mean.view_as(parameter).clone()
