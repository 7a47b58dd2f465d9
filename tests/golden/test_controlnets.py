"""ControlNets against diffusers' own pipelines, alone and in mixed batches; what is refused at the start."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    MultiControlNetModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
)
from PIL import Image

from atelier_server.core import InitImage, SchedulerOptions
from atelier_server.diffusion.base import BaseModel, load_base
from atelier_server.diffusion.conditioning import Framing
from atelier_server.diffusion.controlnet import Control, ControlNet, load_controlnets, mismatch
from atelier_server.diffusion.denoiser import Denoiser, Picture
from atelier_server.diffusion.families import UnsupportedModel
from atelier_server.diffusion.init_image import InitImages
from atelier_server.diffusion.trajectory import Trajectory
from tests.bases import FAMILIES, PIXELS, edit, lose, peer, sampled, save_base, save_controlnet
from tests.ldm import write_controlnet_file
from tests.pictures import right_part, soft_colours

PROMPT = "a red octopus on a beach"
NAMES = ("canny", "depth")
STEPS, SEED = 6, 7
# By whether the family is SDXL, and by mode.
PIPELINES: dict[tuple[bool, str], Any] = {
    (False, "text"): StableDiffusionControlNetPipeline,
    (False, "image"): StableDiffusionControlNetImg2ImgPipeline,
    (False, "inpaint"): StableDiffusionControlNetInpaintPipeline,
    (True, "text"): StableDiffusionXLControlNetPipeline,
    (True, "image"): StableDiffusionXLControlNetImg2ImgPipeline,
    (True, "inpaint"): StableDiffusionXLControlNetInpaintPipeline,
}


@dataclass(frozen=True)
class Served:
    """A base and two ControlNets, ours and theirs."""

    base: BaseModel
    nets: dict[str, ControlNet]
    folders: dict[str, Path]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Served]:
    made = {}
    for family in FAMILIES:
        root = tmp_path_factory.mktemp(family)
        folders = {"base": save_base(family, root / "base")}
        for seed, name in enumerate(NAMES, 1):
            folders[name] = save_controlnet(family, root / name, folders["base"], seed=seed)
        base = load_base(str(folders["base"]), "cpu")
        nets = load_controlnets({name: str(folders[name]) for name in NAMES}, base)
        made[family] = Served(base, nets, folders)
    return made


@dataclass(frozen=True)
class Use:
    name: str
    seed: int
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0

    @property
    def pixels(self) -> torch.Tensor:
        """[3, H, W]: coarse random squares."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(3, 8, 8, generator=generator).repeat_interleave(8, 1).repeat_interleave(8, 2)


def picture(
    served: Served,
    *uses: Use,
    scale: float = 6.0,
    scheduler: str = "euler",
    seed: int = SEED,
    steps: int = STEPS,
    init: InitImage | None = None,
) -> Picture:
    base, framing = served.base, Framing.whole(PIXELS, PIXELS)
    return Picture(
        Trajectory.begin(
            scheduler,
            base.scheduler_config,
            options=SchedulerOptions(),
            num_inference_steps=steps,
            seed=seed,
            shape=base.latent_shape(PIXELS, PIXELS),
            device=base.device,
            dtype=base.dtype,
            init=InitImages(base).latents(init) if init else None,
        ),
        prompt=base.family.condition(base.encode_prompt(PROMPT), framing),
        negative=base.family.condition(base.encode_negative(None), framing) if scale > 1 else None,
        guidance_scale=scale,
        controls=[Control(served.nets[u.name], u.pixels, u.scale, u.start, u.end) for u in uses],
    )


def painted(served: Served, pictures: Sequence[Picture], bucket: int) -> list[torch.Tensor]:
    """The latents of pictures that join one another in every step."""
    denoiser = Denoiser(served.base.unet, served.base.scheduler_config)
    while live := [p for p in pictures if not p.trajectory.finished]:
        denoiser.step(live, bucket)
    return [p.trajectory.latents for p in pictures]


def theirs(
    family: str, served: Served, uses: Sequence[Use], scale: float, init: InitImage | None = None
) -> np.ndarray:
    """diffusers' pipeline with the same ControlNets."""
    nets = [ControlNetModel.from_pretrained(served.folders[use.name]) for use in uses]
    several = len(nets) > 1
    pipeline = PIPELINES[family == "sdxl", _mode(init)].from_pipe(
        peer(family, served.folders["base"]), controlnet=MultiControlNetModel(nets) if several else nets[0]
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = type(picture(served).trajectory.scheduler).from_config(served.base.scheduler_config)

    def each(values: list[Any]) -> Any:
        return values if several else values[0]

    guides = each([use.pixels[None] for use in uses])
    begun: dict[str, Any] = {"image": guides}
    if init is not None:
        begun = {"image": opened(init.image), "control_image": guides, "strength": init.strength}
        begun |= {"mask_image": opened(init.mask)} if init.mask else {}
    return pipeline(
        PROMPT,
        **begun,
        controlnet_conditioning_scale=each([use.scale for use in uses]),
        control_guidance_start=each([use.start for use in uses]),
        control_guidance_end=each([use.end for use in uses]),
        num_inference_steps=STEPS,
        guidance_scale=scale,
        generator=torch.Generator("cpu").manual_seed(SEED),
        output_type="np",
    ).images[0]


def _mode(init: InitImage | None) -> str:
    return "text" if init is None else "inpaint" if init.mask else "image"


def opened(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file))


def pixels(served: Served, latents: torch.Tensor) -> np.ndarray:
    return served.base.decode_latents(latents[0]).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("family", sampled("sd1", "sdxl"))
@pytest.mark.parametrize(
    ("uses", "scale"),
    [
        pytest.param([Use("canny", 1)], 6.0, marks=pytest.mark.soak, id="guided"),
        pytest.param([Use("canny", 1, scale=0.5, start=0.2, end=0.7)], 1.0, id="unguided, for some steps"),
        pytest.param([Use("canny", 1, scale=1.5), Use("depth", 2, scale=0.7, end=0.5)], 6.0, id="two"),
    ],
)
def test_equals_the_pipeline_of_diffusers(
    family: str, uses: list[Use], scale: float, served: dict[str, Served]
) -> None:
    mine = served[family]
    ours = pixels(mine, painted(mine, [picture(mine, *uses, scale=scale)], 2)[0])
    without = pixels(mine, painted(mine, [picture(mine, scale=scale)], 2)[0])
    assert np.abs(ours - theirs(family, mine, uses, scale)).max() <= 1 / 255
    assert np.abs(ours - without).max() > 8 / 255


@pytest.mark.parametrize("family", sampled("sd1", "sdxl"))
@pytest.mark.parametrize("mask", [b"", right_part()], ids=["image", "inpaint"])
def test_from_a_picture_it_equals_the_pipeline_of_diffusers(
    family: str, mask: bytes, served: dict[str, Served]
) -> None:
    """The window is of the steps that are taken."""
    mine, init = served[family], InitImage(soft_colours(), "", 0.7, mask)
    uses = [Use("canny", 1, scale=1.5, start=0.2), Use("depth", 2, scale=0.7, end=0.6)]
    ours = pixels(mine, painted(mine, [picture(mine, *uses, init=init)], 2)[0])
    without = pixels(mine, painted(mine, [picture(mine, init=init)], 2)[0])
    assert np.abs(ours - theirs(family, mine, uses, 6.0, init)).max() <= 1 / 255
    assert np.abs(ours - without).max() > 8 / 255


@pytest.mark.parametrize("family", sampled("sdxl"))
def test_rows_with_and_without_share_a_forward_and_keep_their_bits(
    family: str, served: dict[str, Served]
) -> None:
    mine = served[family]
    wanted: list[tuple[list[Use], float, str, int]] = [
        ([], 6.0, "euler", 6),
        ([Use("canny", 1)], 6.0, "ddim", 4),
        ([Use("depth", 2, scale=0.5, start=0.3)], 1.0, "dpmpp-2m", 5),
        ([Use("depth", 3), Use("canny", 4, end=0.5)], 4.0, "euler-a", 3),
        ([], 1.0, "ddim", 5),
    ]

    def fresh(number: int) -> Picture:
        uses, scale, scheduler, steps = wanted[number]
        return picture(mine, *uses, scale=scale, scheduler=scheduler, seed=number, steps=steps)

    alone = [painted(mine, [fresh(number)], 8)[0] for number in range(len(wanted))]
    together = painted(mine, [fresh(number) for number in reversed(range(len(wanted)))], 8)
    for one, other in zip(alone, reversed(together), strict=True):
        assert torch.equal(one, other)


def test_what_does_not_use_a_controlnet_never_sees_its_overflow(served: dict[str, Served]) -> None:
    mine = served["sd1"]
    broken = Control(mine.nets["canny"], torch.full((3, 64, 64), 1e38), 1.0)
    pictures = [picture(mine), picture(mine)]
    pictures[1].controls = [broken]
    plain, controlled = painted(mine, pictures, 4)
    assert not controlled.isfinite().all()
    assert torch.equal(plain, painted(mine, [picture(mine)], 4)[0])


@pytest.mark.parametrize("original", [False, True], ids=["diffusers' names", "original names"])
def test_a_single_file_takes_its_config_from_the_folder_beside_it(
    original: bool, served: dict[str, Served], tmp_path: Path
) -> None:
    mine = served["sd1"]
    net, file = mine.nets["canny"].model, _beside(mine, tmp_path)
    if original:
        write_controlnet_file(net, file)
    else:
        shutil.copy(mine.folders["canny"] / "diffusion_pytorch_model.safetensors", file)
    loaded = load_controlnets({"lines": str(file)}, mine.base)["lines"]
    states = loaded.model.state_dict()
    assert states.keys() == net.state_dict().keys()
    assert all(torch.equal(tensor, states[name]) for name, tensor in net.state_dict().items())
    with pytest.raises(UnsupportedModel, match=r"does not fit the base \(sdxl\)"):
        load_controlnets({"lines": str(file)}, served["sdxl"].base)


def test_a_single_file_that_is_not_whole_is_told(served: dict[str, Served], tmp_path: Path) -> None:
    """diffusers does not know the original names of SDXL's additional embedding in a ControlNet."""
    mine = served["sdxl"]
    file = _beside(mine, tmp_path)
    write_controlnet_file(mine.nets["canny"].model, file)
    with pytest.raises(UnsupportedModel, match=r"lines\.safetensors is not whole: it lacks tensors"):
        load_controlnets({"lines": str(file)}, mine.base)


def _beside(served: Served, folder: Path) -> Path:
    """The place for a file, with the config of `canny` beside it."""
    (folder / "lines").mkdir()
    shutil.copy(served.folders["canny"] / "config.json", folder / "lines")
    return folder / "lines.safetensors"


def test_the_window_is_diffusers() -> None:
    control = Control(net=None, image=torch.empty(0), scale=0.5, start=0.2, end=0.6)  # type: ignore[arg-type]
    assert [control.scale_at(step, 5) for step in range(5)] == [0.0, 0.5, 0.5, 0.0, 0.0]


# ------------------------------------------------------------------------------------------------- refused
def test_another_familys_is_refused_at_the_start(served: dict[str, Served]) -> None:
    base, other = served["sdxl"].base, served["sd1"].folders["canny"]
    with pytest.raises(UnsupportedModel) as caught:
        load_controlnets({"lines": str(other)}, base)
    message = str(caught.value)
    assert message.startswith(
        f"controlnet lines={other}: does not fit the base (sdxl): its cross_attention_dim"
    )
    assert "is 32, the base's 72" in message


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("/no/such/folder", "there is no such folder"),
        ("./net.safetensors", "there is no such file"),
    ],
)
def test_what_is_not_there_is_named(reference: str, message: str, served: dict[str, Served]) -> None:
    with pytest.raises(UnsupportedModel, match=f"controlnet lines={reference}: {message}"):
        load_controlnets({"lines": reference}, served["sd1"].base)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: edit(folder / "config.json", in_channels=9), "has in_channels=9 instead of 4"),
        (lambda folder: lose(folder, "controlnet_mid_block.bias"), r"lacks tensors.*controlnet_mid_block\.b"),
    ],
)
def test_a_folder_that_is_not_whole_is_told(
    spoil: Callable[[Path], None], message: str, served: dict[str, Served], tmp_path: Path
) -> None:
    mine = served["sd1"]
    spoil(save_controlnet("sd1", tmp_path / "lines", mine.folders["base"]))
    with pytest.raises(UnsupportedModel, match=message):
        load_controlnets({"lines": str(tmp_path / "lines")}, mine.base)


def test_a_folder_of_something_else_is_told(served: dict[str, Served], tmp_path: Path) -> None:
    mine = served["sd1"]
    with pytest.raises(UnsupportedModel, match=r"config\.json is missing; found: model_index\.json"):
        load_controlnets({"lines": str(mine.folders["base"])}, mine.base)
    with pytest.raises(UnsupportedModel, match="is UNet2DConditionModel instead of ControlNetModel"):
        load_controlnets({"lines": str(mine.folders["base"] / "unet")}, mine.base)
    config = dict(mine.nets["canny"].model.config)
    for changes, message in (
        ({"global_pool_conditions": True}, "has global_pool_conditions=True instead of False"),
        ({"block_out_channels": [16, 64]}, r"its block_out_channels is \(16, 64\), the base's \(16, 32\)"),
        ({"conditioning_embedding_out_channels": [8, 8, 16]}, "pictures become 4 times smaller, not 8"),
        ({"_class_name": "ControlNetUnionModel"}, "is ControlNetUnionModel instead of ControlNetModel"),
    ):
        found = mismatch(
            {"_class_name": "ControlNetModel", **config, **changes}, mine.base.unet.config, "sd1", 8
        )
        assert re.search(message, found)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text((mine.folders["canny"] / "config.json").read_text())
    (pickled / "diffusion_pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UnsupportedModel, match="pickled weights are not read"):
        load_controlnets({"lines": str(pickled)}, mine.base)
