"""Far more adapters than slots: each picture is the one of merged weights, and memory stays flat."""

from __future__ import annotations

import io
import resource
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from atelier import Client
from atelier_server import pocket
from atelier_server.adapters.canonical import CanonicalAdapter
from atelier_server.adapters.store import ADAPTER_FILE, AdapterStore
from atelier_server.adapters.stored import write_stored
from atelier_server.core import CheckpointId
from tests.adapters import merge, random_adapter
from tests.process.server import Server

pytestmark = pytest.mark.process

PROMPT, STEPS, GUIDANCE = "a red octopus on a beach", 2, 4.0


def test_a_dozen_adapters_on_four_slots(tmp_path: Path) -> None:
    _round_robin(tmp_path, adapters=12, requests=18, slots=4)


@pytest.mark.soak
@pytest.mark.timeout(3000)
def test_a_thousand_requests_for_five_hundred_adapters_on_eight_slots(tmp_path: Path) -> None:
    drift = _round_robin(tmp_path, adapters=500, requests=1000, slots=8)
    assert drift < 0.02


def _round_robin(folder: Path, *, adapters: int, requests: int, slots: int) -> float:
    """Every adapter in turn, then at random; the growth of the worker's memory over the second half."""
    made = {f"a{number}": _adapter(number) for number in range(adapters)}
    _publish(made, folder / "adapters")
    random = Random(0)
    wanted = [f"a{n % adapters}" if n < adapters else random.choice(list(made)) for n in range(requests)]
    # Host memory for a tenth of them: all three tiers are used.
    room = adapters // 10 * sum(t.nbytes for m in made["a0"].low_rank.values() for t in (m.A, m.B))
    server = Server(folder, "--slots", str(slots), "--host-adapter-bytes", str(room)).start()
    try:
        with Client(server.address) as client, ThreadPoolExecutor(8) as pool:
            paint = _painter(client)
            half = list(pool.map(paint, wanted[: requests // 2], range(requests // 2)))
            before = _resident(int(server.state["worker_pid"]))
            half += list(pool.map(paint, wanted[requests // 2 :], range(requests // 2, requests)))
            drift = _resident(int(server.state["worker_pid"])) / before - 1
        metrics = server.metrics()
    finally:
        server.stop()
    theirs = _Merged()
    for number, (name, ours) in enumerate(zip(wanted, half, strict=True)):
        assert np.abs(ours - theirs.picture(made[name], number)).max() <= 1, (number, name)
    lookups = {
        result: metrics[f'atelier_adapter_lookups_total{{result="{result}"}}'] for result in ("hit", "miss")
    }
    assert sum(lookups.values()) == requests
    loads = sum(
        value for name, value in metrics.items() if name.startswith("atelier_adapter_load_seconds_count")
    )
    # Each load fills a slot; what it displaced was evicted.
    assert loads == metrics["atelier_adapter_evictions_total"] + slots
    assert loads >= adapters
    return drift


def _painter(client: Client) -> Callable[[str, int], np.ndarray]:
    def paint(name: str, seed: int) -> np.ndarray:
        result = client.generate(
            PROMPT,
            adapters=name,
            seed=seed,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            scheduler="ddim",
        )
        return np.asarray(Image.open(io.BytesIO(result.images[0].data))).astype(int)

    return paint


class _Merged:
    """diffusers with one adapter after another merged into its weights."""

    def __init__(self) -> None:
        self._pipeline = StableDiffusionPipeline.from_pretrained(pocket.path(), dtype=torch.float32)
        self._pipeline.set_progress_bar_config(disable=True)
        self._pipeline.scheduler = DDIMScheduler.from_config(self._pipeline.scheduler.config)
        self._base = {name: weight.clone() for name, weight in self._pipeline.unet.state_dict().items()}

    def picture(self, adapter: CanonicalAdapter, seed: int) -> np.ndarray:
        merge(self._pipeline, adapter, 1.0)
        output = self._pipeline(
            PROMPT,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator("cpu").manual_seed(seed),
        )
        self._pipeline.unet.load_state_dict(self._base)
        return np.asarray(output.images[0]).astype(int)


def _adapter(number: int) -> CanonicalAdapter:
    return random_adapter(number, rank=(1, 2, 4)[number % 3], alpha=2.0)


def _publish(adapters: dict[str, CanonicalAdapter], root: Path) -> None:
    """Straight into the store: importing is tested elsewhere."""
    store = AdapterStore(root)
    for name, adapter in adapters.items():
        store.create_version(
            name=name, trigger="", base_model="pocket", base_sha256="", training="", new_version=False
        )
        store.publish(
            CheckpointId(name, 1, 0),
            lambda folder, adapter=adapter: write_stored(adapter, folder / ADAPTER_FILE),
            loss=None,
            rank=4,
            lora_alpha=2.0,
        )


def _resident(pid: int) -> int:
    """Bytes of a process in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
