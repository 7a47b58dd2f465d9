"""Writes docs/pictures.md: how far our pictures are from diffusers', for all that the test compares.

python -m tests.golden.table > docs/pictures.md
"""

from __future__ import annotations

import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from atelier_server.core import SCHEDULERS
from atelier_server.diffusion.base import BaseModel, load_base
from tests.bases import FAMILIES, peer, save_base
from tests.golden.test_pictures_equal_diffusers import MODES, STEPS, Case, ours, theirs

HEADING = """# Pictures, compared with diffusers

The largest difference of any channel of any pixel, in 255ths, between our picture and that of diffusers'
own pipeline with the same settings: {steps} steps, guided (6) and unguided, the worse of the two; tiny bases
of every family with random weights, float32, one thread. At most 1 is promised. Written by
`python -m tests.golden.table` with diffusers {diffusers} and torch {torch}; `make soak` runs the same
comparison as a test.

"""


def difference(base: BaseModel, pipeline: Any, scheduler: str, mode: str) -> float:
    """In 255ths."""
    cases = [Case(scheduler, scale, mode=mode) for scale in (6.0, 1.0)]
    return max(255 * float(np.abs(ours(base, c) - theirs(base, pipeline, c)).max()) for c in cases)


def main() -> None:
    warnings.simplefilter("ignore")
    columns = [(family, mode) for family in FAMILIES for mode in MODES]
    names = {"text": "text", "image": "image", "inpaint": "inpainting"}
    lines = [
        "| scheduler | " + " | ".join(f"{family} {names[mode]}" for family, mode in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    with tempfile.TemporaryDirectory() as root:
        folders = {family: save_base(family, Path(root) / family) for family in FAMILIES}
        pairs = {f: (load_base(str(folder), "cpu"), peer(f, folder)) for f, folder in folders.items()}
        for scheduler in SCHEDULERS:
            cells = [f"{difference(*pairs[f], scheduler, mode):.3f}" for f, mode in columns]
            lines.append(f"| `{scheduler}` | " + " | ".join(cells) + " |")
    told = {name: version(name).partition("+")[0] for name in ("diffusers", "torch")}
    print(HEADING.format(steps=STEPS, **told) + "\n".join(lines))


if __name__ == "__main__":
    main()
