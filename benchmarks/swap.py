"""A new adapter, from its file to where a first step may start, and a switch among resident ones."""

from __future__ import annotations

import tempfile
from itertools import cycle
from pathlib import Path

from atelier_server.core import AdapterUse
from benchmarks.bases import peer_pipeline, random_adapters, sd1_shaped
from benchmarks.desk import Desk
from benchmarks.harness import Row, interleave, row, seconds

_ROWS = 8  # rows of the forward that the new adapter is gathered for


def run(*, quick: bool) -> list[Row]:
    pairs = 1 if quick else 15
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base = sd1_shaped(root / "base")
        files = random_adapters(root / "files", base, count=4, rank=16)
        desk = Desk(str(base), root / "data", slots=4)
        uses = desk.publish(files)
        from_file = _from_file(desk, base, files, uses, pairs)
        among = _among_residents(desk, base, files, uses, pairs)
    target = None if quick else ">= 5"
    return [
        row(
            "file to first step; peer: load_lora_weights(hotswap=True)",
            "s",
            from_file,
            target,
            ratio=_ratio,
        ),
        row("among residents; peer: set_adapters", "s", among, target, ratio=_ratio),
    ]


def _ratio(ours: float, peer: float) -> float:
    return peer / ours


def _from_file(
    desk: Desk, base: Path, files: list[Path], uses: list[AdapterUse], pairs: int
) -> dict[str, list[float]]:
    pipeline = peer_pipeline(base)
    pipeline.enable_lora_hotswap(target_rank=16)
    pipeline.load_lora_weights(files[0].parent, weight_name=files[0].name, adapter_name="subject")
    theirs, mine = cycle(files), cycle(uses)

    def peer() -> None:
        file = next(theirs)
        pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name="subject", hotswap=True)

    def ours() -> None:
        desk.runner.load(next(mine), 1)
        desk.runner.gather([[(1, 1.0)]] * _ROWS)

    return interleave(lambda: seconds(ours), lambda: seconds(peer), pairs)


def _among_residents(
    desk: Desk, base: Path, files: list[Path], uses: list[AdapterUse], pairs: int
) -> dict[str, list[float]]:
    pipeline = peer_pipeline(base)
    for slot, (file, use) in enumerate(zip(files, uses, strict=True), start=1):
        pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=file.stem)
        desk.runner.load(use, slot)
    theirs, mine = cycle(file.stem for file in files), cycle(range(1, len(files) + 1))

    def ours() -> None:
        slot = next(mine)
        desk.runner.gather([[(slot, 1.0)]] * _ROWS)

    return interleave(
        lambda: seconds(ours), lambda: seconds(lambda: pipeline.set_adapters(next(theirs))), pairs
    )
