"""Bases of every family from every kind of reference, and clear words for what is not served."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from atelier_server.diffusion.base import BaseModel, load_base
from atelier_server.diffusion.conditioning import Framing
from atelier_server.diffusion.families import SDXL, UnsupportedModel, detect
from atelier_server.diffusion.loading import load_pipeline
from tests.bases import FAMILIES, edit, peer, sampled, save_base
from tests.ldm import write_single_file


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_base(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


def equal(one: BaseModel, other: BaseModel) -> bool:
    return all(
        torch.equal(tensor, other.modules[part].state_dict()[name])
        for part, module in one.modules.items()
        for name, tensor in module.state_dict().items()
    )


@pytest.mark.parametrize("family", sampled("sd2", "sdxl"))
def test_a_single_file_of_every_family(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = save_base(family, tmp_path / "model")
    pipeline = peer(family, folder)
    for weights in folder.glob("*/*.safetensors"):
        weights.unlink()
    write_single_file(pipeline, tmp_path / "model.safetensors", family)
    loaded = load_base(str(tmp_path / "model.safetensors"), "cpu")
    assert loaded.family.name == family
    expected = load_base(str(folders[family]), "cpu")
    assert equal(loaded, expected)
    for ours, theirs in zip(
        loaded.encode_negative(None).tensors(), expected.encode_negative(None).tensors(), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", sampled("sdxl"))
def test_half_precision_files_are_found_component_by_component(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    mixed = save_base(family, tmp_path / "model")
    for component in ("unet", "text_encoder"):
        for file in (mixed / component).glob("*.safetensors"):
            file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    expected = load_base(str(folders[family]), "cpu")
    assert equal(load_base(str(mixed), "cpu"), expected)
    variant = load_base(str(save_base(family, tmp_path / "variant", variant="fp16")), "cpu")
    assert equal(variant, expected)
    assert variant.sha256 == expected.sha256


def test_full_files_come_before_half_ones(folders: dict[str, Path], tmp_path: Path) -> None:
    both = save_base("sd1", tmp_path / "model")
    half = {"x": torch.zeros(1)}
    save_file(half, both / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    save_file(half, both / "unet" / "diffusion_pytorch_model.non_ema.safetensors")
    loaded = load_base(str(both), "cpu")
    assert equal(loaded, load_base(str(folders["sd1"]), "cpu"))


def test_old_configs_leave_out_what_has_its_default(tmp_path: Path) -> None:
    """Those of Stable Diffusion 1.5 know nothing of linear projections, 2023's additions and so on."""
    folder = save_base("sd1", tmp_path / "model")
    new = ("use_linear_projection", "addition_embed_type", "time_cond_proj_dim", "encoder_hid_dim")
    edit(folder / "unet" / "config.json", **dict.fromkeys(new))
    assert load_base(str(folder), "cpu").family.name == "sd1"


@pytest.mark.soak
def test_a_hub_id(folders: dict[str, Path], tmp_path: Path) -> None:
    """From the hub's cache on this machine; nothing is fetched."""
    repository, revision = tmp_path / "hub" / "models--someone--tiny", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / revision).symlink_to(folders["sdxl"])
    code = (
        "import sys; from atelier_server.diffusion.base import load_base\n"
        "print(load_base(sys.argv[1], 'cpu').sha256)"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(
        [sys.executable, "-c", code, "someone/tiny"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == [load_base(str(folders["sdxl"]), "cpu").sha256]


# -------------------------------------------------------------------------------------------- what is heard
def test_sdxl_hears_pooled_text_and_framing(folders: dict[str, Path]) -> None:
    base = load_base(str(folders["sdxl"]), "cpu")
    text = base.encode_prompt("a red cat")
    row = SDXL.condition(text, Framing((100, 200), (3, 4), (64, 96)))
    assert row.prompt_embeds.shape == (77, base.unet.config.cross_attention_dim)
    assert row.added["time_ids"].tolist() == [100, 200, 3, 4, 64, 96]
    assert row.added["text_embeds"].shape == (40,)
    assert not base.encode_negative(None).states.any()
    assert not base.encode_negative(None).pooled.any()
    assert torch.equal(base.encode_negative("").states, base.encode_prompt("").states)
    assert base.encode_negative("a fish").states.any()
    assert base.encode_prompt("").states.any()


def test_a_decoder_that_overflows_stays_in_float32(folders: dict[str, Path]) -> None:
    half = load_base(str(folders["sdxl"]), "cpu", "float16")
    assert (half.dtype, half.vae.dtype) == (torch.float16, torch.float32)
    latents = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    full = load_base(str(folders["sdxl"]), "cpu")
    assert (half.decode_latents(latents.half()) - full.decode_latents(latents)).abs().max() < 0.01
    assert half.encode_image(torch.zeros(3, 64, 64))[0].dtype == torch.float32
    assert load_base(str(folders["sdxl"]), "cpu", "bfloat16").vae.dtype == torch.bfloat16
    # Stable Diffusion 1.x says force_upcast by default, and its pipeline does not heed it.
    assert load_base(str(folders["sd1"]), "cpu", "float16").vae.dtype == torch.float16


def test_latents_may_have_a_mean_and_a_deviation(folders: dict[str, Path], tmp_path: Path) -> None:
    """As Playground v2.5's have: the units of the U-Net are those of diffusers' pipeline."""
    folder = save_base("sdxl", tmp_path / "model")
    edit(folder / "vae" / "config.json", latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[2.0, 3.0, 4.0, 5.0])
    base = load_base(str(folder), "cpu")
    latents = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.1, 0.2, 0.3, 0.4), (2.0, 3.0, 4.0, 5.0)))
    with torch.no_grad():
        units = latents * std / base.vae.config.scaling_factor + mean
        theirs = base.vae.decode(units[None]).sample[0]
    assert torch.allclose(base.decode_latents(latents), (theirs / 2 + 0.5).clamp(0, 1), atol=1e-5)


# ------------------------------------------------------------------------------------------ what is refused
INDEX = {
    "_class_name": "StableDiffusionXLPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
}
UNET = {"in_channels": 4, "addition_embed_type": "text_time"}
REFINER = {**INDEX, "_class_name": "StableDiffusionXLImg2ImgPipeline", "text_encoder": [None, None]}
FLUX = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}


@pytest.mark.parametrize(
    ("index", "unet", "message"),
    [
        (REFINER, UNET, "found StableDiffusionXLImg2ImgPipeline of text_encoder_2 CLIPTextModelWithProj"),
        (FLUX, {}, "found FluxPipeline of transformer FluxTransformer2DModel; not sd1: its pipeline is Flux"),
        (
            {"_class_name": "StableDiffusion3Pipeline"},
            {},
            "not sdxl: its pipeline is StableDiffusion3Pipe",
        ),
        ({**INDEX, "text_encoder": None}, UNET, "not sdxl: its text_encoder is missing instead of CLIPText"),
        ({**INDEX, "vae": ["diffusers", "AutoencoderTiny"]}, UNET, "its vae is AutoencoderTiny instead of"),
        (INDEX, {**UNET, "time_cond_proj_dim": 256}, "its U-Net has time_cond_proj_dim=256 instead of None"),
        (INDEX, {**UNET, "in_channels": 8}, "its U-Net has in_channels=8 instead of 4"),
        (
            INDEX,
            {**UNET, "addition_embed_type": "image"},
            "addition_embed_type='image' instead of 'text",
        ),
        ({}, {}, "found None of nothing"),
    ],
)
def test_what_was_found_is_told(index: Mapping[str, Any], unet: Mapping[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        detect(index, unet)
    assert message in str(caught.value)


def test_a_folder_without_a_unet_is_told(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps(FLUX))
    with pytest.raises(UnsupportedModel, match="found FluxPipeline"):
        load_base(str(tmp_path), "cpu")
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(UnsupportedModel, match=r"model_index\.json is not JSON"):
        load_base(str(tmp_path), "cpu")


@pytest.mark.parametrize("lost", ["model.diffusion_model.out.2.weight", "ln_1.weight"])
def test_a_single_file_that_is_not_whole_is_told(lost: str, tmp_path: Path) -> None:
    folder, file = save_base("sdxl", tmp_path / "model"), tmp_path / "model.safetensors"
    write_single_file(peer("sdxl", folder), file, "sdxl")
    left = {name: tensor for name, tensor in load_file(file).items() if not name.endswith(lost)}
    save_file(left, file)
    with pytest.raises(UnsupportedModel, match=r"model\.safetensors is not whole: it lacks tensors"):
        load_base(str(file), "cpu")


FIRST = "model.diffusion_model.input_blocks.0.0.weight"
REFINER_KEY = "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias"


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            {FIRST: (1, 4, 3, 3), REFINER_KEY: (4,)},
            "is a checkpoint of kind xl_refiner; served are",
        ),
        (
            {"lora_unet_conv_in.lora_down.weight": (4, 4)},
            "no checkpoint of a whole model: 1 tensors, the",
        ),
    ],
)
def test_single_files_of_other_models_are_told(
    shapes: Mapping[str, tuple[int, ...]], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    with pytest.raises(UnsupportedModel, match=message):
        load_pipeline(str(path), torch.float32)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UnsupportedModel, match="is not a whole safetensors file"):
        load_pipeline(str(path), torch.float32)
