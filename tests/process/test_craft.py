"""Merging, extracting and comparing on a real server, by the SDK and the command line."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from typer.testing import CliRunner

from atelier import AlreadyExistsError, AtelierError, Client, InvalidArgumentError, NotFoundError
from atelier.cli import cli
from atelier_server import pocket
from atelier_server.adapters.canonical import CanonicalAdapter, LoraModule
from tests.adapters import merge, random_adapter, write
from tests.ldm import write_single_file
from tests.process.server import Server

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for all: starting it takes longer than the tests."""
    running = Server(tmp_path_factory.mktemp("craft") / "data")
    try:
        yield running.start()
    finally:
        with suppress(ProcessLookupError):
            running.stop()


def pixels(client: Client, *adapters: str) -> np.ndarray:
    result = client.generate(
        "a red octopus on a beach", adapters=adapters, num_inference_steps=4, seed=1, scheduler="ddim"
    )
    return np.asarray(Image.open(io.BytesIO(result.images[0].data))).astype(int)


def command(server: Server, *arguments: str) -> dict[str, object]:
    result = CliRunner().invoke(cli, ["adapters", *arguments, "--server", server.address, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)  # type: ignore[no-any-return]


def test_merge_extract_and_diff(server: Server, tmp_path: Path) -> None:
    ada, bea = random_adapter(1, rank=4, alpha=4.0), random_adapter(2, rank=8, alpha=4.0, convolutions=True)
    tuned = StableDiffusionPipeline.from_pretrained(pocket.path(), dtype=torch.float32)
    merge(tuned, ada, 1.0)
    tuned.save_pretrained(tmp_path / "tuned")
    write_single_file(tuned, tmp_path / "tuned.safetensors")
    with Client(server.address) as client:
        imported = client.import_adapter(write(ada, tmp_path / "ada.safetensors"), "ada")
        client.import_adapter(write(bea, tmp_path / "bea.safetensors"), "bea")
        idle = {name: LoraModule(m.A, torch.zeros_like(m.B), m.alpha) for name, m in ada.low_rank.items()}
        nothing = client.import_adapter(write(CanonicalAdapter(idle), tmp_path / "idle.safetensors"), "idle")
        assert imported.report is not None
        assert imported.report.probe is not None
        assert nothing.report is not None
        assert 1e-4 < imported.report.probe < 10
        assert nothing.report.probe == 0

        composed = pixels(client, "ada:0.7", "bea:0.5")
        merged = command(server, "merge", "ada:0.7", "bea:0.5", "--name", "both")
        assert merged["kept"] == 1.0
        assert np.abs(pixels(client, "both") - composed).max() <= 1
        full = client.merge_adapters(["ada:0.7", "bea:0.25", "bea:0.25"], "full", rank=12)
        assert full.kept == pytest.approx(1.0)
        assert full.adapter.rank == 12
        assert np.abs(pixels(client, "full") - composed).max() <= 1
        small = client.merge_adapters(["ada:0.7", "bea:0.5"], "both", rank=2, new_version=True)
        assert small.adapter.version == 2
        assert 0.1 < small.kept < 0.95

        for number, reference in enumerate(("tuned", "tuned.safetensors")):
            name = f"extracted-{number}"
            made = command(
                server, "extract", "--tuned", str(tmp_path / reference), "--name", name, "--rank", "16"
            )
            assert made["kept"] == pytest.approx(1.0)
            found = command(server, "diff", "ada", name)
            assert found["whole"]["cosine"] == pytest.approx(1.0, abs=1e-5)  # type: ignore[index]
            assert found["only_a"] == found["only_b"] == []
        assert np.abs(pixels(client, "extracted-0") - pixels(client, "ada")).max() <= 1
        told: list[tuple[int, int]] = []
        client.extract_adapter(
            str(tmp_path / "tuned"),
            "again",
            2,
            base="pocket",
            progress=lambda done, total: told.append((done, total)),
        )
        assert told[0][0] == 0
        assert told[-1][0] == told[-1][1] == len(told) - 1
        apart = client.diff_adapters("ada", "bea")
        assert apart.only_b
        assert all("resnets" in name for name in apart.only_b)
        assert {module.rank_b for module in apart.differing} == {8}
        assert abs(apart.whole.cosine or 1) < 0.2
        text = CliRunner().invoke(cli, ["adapters", "diff", "ada", "bea", "--server", server.address])
        assert "only in bea@v1@0" in text.stdout
        assert "unet.mid_block" in text.stdout


def test_bad_input_is_told(server: Server, tmp_path: Path) -> None:
    with Client(server.address) as client:
        client.import_adapter(
            write(random_adapter(1, rank=40, alpha=4.0), tmp_path / "a.safetensors"), "cleo"
        )
        client.import_adapter(
            write(random_adapter(2, rank=40, alpha=4.0), tmp_path / "b.safetensors"), "dora"
        )
        cases: list[tuple[type[AtelierError], str, list[str], dict[str, object]]] = [
            (NotFoundError, "no adapter 'zoe'", ["cleo", "zoe"], {}),
            (InvalidArgumentError, "rank", ["cleo"], {"rank": 0}),
            (InvalidArgumentError, "rank", ["cleo"], {"rank": 65}),
            (
                InvalidArgumentError,
                "add up to 80, and this server takes 64.*give a rank",
                ["cleo", "dora"],
                {},
            ),
            (InvalidArgumentError, "adapters", [], {}),
            (InvalidArgumentError, "not a number", ["cleo:x"], {}),
            (InvalidArgumentError, "every weight is 0", ["cleo:0"], {}),
            (AlreadyExistsError, "'cleo' exists", ["cleo", "dora"], {"name": "cleo"}),
        ]
        for kind, message, adapters, more in cases:
            options = {"name": "never", **more}
            with pytest.raises(kind, match=message):
                client.merge_adapters(adapters, **options)  # type: ignore[arg-type]
        for kind, message, tuned, rank in (
            (InvalidArgumentError, "cannot be read", str(tmp_path / "nowhere"), 4),
            (InvalidArgumentError, "nothing to extract", "pocket", 4),
            (InvalidArgumentError, "rank", "pocket", 0),
            (InvalidArgumentError, "no checkpoint of a whole model", str(tmp_path / "a.safetensors"), 4),
        ):
            with pytest.raises(kind, match=message):
                client.extract_adapter(tuned, "never", rank)
        with pytest.raises(NotFoundError):
            client.diff_adapters("cleo", "zoe")
        assert "never" not in [adapter.name for adapter in client.list_adapters()]
