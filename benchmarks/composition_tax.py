"""What not merging costs: our batch with eight adapters against the same batch on merged weights."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from benchmarks.bases import peer_pipeline, random_adapters, sd1_shaped
from benchmarks.desk import Desk
from benchmarks.harness import Row, interleave, row, seconds
from benchmarks.mixed_forward import inputs_of

_ROWS = 8


def run(*, quick: bool) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base = sd1_shaped(root / "base")
        files = random_adapters(root / "files", base, count=_ROWS, rank=16)
        desk = Desk(str(base), root / "data")
        for slot, use in enumerate(desk.publish(files), start=1):
            desk.runner.load(use, slot)
        merged = peer_pipeline(base)
        merged.load_lora_weights(files[0].parent, weight_name=files[0].name)
        merged.fuse_lora()
        merged.unload_lora_weights()
        inputs = inputs_of(desk.runner.base.unet.config, _ROWS)
        mixed = [[(slot, 1.0)] for slot in range(1, _ROWS + 1)]

        def ours(rows: list[list[tuple[int, float]]]) -> torch.Tensor:
            with torch.no_grad(), desk.runner.bank.use(desk.runner.gather(rows)):
                return desk.runner.base.unet(**inputs, return_dict=False)[0]  # type: ignore[no-any-return]

        def peer() -> torch.Tensor:
            with torch.no_grad():
                return merged.unet(**inputs, return_dict=False)[0]  # type: ignore[no-any-return]

        same = ours([[(1, 1.0)]] * _ROWS)
        if (difference := (same - peer()).abs().max().item()) > 1e-3:
            raise RuntimeError(f"the two sides compute different things: {difference}")
        samples = interleave(lambda: seconds(lambda: ours(mixed)), lambda: seconds(peer), 1 if quick else 31)
    target = None if quick else "<= 1.20"
    case = f"a forward of {_ROWS} rows with {_ROWS} adapters; peer: one adapter fused into the weights"
    return [row(case, "s", samples, target, ratio=lambda a, b: a / b)]
