"""A data directory that an earlier server wrote opens, and everything in it goes on.

`data/data-dir-0.1.0.tar.xz` is the first release's: `otto` is learned, `bolt` was stopped by SIGTERM.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from atelier import Client, Sample, TrainingCompleted, TrainingState
from tests.process.server import Server

pytestmark = pytest.mark.process

FIRST = Path(__file__).parent / "data" / "data-dir-0.1.0.tar.xz"


def test_the_first_releases_data_directory(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with tarfile.open(FIRST) as archive:
        archive.extractall(data, filter="data")
    server = Server(data)
    with Client(server.start().address) as client:
        assert [(a.name, a.trigger) for a in client.list_adapters()][-1] == ("otto", "a sks plush")
        (otto,) = client.get_adapter("otto").checkpoints
        assert (otto.step, otto.size_bytes) == (3, 78496)
        assert client.generate("a sks plush", adapters="otto", num_inference_steps=2).images[0].data
        client.export_adapter("otto", tmp_path / "otto.safetensors")

        told = list(client.watch_training("otto"))
        assert [event.seq for event in told] == list(range(1, len(told) + 1))
        (sample,) = [event for event in told if isinstance(event, Sample)]
        assert sample.data.startswith(b"\x89PNG")

        events = list(client.watch_training("bolt"))
        assert isinstance(events[-1], TrainingCompleted)
        assert (events[-1].state, events[-1].step) == (TrainingState.SUCCEEDED, 16)
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        assert client.generate("a sks plush", adapters="bolt@16", num_inference_steps=2).images[0].data
        assert {training.adapter for training in client.list_trainings()} == {"otto", "bolt"}
        assert client.get_training("otto").state is TrainingState.SUCCEEDED
    assert server.stop() == 0
    assert json.loads((data / "version.json").read_text())["version"] >= 1
    assert (data / "atelier.db.schema-1").is_file()
