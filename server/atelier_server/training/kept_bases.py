"""The full weights of a training's last and recommended checkpoints, as bases that `serve --model` loads.

    FOLDER/300/model_index.json, unet/, vae/, ...      a diffusers folder for step 300

A folder appears whole, or not at all.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError
from pathlib import Path

from safetensors import SafetensorError

from atelier_server.errors import StorageFull

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

    def keep(self, step: int, pipeline: Callable[[], object]) -> Iterator[None]:
        """Writes `pipeline` beside whatever else is to be done: between two yields little time goes by.

        Its weights must not change meanwhile. Raises StorageFull.
        """
        path = self.path(step)
        if path is None or path.exists():
            return
        part = path.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        with ThreadPoolExecutor(1, "kept-base") as thread:
            saved = thread.submit(_save, pipeline(), part)
            while not _done(saved):
                yield
        part.rename(path)

    def prune(self, steps: set[int]) -> None:
        """Removes all but those of `steps`."""
        if self._folder is not None and self._folder.is_dir():
            for path in self._folder.iterdir():
                if path.name not in {str(step) for step in steps}:
                    shutil.rmtree(path, ignore_errors=True)


def _done(saved: Future[None]) -> bool:
    """Waits a little; raises what the thread raised."""
    try:
        saved.result(_PIECE_SECONDS)
    except TimeoutError:
        return False
    return True


def _save(pipeline: object, path: Path) -> None:
    try:
        path.mkdir(parents=True)
        pipeline.save_pretrained(path, safe_serialization=True, max_shard_size=_SHARD)  # type: ignore[attr-defined]
    except (OSError, SafetensorError) as error:
        shutil.rmtree(path, ignore_errors=True)
        # safetensors tells a full disk in words only.
        if getattr(error, "errno", None) in _FULL or "No space left" in str(error):
            raise StorageFull("no space left for the full weights of a training") from error
        raise
