"""Folders that are not whole: each is refused, and component, file or tensor named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from atelier_server.diffusion.families import UnsupportedModel
from atelier_server.diffusion.loading import load_pipeline
from tests.bases import edit, lose, save_base

Spoil = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_base(family, tmp_path_factory.mktemp(family) / "m") for family in ("sd1", "sdxl")}


def cut(component: Path) -> None:
    (file,) = component.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-50])


def scheduler_class(folder: Path, name: str) -> None:
    edit(folder / "model_index.json", scheduler=["diffusers", name])


def test_what_is_not_spoilt_is_loaded(whole: dict[str, Path]) -> None:
    for folder in whole.values():
        load_pipeline(str(folder), torch.float32)


SPOILT: dict[str, tuple[Spoil, str]] = {
    "unet-tensor": (
        lambda f: lose(f / "unet", "conv_out.bias"),
        r"m/unet lacks tensors of U.*: conv_out",
    ),
    "vae-tensor": (
        lambda f: lose(f / "vae", "quant_conv.bias"),
        r"m/vae lacks tensors of A.*: quant_conv",
    ),
    "text-tensor": (
        lambda f: lose(f / "text_encoder", "final_layer_norm.bias"),
        r"m/text_encoder lacks tensors of CLIPTextModel \(1\): .*final_layer_norm\.bias",
    ),
    "unet-cut": (lambda f: cut(f / "unet"), r"unet/diffusion_pytorch_model\.safetensors is not a whole"),
    "vae-cut": (lambda f: cut(f / "vae"), r"vae/diffusion_pytorch_model\.safetensors is not a whole"),
    "text-cut": (lambda f: cut(f / "text_encoder"), r"text_encoder/model\.safetensors is not a whole"),
    "text-config": (
        lambda f: (f / "text_encoder" / "config.json").unlink(),
        r"text_encoder/config\.json is missing",
    ),
    "text-width": (
        lambda f: edit(f / "text_encoder" / "config.json", hidden_size=48),
        r"m/text_encoder does not fit its config\.json: .* is \[77, 32\], should be \[77, 48\]",
    ),
    "unet-width": (
        lambda f: edit(f / "unet" / "config.json", norm_num_groups=8, block_out_channels=[24, 32]),
        "m/unet cannot be read as UNet2DConditionModel: ",
    ),
    "unet-activation": (
        lambda f: edit(f / "unet" / "config.json", act_fn="nonsense"),
        "m/unet cannot be read as UNet2DConditionModel: .*nonsense",
    ),
    "unet-size": (
        lambda f: edit(f / "unet" / "config.json", sample_size=None),
        "its U-Net has no sample",
    ),
    "tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), r"m/tokenizer has neither tokenizer\.json"),
    "scheduler": (lambda f: shutil.rmtree(f / "scheduler"), r"m cannot be read: .*scheduler_config\.json"),
    "flow": (
        lambda f: scheduler_class(f, "FlowMatchEulerDiscreteScheduler"),
        "its scheduler is FlowMatchEulerDiscreteScheduler, which knows no betas",
    ),
    "edm": (lambda f: scheduler_class(f, "EDMEulerScheduler"), "its scheduler is EDMEulerScheduler"),
    "prediction": (
        lambda f: edit(f / "scheduler" / "scheduler_config.json", prediction_type="flow_prediction"),
        "its scheduler has prediction_type='flow_prediction'; served are epsilon, v_prediction, sample",
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_folder_that_is_not_whole_is_refused(what: str, whole: dict[str, Path], tmp_path: Path) -> None:
    spoil, message = SPOILT[what]
    folder = Path(shutil.copytree(whole["sd1"], tmp_path / "m"))
    spoil(folder)
    with pytest.raises(UnsupportedModel, match=message):
        load_pipeline(str(folder), torch.float32)


OF_OTHERS = {
    "text_encoder": ("text_encoder", "its U-Net hears 72 numbers a token .*, its texts have 88"),
    "text_encoder_2": ("text_encoder_2", "class_embeddings_input_dim=88, pooled text and framing have 96"),
    "vae": ("vae", "its U-Net has out_channels=4, its VAE latent_channels=8"),
}


@pytest.mark.parametrize("component", OF_OTHERS)
def test_components_that_do_not_go_together_are_refused(
    component: str, whole: dict[str, Path], tmp_path: Path
) -> None:
    """Each of them whole, one of another model."""
    _, message = OF_OTHERS[component]
    folder = Path(shutil.copytree(whole["sdxl"], tmp_path / "m"))
    pipeline = load_pipeline(str(folder), torch.float32).pipeline
    model = getattr(pipeline, component)
    wider = {"vae": {"latent_channels": 8}, "text_encoder": {"hidden_size": 48}}
    changes = wider.get(component, {"projection_dim": 48})
    if component == "vae":
        other = type(model).from_config({**model.config, **changes})
    else:
        other = type(model)(type(model.config)(**{**model.config.to_dict(), **changes}))
    other.save_pretrained(folder / component)
    with pytest.raises(UnsupportedModel, match=message):
        load_pipeline(str(folder), torch.float32)
