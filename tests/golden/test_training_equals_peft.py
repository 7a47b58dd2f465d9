"""Training through the bank against a plain PEFT loop of the same recipe, alone and beside pictures."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

from atelier_server import pocket
from atelier_server.adapters.bank import SlotBank
from atelier_server.adapters.store import AdapterStore
from atelier_server.core import Recipe, TrainingImage, TrainingJob
from atelier_server.diffusion.base import load_base
from atelier_server.diffusion.conditioning import Conditioning, Framing
from atelier_server.diffusion.denoiser import Denoiser
from atelier_server.training.trainer import Trainer
from tests.bases import FAMILIES, peer, save_base
from tests.unit.adapters.tiny import EVERYTHING, adapter_for

STEPS = 12
RECIPE = Recipe(
    instance_prompt="otto the octopus",
    resolution=64,
    max_train_steps=STEPS,
    train_batch_size=3,
    rank=4,
    lora_alpha=8.0,
    learning_rate=1e-3,
    seed=11,
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{number}.png" for number in range(4)]
    for number, path in enumerate(paths):
        values = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(values).save(path)
    return paths


Run = tuple[list[float], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {family: save_base(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}
    return {"pocket": pocket.path(), **made}


@pytest.fixture(scope="module")
def peft_run(images: list[Path], folders: dict[str, Path]) -> Callable[[str], Run]:
    return cache(lambda name: plain_loop(name, folders[name], images))


def plain_loop(name: str, folder: Path, images: list[Path]) -> Run:
    """diffusers' and PEFT's own pieces, as their DreamBooth scripts put them together."""
    pipe = peer(name, folder)
    unet = pipe.unet.requires_grad_(False)
    torch.manual_seed(RECIPE.seed)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian", target_modules=targets))
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    with torch.no_grad():
        pixels = torch.stack(
            [torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in images]
        )
        posteriors = [pipe.vae.encode(p[None] / 127.5 - 1.0).latent_dist for p in pixels]
        encoded = pipe.encode_prompt(
            RECIPE.instance_prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        prompt, added = encoded[0], None
        if name == "sdxl":
            time_ids = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]])
            added = {"text_embeds": encoded[2].expand(3, -1), "time_ids": time_ids.expand(3, -1)}
    chance = torch.Generator().manual_seed(RECIPE.seed)
    order: list[int] = []
    losses = []
    for _ in range(STEPS):
        picked = []
        for _ in range(3):
            order = order or torch.randperm(len(images), generator=chance).tolist()
            picked.append(order.pop(0))
        for _ in picked:
            torch.randint(1, (), generator=chance)  # which crop: there is one
        mean = torch.cat([posteriors[index].mean for index in picked])
        std = torch.cat([posteriors[index].std for index in picked])
        latents = (mean + std * torch.randn(mean.shape, generator=chance)) * pipe.vae.config.scaling_factor
        noise = torch.randn(mean.shape, generator=chance)
        timesteps = torch.randint(1000, (3,), generator=chance)
        torch.rand(3, generator=chance)  # caption dropout
        noisy = scheduler.add_noise(latents, noise, timesteps)
        prediction = unet(noisy, timesteps, prompt.expand(3, -1, -1), added_cond_kwargs=added).sample
        if scheduler.config.prediction_type == "v_prediction":
            noise = scheduler.get_velocity(latents, noise, timesteps)
        loss = F.mse_loss(prediction, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, get_peft_model_state_dict(unet)


@pytest.mark.parametrize(
    "case",
    [
        ("pocket", False),
        ("pocket", True),
        pytest.param(("sd1", False), marks=pytest.mark.soak),
        pytest.param(("sd2", False), marks=pytest.mark.soak),
        pytest.param(("sdxl", True), marks=pytest.mark.soak),
    ],
)
def test_the_loss_curve_is_pefts(
    case: tuple[str, bool],
    images: list[Path],
    folders: dict[str, Path],
    peft_run: Callable[[str], Run],
    tmp_path: Path,
) -> None:
    name, serving = case  # whether pictures are painted between the steps
    base = load_base(str(folders[name]), "cpu")
    bank = SlotBank(slots=2, max_rank=16)
    bank.wrap(base.unet, "unet")
    for slot in (1, 2):
        bank.load(slot, adapter_for(bank, rank=8, alpha=8, seed=slot, targets=EVERYTHING))
    denoiser = Denoiser(base.unet, base.scheduler_config)
    store = AdapterStore(tmp_path)
    store.create_version(
        name="otto", trigger="", base_model="", base_sha256="", training="t", new_version=False
    )
    pictures = tuple(TrainingImage(str(path), "") for path in images)
    job = TrainingJob(id="t", name="otto", version=1, recipe=RECIPE, images=pictures)
    trainer = Trainer(job, base=base, denoiser=denoiser, bank=bank, store=store)
    pieces = trainer.prepare()
    rows = bank.gather([[(1, 1.0)], [], [(1, 0.5), (2, -1.0)], [(2, 1.0)]])
    shape = (4, *base.latent_shape(64, 64))
    text = base.encode_prompt("a red house")
    embeds = Conditioning.stack([base.family.condition(text, Framing.whole(64, 64))] * 4)
    painted = []

    def paint() -> None:
        with torch.no_grad(), bank.use(rows):
            latents = torch.randn(shape, generator=torch.Generator().manual_seed(1))
            painted.append(denoiser.predict(latents, torch.full((4,), 500.0), embeds))

    for _ in pieces:
        if serving:
            paint()
    losses = []
    for step in range(STEPS):
        losses.append(trainer.train_step().loss)
        if serving:
            paint()
        if step == 5:
            trainer.publish()
    expected, weights = peft_run(name)
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-5
    for layer, module in trainer.adapter().low_rank.items():
        bare = layer.removeprefix("unet.")
        assert (module.A - weights[f"{bare}.lora_A.weight"]).abs().max() <= 1e-4
        assert (module.B - weights[f"{bare}.lora_B.weight"]).abs().max() <= 1e-4
    assert all(torch.equal(painted[0], other) for other in painted[1:])


def test_the_first_weights_are_pefts(tmp_path: Path) -> None:
    """Bit for bit what PEFT injects into this U-Net after `torch.manual_seed(seed)`."""
    base = load_base("pocket", "cpu")
    bank = SlotBank(slots=1, max_rank=8)
    bank.wrap(base.unet, "unet")
    job = TrainingJob(id="t", name="otto", version=1, recipe=RECIPE, images=())
    denoiser = Denoiser(base.unet, base.scheduler_config)
    trainer = Trainer(job, base=base, denoiser=denoiser, bank=bank, store=AdapterStore(tmp_path))
    for _ in trainer.prepare():
        pass
    unet = StableDiffusionPipeline.from_pretrained(pocket.path(), safety_checker=None).unet
    torch.manual_seed(RECIPE.seed)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian", target_modules=targets))
    weights = get_peft_model_state_dict(unet)
    modules = trainer.adapter().low_rank
    assert len(weights) == 2 * len(modules)
    for name, module in modules.items():
        bare = name.removeprefix("unet.")
        assert torch.equal(module.A, weights[f"{bare}.lora_A.weight"])
        assert torch.equal(module.B, weights[f"{bare}.lora_B.weight"])
