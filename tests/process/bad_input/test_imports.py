"""Files that are no adapters of this base."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from atelier import (
    Client,
    InvalidArgumentError,
    NotFoundError,
)
from tests.process.bad_input.calls import (
    paints,
    refused,
)

pytestmark = pytest.mark.process


def test_a_pickle_named_safetensors_is_never_unpickled(client: Client, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (trap,))

    file = tmp_path / "nice.safetensors"
    file.write_bytes(pickle.dumps(Trap()))
    error = refused(InvalidArgumentError, "UNSUPPORTED_FORMAT", lambda: client.import_adapter(file, "nice"))
    assert "safetensors" in error.message
    assert str(tmp_path) not in error.message
    assert not trap.exists()
    refused(NotFoundError, "ADAPTER_NOT_FOUND", lambda: client.get_adapter("nice"))


@pytest.mark.parametrize("size", [0, 4, 100])
def test_a_file_that_is_not_whole(client: Client, otto: str, size: int, tmp_path: Path) -> None:
    file = tmp_path / "cut.safetensors"
    client.export_adapter(otto, file)
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(InvalidArgumentError) as caught:
        client.import_adapter(file, "cut")
    assert caught.value.reason in ("INVALID_REQUEST", "UNSUPPORTED_FORMAT")


def test_an_adapter_that_does_not_fit(client: Client, otto: str, tmp_path: Path) -> None:
    file = tmp_path / "otto.safetensors"
    client.export_adapter(otto, file)
    weights = load_file(file)
    name = sorted(key for key in weights if "to_q" in key)[0]

    def spoilt(**changes: torch.Tensor) -> Callable[[], object]:
        target = tmp_path / "spoilt.safetensors"
        save_file({**weights, **changes}, target)
        return lambda: client.import_adapter(target, "spoilt")

    wider = torch.zeros(weights[name].shape[0], weights[name].shape[1] + 3)
    layer = name.partition(".lora")[0].removeprefix("unet.")
    assert layer in refused(InvalidArgumentError, "ADAPTER_MISMATCH", spoilt(**{name: wider})).message
    broken = torch.full_like(weights[name], float("nan"))
    assert layer in refused(InvalidArgumentError, "ADAPTER_MISMATCH", spoilt(**{name: broken})).message
    foreign = {key.replace(layer, "down_blocks.99.to_q"): value for key, value in weights.items()}
    target = tmp_path / "foreign.safetensors"
    save_file(foreign, target)
    refused(InvalidArgumentError, "ADAPTER_MISMATCH", lambda: client.import_adapter(target, "foreign"))
    assert client.import_adapter(file, "fitting").adapter.name == "fitting"
    assert paints(client, "fitting")
