"""What a device says of its memory, and how it says that there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from atelier_server.workers import device

CPU = torch.device("cpu")
GIB = 2**30


def test_the_cache_of_files_that_nobody_reads_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text(f"{8 * GIB}\n")
    (tmp_path / "memory.current").write_text(f"{7 * GIB}\n")
    monkeypatch.setattr(device, "_CGROUP", tmp_path)
    monkeypatch.setattr(device, "_meminfo", lambda entry: 64 * GIB)
    assert device.free_bytes(CPU) == GIB
    (tmp_path / "memory.stat").write_text(f"anon 5\nactive_file 7\ninactive_file {4 * GIB}\n")
    assert device.free_bytes(CPU) == 5 * GIB


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error: Exception, memory: bool) -> None:
    assert (device.out_of_memory(error, CPU) is not None) is memory
