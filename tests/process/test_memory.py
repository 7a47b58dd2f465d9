"""A worker that really runs out of memory: the forward is split, only what cannot fit alone is refused."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from atelier import Client, ResourceExhaustedError
from tests.process.server import Server

pytestmark = pytest.mark.process

SIDE = 192
MARGIN = 90 * 2**20  # bytes above what the worker has after one small forward


def test_a_real_out_of_memory_is_contained(tmp_path: Path) -> None:
    server = Server(tmp_path).start()
    try:
        with Client(server.address) as client:
            fields = {"num_inference_steps": 1, "guidance_scale": 1.0, "width": SIDE, "height": SIDE}
            client.generate("a cat", seed=0, **fields)
            _limit(int(server.state["worker_pid"]), MARGIN)
            result = client.generate("a cat", seed=1, num_images=12, **fields)
            assert len(result.images) == 12
            assert result.batch_bucket < 16
            with pytest.raises(ResourceExhaustedError, match="free"):
                client.generate("a cat", num_inference_steps=1, width=1024, height=1024)
            assert client.generate("a cat", num_inference_steps=1).images
        assert server.metrics()['atelier_out_of_memory_total{phase="generate"}'] >= 2
        assert server.state["worker_pid"], "the worker lives"
    finally:
        server.stop()


def _limit(pid: int, margin: int) -> None:
    """Lets a process grow by so many bytes and no more."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + margin
    resource.prlimit(pid, resource.RLIMIT_AS, (size, size))
