"""A base's weights by the names of its layers, of folders and single files, against the loaded model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from atelier_server.diffusion import loading
from atelier_server.diffusion.base import load_base
from atelier_server.diffusion.families import UnsupportedModel
from atelier_server.diffusion.weights import ModelWeights
from tests.bases import FAMILIES, peer, save_base
from tests.ldm import write_single_file


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_is_found_in_a_folder_and_in_a_single_file(family: str, tmp_path: Path) -> None:
    folder = save_base(family, tmp_path / "base")
    base = load_base(str(folder), "cpu", "float32")
    file = tmp_path / "base.safetensors"
    write_single_file(peer(family, folder), file, family)
    of_folder = ModelWeights.of(str(folder), base.unet.config)
    of_file = ModelWeights.of(str(file), base.unet.config)
    assert of_folder.components == {"unet", *base.family.text_encoders}
    assert {"unet"} <= of_file.components <= of_folder.components
    for weights in (of_folder, of_file):
        for component in weights.components:
            for name, module in base.modules[component].named_modules():
                if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm | nn.GroupNorm):
                    weight = weights.get(f"{component}.{name}")
                    assert weight is not None
                    assert torch.equal(weight, module.weight)
    assert of_folder.get("unet.nothing") is None
    assert of_folder.get("vae.nothing") is None


def test_half_weights_are_read_as_they_are(tmp_path: Path) -> None:
    folder = save_base("sd1", tmp_path / "base", variant="fp16")
    weight = ModelWeights.of(str(folder), {}).get("unet.conv_in")
    assert weight is not None


@pytest.mark.parametrize("reference", ["./nowhere", "nowhere.safetensors", "empty", "lora.safetensors"])
def test_what_is_no_model_is_refused(reference: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / "lora.safetensors")
    with pytest.raises((UnsupportedModel, OSError)):
        ModelWeights.of(str(tmp_path / reference) if reference[0] != "." else reference, {})


def test_in_public_only_the_hub_is_read_and_as_anybody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenant's reference: no folder of this machine, nothing private, gated or only in the cache."""
    monkeypatch.chdir(tmp_path)
    folder = save_base("sd1", tmp_path / "owner" / "here")
    asked: list[tuple[str, bool | None]] = []
    error: Exception | None = None
    found: dict[str, object] = {"private": False, "gated": False}

    def model_info(reference: str, *, token: bool | None, **_: Any) -> Any:
        asked.append((reference, token))
        if error is not None:
            raise error
        return SimpleNamespace(**found)

    def downloaded(reference: str, token: bool | None = None) -> Path:
        asked.append((reference, token))
        return folder

    monkeypatch.setattr(loading, "HfApi", lambda: SimpleNamespace(model_info=model_info))
    monkeypatch.setattr(loading, "downloaded", downloaded)
    assert ModelWeights.of("owner/here", {}).components == {"unet", "text_encoder"}
    with pytest.raises(UnsupportedModel, match="everybody may read"):
        ModelWeights.of("owner/here", {}, public=True)
    assert asked == []
    assert ModelWeights.of("owner/there", {}, public=True).components == {"unet", "text_encoder"}
    assert asked == [("owner/there", False), ("owner/there", False)]
    for closed in ({"private": True, "gated": False}, {"private": False, "gated": "manual"}):
        found |= closed
        with pytest.raises(UnsupportedModel, match="everybody may read"):
            ModelWeights.of("owner/there", {}, public=True)
    error = httpx2.ConnectError("no route to host")
    with pytest.raises(UnsupportedModel, match="cannot be asked"):
        ModelWeights.of("owner/there", {}, public=True)
    assert "unet" in ModelWeights.of("pocket", {}, public=True).components
