"""The full weights of a training's last and recommended checkpoints, as bases that `serve --model` loads.

    FOLDER/300/model_index.json, unet/, vae/, ...      a diffusers folder for step 300
    FOLDER/300/training/                               what the training goes on from there with

The latter has the weights once more and the moments, several times a base: it lies here and not in
the store, which would keep it with every checkpoint. A folder appears whole, or not at all.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from atelier_server.errors import StorageFull
from atelier_server.training.checkpoint import read_state

_PIECE_SECONDS = 0.02
_SHARD = "2GB"
_FULL = (errno.ENOSPC, errno.EDQUOT)


class KeptBases:
    """Below `folder`, which is made when it is first needed; None keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def path(self, step: int) -> Path | None:
        """Where that step's is, or would be."""
        return None if self._folder is None else self._folder / str(step)

    def state_path(self, step: int) -> Path | None:
        """Where a training's state is kept, or would be."""
        path = self.path(step)
        return None if path is None else path / "training"

    def keep(self, step: int, pipeline: Callable[[], Any]) -> Iterator[None]:
        """Writes `pipeline` beside whatever else is to be done: between two yields little time goes by.

        Its weights must not change meanwhile. Raises StorageFull.
        """

        def save(folder: Path) -> None:
            pipeline().save_pretrained(folder, safe_serialization=True, max_shard_size=_SHARD)

        yield from _written(self.path(step), save)

    def keep_state(self, step: int, write: Callable[[Path], None]) -> Iterator[None]:
        """As `keep`; `write` fills the folder that it is given."""
        yield from _written(self.state_path(step), write)

    def state(self, tree: dict[str, Any]) -> dict[str, Any]:
        """The state itself, where `tree` only says that it is kept here. Raises what `read_state` raises."""
        path = self.state_path(tree["kept"]) if "kept" in tree else None
        return read_state(path) if path else tree

    def prune(self, steps: set[int]) -> None:
        """Removes all but those of `steps`."""
        if self._folder is not None and self._folder.is_dir():
            for path in self._folder.iterdir():
                if path.name not in {str(step) for step in steps}:
                    shutil.rmtree(path, ignore_errors=True)


def _written(path: Path | None, write: Callable[[Path], None]) -> Iterator[None]:
    """Nothing to do where it is there already, or nowhere."""
    if path is None or path.exists():
        return
    part = path.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    with ThreadPoolExecutor(1, "kept-base") as thread:
        written = thread.submit(_write, write, part)
        while not _done(written):
            yield
    part.rename(path)


def _done(saved: Future[None]) -> bool:
    """Waits a little; raises what the thread raised."""
    try:
        saved.result(_PIECE_SECONDS)
    except TimeoutError:
        return False
    return True


def _write(write: Callable[[Path], None], path: Path) -> None:
    try:
        path.mkdir(parents=True)
        write(path)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(path, ignore_errors=True)
        # safetensors tells a full disk in words only.
        if getattr(error, "errno", None) in _FULL or "No space left" in str(error):
            raise StorageFull("no space left for the full weights of a training") from error
        raise
