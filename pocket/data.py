"""Pictures of the world on disk: drawn once by worker processes, the same bytes whatever their number.

A set is a folder with `pixels.npy` (uint8 [n, size, size, 3]) and `set.json` (what it was made from, captions
and attributes). `picture_set` draws it where it is missing and opens it where it is not.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pocket.captions import Attributes
from pocket.world import SMALL, WHOLE, Part, picture

Pixels = NDArray[np.uint8]
PARTS: dict[str, Part] = {"small": SMALL, "whole": WHOLE}
_DRAWN = 128  # pixels: strokes and filters keep their looks whatever the set's size
_BLOCK = 64  # pictures that a worker draws at a time


@dataclass(frozen=True, slots=True)
class SetRecipe:
    """Pictures 0..count of a part of the world `seed`, averaged down to size x size."""

    part: str
    seed: int
    count: int
    size: int = 64


@dataclass(frozen=True, slots=True)
class PictureSet:
    """Captioned pictures: `pixels` [n, size, size, 3], with a caption and attributes for each."""

    pixels: Pixels
    captions: tuple[str, ...]
    attributes: tuple[Attributes, ...]

    def __len__(self) -> int:
        return len(self.captions)


def picture_set(recipe: SetRecipe, folder: Path, workers: int = 1) -> PictureSet:
    """The set in `folder`/PART-SEED-COUNT-SIZE; drawn by `workers` processes if it is not there yet."""
    home = folder / f"{recipe.part}-{recipe.seed}-{recipe.count}-{recipe.size}"
    if not (home / "set.json").exists():
        _draw_set(recipe, home, workers)
    entries = json.loads((home / "set.json").read_text(encoding="utf-8"))
    pixels: Pixels = np.load(home / "pixels.npy", mmap_mode="r")
    return PictureSet(pixels, tuple(entries["captions"]), tuple(map(_attributes, entries["attributes"])))


def draw_block(recipe: SetRecipe, start: int, stop: int) -> tuple[Pixels, list[str], list[Attributes]]:
    """Pictures start..stop of a set."""
    drawn = [picture(recipe.seed, n, _DRAWN, PARTS[recipe.part]) for n in range(start, stop)]
    size = (recipe.size, recipe.size)
    pixels = np.stack([np.asarray(shown.image.resize(size, Image.Resampling.BOX)) for shown in drawn])
    return pixels, [shown.caption for shown in drawn], [shown.attributes for shown in drawn]


def _draw_set(recipe: SetRecipe, home: Path, workers: int) -> None:
    home.mkdir(parents=True, exist_ok=True)
    shape = (recipe.count, recipe.size, recipe.size, 3)
    pixels = np.lib.format.open_memmap(home / "pixels.npy", mode="w+", dtype=np.uint8, shape=shape)
    captions: list[str] = []
    attributes: list[Attributes] = []
    for block, words, facts in _blocks(recipe, workers):
        pixels[len(captions) : len(captions) + len(words)] = block
        captions += words
        attributes += facts
    pixels.flush()
    # Written last: a set without it was interrupted and is drawn again.
    entries = {
        "recipe": asdict(recipe),
        "captions": captions,
        "attributes": [asdict(fact) for fact in attributes],
    }
    (home / "set.json").write_text(json.dumps(entries), encoding="utf-8")


def _blocks(recipe: SetRecipe, workers: int) -> Iterator[tuple[Pixels, list[str], list[Attributes]]]:
    starts = range(0, recipe.count, _BLOCK)
    jobs = [(recipe, start, min(start + _BLOCK, recipe.count)) for start in starts]
    if workers <= 1:
        yield from (draw_block(*job) for job in jobs)
        return
    # spawn: a forked child would share the threads' locks of whatever the parent has loaded.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(_draw_job, jobs)


def _draw_job(job: tuple[SetRecipe, int, int]) -> tuple[Pixels, list[str], list[Attributes]]:
    return draw_block(*job)


def _attributes(entry: dict[str, object]) -> Attributes:
    worn = entry.pop("accessory", None)
    accessory = (str(worn[0]), str(worn[1])) if isinstance(worn, Sequence) else None
    return Attributes(**entry, accessory=accessory)  # type: ignore[arg-type]
