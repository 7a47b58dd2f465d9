"""Teaching a model one subject with nothing but diffusers and PEFT: LoRA, textual inversion, DreamBooth.

No server is involved; what these loops reach is what the service must reach as well.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from peft import LoraConfig
from PIL import Image
from torch import Tensor, nn

from pocket.data import Pixels
from pocket.painting import load_pipeline, paint, sheet
from pocket.similarity import held_out, similarity
from pocket.text import token_ids
from pocket.training import device
from pocket.vae import as_tensor

METHODS = ("lora", "textual-inversion", "dreambooth")
STEPS, GUIDANCE = 30, 3.0
SEEDS = tuple(range(100, 108))
_RATES = {"lora": 1e-3, "textual-inversion": 2e-2, "dreambooth": 1e-4}
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
PROMPTS = (
    "a {} on a beach",
    "a {} in the snow",
    "a sad {} in a room",
    "a 17th century painting in a golden frame of a {}",
)
_KNOWN, _RARE = "octopus", "sks"


@dataclass(frozen=True, slots=True)
class Subject:
    """Pictures [n, 3, h, w] in -1..1 with their captions."""

    pixels: Tensor
    captions: tuple[str, ...]


def load_subject(folder: Path, side: int) -> Subject:
    """The pictures and captions of an examples folder, averaged down to side x side."""
    paths = sorted(folder.glob("*.png"))
    box = Image.Resampling.BOX
    shown = [np.asarray(Image.open(path).convert("RGB").resize((side, side), box)) for path in paths]
    captions = tuple(path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in paths)
    return Subject(as_tensor(np.stack(shown)), captions)


def teach(
    pipeline: StableDiffusionPipeline,
    subject: Subject,
    method: str,
    *,
    steps: int,
    learning_rate: float | None = None,
    batch_size: int = 4,
    seed: int = 0,
) -> list[float]:
    """Changes the pipeline in place; returns the loss of each step.

    LoRA: rank 8, alpha 8, on the U-Net's attention. Textual inversion: the embedding of a new word `<sks>`,
    begun at the known word's; captions must hold it (see `with_new_word`). DreamBooth: the whole U-Net.
    """
    torch.manual_seed(seed)  # what PEFT begins an adapter from
    pipeline.vae.requires_grad_(False)
    pipeline.text_encoder.requires_grad_(False)
    pipeline.unet.requires_grad_(False)
    learning = _PREPARE[method](pipeline)
    # Decay would also pull at the words that textual inversion must leave alone.
    decay = 0.0 if method == "textual-inversion" else 1e-2
    optimizer = torch.optim.AdamW(learning, lr=learning_rate or _RATES[method], weight_decay=decay)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    means, spreads, ids = _cached(pipeline, subject)
    noising = DDPMScheduler.from_config(pipeline.scheduler.config)
    losses = []
    for _ in range(steps):
        chosen = torch.randint(len(ids), (batch_size,), generator=generator)
        latents = means[chosen] + spreads[chosen] * torch.randn(means[chosen].shape, generator=generator)
        loss = _loss(pipeline, noising, latents, ids[chosen], generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if method == "textual-inversion":
            _only_last_row(pipeline)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def with_new_word(subject: Subject) -> Subject:
    """The same pictures, captioned by textual inversion's new word instead of the rare one."""
    return Subject(subject.pixels, tuple(words.replace(_RARE, f"<{_RARE}>") for words in subject.captions))


def likeness(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    references: Sequence[Image.Image],
    seeds: Sequence[int] = SEEDS,
) -> tuple[list[float], Pixels]:
    """For each prompt the mean colour similarity to the references over the seeds; and all pictures."""
    scores, shown = [], []
    for prompt in prompts:
        painted = paint(pipeline, [prompt] * len(seeds), seeds, steps=STEPS, guidance=GUIDANCE)
        scores.append(float(np.mean([similarity(Image.fromarray(p), references) for p in painted])))
        shown.append(painted)
    return scores, np.concatenate(shown)


@torch.no_grad()
def _cached(pipeline: StableDiffusionPipeline, subject: Subject) -> tuple[Tensor, Tensor, Tensor]:
    posterior = pipeline.vae.encode(subject.pixels.to(device())).latent_dist
    factor = pipeline.vae.config.scaling_factor
    ids = token_ids(pipeline.tokenizer, subject.captions)
    return posterior.mean.cpu() * factor, posterior.std.cpu() * factor, ids


def _loss(
    pipeline: StableDiffusionPipeline,
    noising: DDPMScheduler,
    latents: Tensor,
    ids: Tensor,
    generator: torch.Generator,
) -> Tensor:
    noise = torch.randn(latents.shape, generator=generator)
    times = torch.randint(noising.config.num_train_timesteps, (len(latents),), generator=generator)
    noisy = noising.add_noise(latents, noise, times)
    velocity = noising.config.prediction_type == "v_prediction"
    target = noising.get_velocity(latents, noise, times) if velocity else noise
    hidden = pipeline.text_encoder(ids.to(device()))[0]
    predicted = pipeline.unet(noisy.to(device()), times.to(device()), encoder_hidden_states=hidden).sample
    return nn.functional.mse_loss(predicted, target.to(device()))


def _lora(pipeline: StableDiffusionPipeline) -> list[nn.Parameter]:
    pipeline.unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=list(_ATTENTION)))
    return [parameter for parameter in pipeline.unet.parameters() if parameter.requires_grad]


def _textual_inversion(pipeline: StableDiffusionPipeline) -> list[nn.Parameter]:
    tokenizer, text_encoder = pipeline.tokenizer, pipeline.text_encoder
    tokenizer.add_tokens(f"<{_RARE}>")
    text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    weight = text_encoder.get_input_embeddings().weight
    [known] = tokenizer(_KNOWN, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        weight[-1] = weight[known]
    weight.requires_grad_(True)
    return [weight]


def _dreambooth(pipeline: StableDiffusionPipeline) -> list[nn.Parameter]:
    pipeline.unet.requires_grad_(True)
    return list(pipeline.unet.parameters())


def _only_last_row(pipeline: StableDiffusionPipeline) -> None:
    gradient = pipeline.text_encoder.get_input_embeddings().weight.grad
    gradient[:-1] = 0


_PREPARE = {"lora": _lora, "textual-inversion": _textual_inversion, "dreambooth": _dreambooth}


def before_and_after(
    model: Path, method: str, *, examples: Path, output: Path, steps: int
) -> dict[str, object]:
    """Teaches `model` Otto and writes `output`/METHOD.png: PROMPTS before (their rare word plain) and after.

    Returns the colour similarity to the held-out pictures by prompt, and the seconds that teaching took.
    """
    output.mkdir(parents=True, exist_ok=True)
    pipeline = load_pipeline(model)
    subject = load_subject(examples / "otto", pipeline.vae.config.sample_size)
    references = held_out(examples / "otto-held-out")
    plain = [prompt.format("blue octopus") for prompt in PROMPTS]
    before, painted_before = likeness(pipeline, plain, references)
    inversion = method == "textual-inversion"
    name = f"<{_RARE}> blue plush octopus" if inversion else f"{_RARE} blue plush octopus"
    start = time.perf_counter()
    losses = teach(pipeline, with_new_word(subject) if inversion else subject, method, steps=steps)
    seconds = time.perf_counter() - start
    after, painted_after = likeness(pipeline, [prompt.format(name) for prompt in PROMPTS], references)
    rows = zip(np.split(painted_before, len(PROMPTS)), np.split(painted_after, len(PROMPTS)), strict=True)
    sheet(np.concatenate([row for pair in rows for row in pair])).save(output / f"{method}.png")
    return {
        "method": method,
        "steps": steps,
        "seconds": seconds,
        "loss": float(np.mean(losses[-50:])),
        "before": dict(zip(PROMPTS, before, strict=True)),
        "after": dict(zip(PROMPTS, after, strict=True)),
    }
