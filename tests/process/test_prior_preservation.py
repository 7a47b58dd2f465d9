"""Prior preservation on a real server: class pictures are painted once, kept, and the training ends with the
same weights whatever happens to the worker."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from atelier import CheckpointPublished, Client, TrainingProgress, TrainingRestarted
from tests.process.server import Server

pytestmark = pytest.mark.process
PICTURES = sorted((Path(__file__).parents[2] / "examples" / "otto").glob("*.png"))[:3]
KNOBS = {
    "instance_prompt": "a sks plush octopus",
    "class_prompt": "a plush octopus",
    "with_prior_preservation": True,
    "num_class_images": 5,
    "validation_steps": 3,
    "max_train_steps": 24,
    "checkpointing_steps": 8,
    "train_batch_size": 2,
    "optimizer": "prodigy",
    "learning_rate": 1.0,
    "use_ema": True,
    "noise_offset": 0.05,
    "validation_split": 0.3,
    "mixed_precision": "bf16",
}


@pytest.mark.timeout(300)
def test_class_pictures_are_painted_once_and_a_killed_training_ends_the_same(tmp_path: Path) -> None:
    """With the other knobs that hold a state of their own."""
    server = Server(tmp_path / "data").start()
    folder = tmp_path / "pictures"
    folder.mkdir()
    for path in PICTURES:
        shutil.copy(path, folder)
    kept = {}
    with Client(server.address) as client:
        calm = list(client.train("calm", folder=folder, **KNOBS))
        storm = []
        for event in client.train("storm", folder=folder, **KNOBS):
            storm.append(event)
            if isinstance(event, TrainingProgress) and 8 < event.step < 16 and not kept:
                kept = modified(tmp_path, "storm")
                server.kill_worker()
        assert sum(isinstance(event, TrainingRestarted) for event in storm) == 1
        last = [client.get_adapter(name).checkpoints[-1].sha256 for name in ("calm", "storm")]
    assert last[0] == last[1]
    losses = [e.validation_loss for e in calm if isinstance(e, CheckpointPublished)]
    assert losses == [e.validation_loss for e in storm if isinstance(e, CheckpointPublished)]
    assert len(losses) == 3
    assert all(loss is not None and 0 < loss < 10 for loss in losses)
    assert modified(tmp_path, "storm") == kept, "none was painted again"
    assert [path.name for path in kept] == [f"{number:06d}.png" for number in range(5)]
    for one, other in zip(modified(tmp_path, "calm"), kept, strict=True):
        assert np.array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(other)))
    assert server.stop() == 0


def modified(data: Path, name: str) -> dict[Path, int]:
    """The class pictures of a training, and when each was written."""
    files = sorted(data.glob(f"data/**/{name}-*/class/*"))
    return {file: file.stat().st_mtime_ns for file in files}
