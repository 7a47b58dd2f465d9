"""Compiled transformer blocks: less dispatch in every step, for a start that takes longer.

Only the U-Net's repeated blocks are compiled (regional compilation): blocks that are alike share one graph,
so starting takes a minute where the whole U-Net would take many. Rows, ranks and sizes are symbolic:
buckets, swaps, compositions and picture sizes meet the same graphs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch._dynamo


def compile_blocks(unet: Any, backend: str = "inductor") -> None:
    """Compiles in place, each graph when its first input comes."""
    # A graph for each kind of block, each set of its layers that have deltas, and each kind of delta.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 128)
    unet.compile_repeated_blocks(backend=backend, fullgraph=True, dynamic=True)


def eager() -> AbstractContextManager[object]:
    """Inside, compiled blocks run as they were written: trainings, and whatever counts single tensors."""
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance
