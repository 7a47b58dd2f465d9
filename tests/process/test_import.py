"""Files of other tools through a real server: imported, painted with, exported, imported again."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from typer.testing import CliRunner

from atelier import Client, InvalidArgumentError
from atelier.cli import cli
from atelier_server import pocket
from atelier_server.adapters.canonical import LoraModule
from tests import foreign
from tests.process.server import Server

pytestmark = pytest.mark.process
HUB = "models--someone--toy"
Place = tuple[Client, Path]


@pytest.fixture(scope="module")
def changes() -> foreign.Changes:
    pipeline = StableDiffusionPipeline.from_pretrained(
        pocket.path(), safety_checker=None, requires_safety_checker=False
    )
    components = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    return foreign.changes_for(components, mixed=True, size=0.05)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, changes: foreign.Changes) -> Iterator[Place]:
    """A server without a network whose hub's cache holds someone/toy."""
    folder = tmp_path_factory.mktemp("import")
    snapshot = folder / "hub" / HUB / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (folder / "hub" / HUB / "refs").mkdir()
    (folder / "hub" / HUB / "refs" / "main").write_text("abc")
    foreign.kohya(changes, snapshot / "toy.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_CACHE", str(folder / "hub"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        server = Server(folder / "data").start()
    try:
        with Client(server.address) as client:
            yield client, folder
    finally:
        server.stop()


def paint(client: Client, adapter: str) -> bytes:
    return (
        client.generate(
            "a blue octopus", adapters=adapter, seed=3, num_inference_steps=2, reproducibility="strict"
        )
        .images[0]
        .data
    )


def test_whatever_a_file_is_named_like_it_paints_the_same(
    place: Place, changes: foreign.Changes, tmp_path: Path
) -> None:
    client, _ = place
    first = client.import_adapter(foreign.kohya(changes, tmp_path / "zoe.safetensors"), "zoe")
    assert first.report is not None
    assert (first.report.format, first.report.coverage) == ("kohya", 1.0)
    assert client.get_adapter("zoe").report == first.report
    client.import_adapter(foreign.peft_folder(changes, tmp_path / "peft"), "peft")
    client.import_adapter("someone/toy", "hub")
    for layout in ("kohya", "diffusers", "peft"):
        file = client.export_adapter("zoe", tmp_path / f"{layout}.safetensors", layout).path  # type: ignore[arg-type]
        again = client.import_adapter(file, f"zoe-{layout}").report
        assert again is not None
        assert (again.format, again.software) == (layout, "Atelier")
    pictures = {name: _pixels(paint(client, name)) for name in ("zoe", "peft", "hub", "zoe-kohya")}
    pictures |= {name: _pixels(paint(client, name)) for name in ("zoe-diffusers", "zoe-peft")}
    assert len(set(pictures.values())) == 1
    assert _pixels(paint(client, "zoe")) != _pixels(paint(client, "zoe:0"))


def test_what_does_not_fit_says_why_and_leaves_nothing(place: Place, tmp_path: Path) -> None:
    client, _ = place
    key = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    sdxl = {f"{key}.lora_down.weight": torch.ones(2, 4), f"{key}.lora_up.weight": torch.ones(4, 2)}
    with pytest.raises(InvalidArgumentError, match="file is of sdxl") as caught:
        client.import_adapter(foreign.save(sdxl, tmp_path / "x.safetensors"), "big")
    assert caught.value.reason == "ADAPTER_MISMATCH"
    assert caught.value.metadata["family"] == "sdxl"
    token = foreign.save({"emb_params": torch.ones(2, _width())}, tmp_path / "y.safetensors")
    with pytest.raises(InvalidArgumentError, match=r"word of the base model's vocabulary.*'<octopus>'"):
        client.import_adapter(token, "octopus")
    assert not {"big", "octopus"} & {adapter.name for adapter in client.list_adapters()}


def test_a_part_is_taken_when_it_is_allowed_and_shown_ever_after(
    place: Place, changes: foreign.Changes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = place
    monkeypatch.setenv("ATELIER_SERVER", client.address)
    name = next(name for name in changes if ".attn1.to_q" in name)
    module = changes[name]
    copied = LoraModule(module.A.clone(), module.B.clone(), module.alpha)
    part = {name: module, "unet.down_blocks.9.resnets.0.conv1": copied}
    file = str(foreign.kohya(part, tmp_path / "part.safetensors"))
    run = CliRunner().invoke
    refused = run(cli, ["adapters", "import", file, "--name", "part"])
    assert refused.exit_code == 1
    assert "1 of 2 parts" in refused.stderr
    taken = run(cli, ["adapters", "import", file, "--name", "part", "--allow-partial"])
    assert taken.exit_code == 0, taken.stderr
    for shown in (taken.stdout, run(cli, ["adapters", "show", "part"]).stdout):
        assert "1 parts were left out (50.0% fits)" in shown
        assert "lora_unet_down_blocks_9_resnets_0_conv1: the base model has no such module" in shown
    report = json.loads(run(cli, ["adapters", "show", "part", "--json"]).stdout)["report"]
    assert (report["coverage"], report["matched"]) == (0.5, [name])


def _width() -> int:
    config = json.loads((pocket.path() / "text_encoder" / "config.json").read_text())
    return int(config["hidden_size"])


def _pixels(picture: bytes) -> bytes:
    return Image.open(io.BytesIO(picture)).tobytes()
