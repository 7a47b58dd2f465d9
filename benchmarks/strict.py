"""What the promise of equal bits costs: strict requests against the same ones in fast mode.

Judged like with like: a strict request names the rows of its forwards, and 8 guided pictures have 16. In
forwards of 8 rows they take twice as many as fast mode does, which is a choice and no price of the promise;
that case, and a picture alone whose forward is mostly padding, are controls.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

from atelier_server.core import AdapterUse, Mode
from benchmarks.bases import PROMPTS, random_adapters, sd1_shaped
from benchmarks.desk import Desk, job
from benchmarks.harness import Row, interleave, row, seconds

_DEFAULT_BUCKET = 8  # the contract's


def run(*, quick: bool) -> list[Row]:
    target = None if quick else "<= 1.15"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base = sd1_shaped(root / "base")
        files = random_adapters(root / "files", base, count=8, rank=16)
        desk = Desk(str(base), root / "data")
        uses = desk.publish(files)
        rows = []
        cases = ((4, _DEFAULT_BUCKET, target), (8, 16, target), (8, _DEFAULT_BUCKET, None))
        for count, bucket, bound in (*cases, (1, _DEFAULT_BUCKET, None)):
            samples = _case(desk, uses, count, bucket, quick=quick)
            case = f"{count} guided request{'s' * (count > 1)} at a time, bucket {bucket}"
            rows.append(row(case, "s", samples, bound, ratio=lambda ours, peer: ours / peer))
    return rows


def _case(
    desk: Desk, uses: list[AdapterUse], count: int, bucket: int, *, quick: bool
) -> dict[str, list[float]]:
    steps = 2 if quick else 20
    prompts = islice(cycle(PROMPTS), count)
    fast = [job(f"r{i}", prompt, uses[i], steps=steps, seed=i) for i, prompt in enumerate(prompts)]
    strict = [replace(one, mode=Mode.STRICT, bucket=bucket) for one in fast]
    return interleave(
        lambda: seconds(lambda: desk.generate(strict)),
        lambda: seconds(lambda: desk.generate(fast)),
        1 if quick else 9,
    )
