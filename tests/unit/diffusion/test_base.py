"""Loading bases from what users have, and saying clearly what is not supported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from atelier_server import pocket
from atelier_server.diffusion.base import BaseModel, load_base
from atelier_server.diffusion.families import UnsupportedModel
from tests.bases import edit
from tests.ldm import write_single_file


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return load_base("pocket", "cpu")


def copy_of_pocket(folder: Path) -> Path:
    return Path(shutil.copytree(pocket.path(), folder, ignore=shutil.ignore_patterns("*.py", "__pycache__")))


def equal_weights(one: BaseModel, other: BaseModel) -> bool:
    return all(
        torch.equal(tensor, other.modules[part].state_dict()[name])
        for part, module in one.modules.items()
        for name, tensor in module.state_dict().items()
    )


def test_pocket_is_frozen_and_knows_its_sizes(base: BaseModel) -> None:
    assert (base.family.name, base.native_width, base.native_height) == ("sd1", 64, 64)
    assert base.latent_shape(128, 64) == (4, 16, 32)
    assert not any(p.requires_grad for p in base.unet.parameters())
    assert not base.unet.training
    assert base.dtype == torch.float32
    assert len(base.sha256) == 64


def test_without_torchao_it_says_what_to_install() -> None:
    with pytest.raises(UnsupportedModel, match=r"--quantize int8 needs torchao.*atelier\[quantize\]"):
        load_base("pocket", "cpu", quantization="int8")


def test_a_folder_is_loaded_like_pocket(base: BaseModel, tmp_path: Path) -> None:
    loaded = load_base(str(copy_of_pocket(tmp_path / "model")), "cpu")
    assert loaded.sha256 == base.sha256
    assert equal_weights(base, loaded)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_other_weights_anywhere_are_another_base(base: BaseModel, tmp_path: Path, component: str) -> None:
    folder = copy_of_pocket(tmp_path / "model")
    (file,) = (folder / component).glob("*.safetensors")
    tensors = load_file(file)
    tensors[min(tensors)] += 1
    save_file(tensors, file, {"format": "pt"})
    assert load_base(str(folder), "cpu").sha256 != base.sha256


@pytest.mark.parametrize("name", ["scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"])
def test_other_configs_are_told_apart_and_the_weights_stay_the_same(
    base: BaseModel, tmp_path: Path, name: str
) -> None:
    folder = copy_of_pocket(tmp_path / "model")
    assert load_base(str(folder), "cpu").config_sha256 == base.config_sha256
    edit(folder / name, something="else")
    other = load_base(str(folder), "cpu")
    assert (other.sha256 == base.sha256, other.config_sha256 == base.config_sha256) == (True, False)


def test_a_half_precision_variant_is_found(base: BaseModel, tmp_path: Path) -> None:
    folder = copy_of_pocket(tmp_path / "model")
    for file in folder.glob("*/*.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    assert equal_weights(base, load_base(str(folder), "cpu"))


def test_a_single_file_takes_its_configs_from_the_folder_beside_it(base: BaseModel, tmp_path: Path) -> None:
    folder = copy_of_pocket(tmp_path / "model")
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    for weights in folder.glob("*/*.safetensors"):
        weights.unlink()
    write_single_file(pipeline, tmp_path / "model.safetensors")
    loaded = load_base(str(tmp_path / "model.safetensors"), "cpu")
    assert equal_weights(base, loaded)
    assert loaded.encode_prompt("a red cat").states.equal(base.encode_prompt("a red cat").states)


def test_what_is_not_supported_is_named(tmp_path: Path) -> None:
    folder = copy_of_pocket(tmp_path / "model")
    config = folder / "unet" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "in_channels": 8}))
    with pytest.raises(UnsupportedModel, match="its U-Net has in_channels=8 instead of 4, or 9"):
        load_base(str(folder), "cpu")
    config.write_text(json.dumps(content))
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "FluxPipeline"))
    with pytest.raises(UnsupportedModel, match="its pipeline is FluxPipeline"):
        load_base(str(folder), "cpu")
    index.unlink()
    with pytest.raises(UnsupportedModel, match=r"model_index\.json is missing; found: .*unet"):
        load_base(str(folder), "cpu")


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    folder = copy_of_pocket(tmp_path / "model")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UnsupportedModel, match="pickled weights are not read"):
        load_base(str(folder), "cpu")


@pytest.mark.parametrize("reference", ["/no/such/folder", "./nothing.safetensors"])
def test_what_is_not_there_is_named(reference: str) -> None:
    with pytest.raises(UnsupportedModel, match="there is no such"):
        load_base(reference, "cpu")


def test_the_tokenizer_knows_its_words(base: BaseModel) -> None:
    """CLIPTokenizer(vocab_file=) silently has two tokens: what is loaded must not be that."""
    tokenizer = base.encoders[0].tokenizer
    assert isinstance(tokenizer, CLIPTokenizer)
    ids = tokenizer("a red octopus on a beach").input_ids
    assert len(tokenizer) > 2000
    assert tokenizer.unk_token_id not in ids[1:-1]
    assert len(set(ids[1:-1])) == 5


def test_text_and_pictures_are_encoded_alone(base: BaseModel) -> None:
    once = base.encode_prompt("a red octopus").states
    base.encode_prompt("something else")
    assert once.shape == (base.max_prompt_tokens, base.unet.config.cross_attention_dim)
    assert torch.equal(once, base.encode_prompt("a red octopus").states)
    mean, std = base.encode_image(torch.zeros(3, 64, 64))
    assert mean.shape == std.shape == base.latent_shape(64, 64)
    assert mean.is_contiguous()  # the layout of one row is that of its whole batch
    assert std.is_contiguous()
    pixels = base.decode_latents(mean)
    assert pixels.shape == (3, 64, 64)
    assert float((pixels - 0.5).abs().mean()) < 0.1


def test_the_vae_has_its_channels_last_and_decodes_the_same(base: BaseModel) -> None:
    weight = base.vae.decoder.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    latents = torch.randn(base.latent_shape(64, 64), generator=torch.Generator().manual_seed(0))
    vae = StableDiffusionPipeline.from_pretrained(pocket.path(), dtype=torch.float32).vae
    with torch.no_grad():
        plain = vae.decode(latents[None] / vae.config.scaling_factor).sample[0] / 2 + 0.5
    torch.testing.assert_close(base.decode_latents(latents), plain.clamp(0, 1), atol=1e-4, rtol=0)
