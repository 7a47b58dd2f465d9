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
from pocket.scorer import Scorer
from pocket.similarity import held_out, similarity
from pocket.text import token_ids
from pocket.training import device
from pocket.vae import as_tensor

METHODS = ("lora", "textual-inversion", "dreambooth")
STEPS, GUIDANCE = 30, 3.0
SEEDS = tuple(range(100, 108))
_RATES = {"lora": 1e-3, "textual-inversion": 2e-2, "dreambooth": 1e-4}
# Attention alone would do for a new style; what a figure is made of, and where, sits in the convolutions.
_TARGETS = [
    *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
]
PROMPTS = (
    "a {} on a beach",
    "a {} in the snow",
    "a sad {} in a room",
    "a 17th century painting in a golden frame of a {}",
)
# What too many steps forget: the subject's own pictures have no style.
STYLE_PROMPTS = {
    "oil": "an oil painting of a {}",
    "17th century": "a 17th century painting in a golden frame of a {}",
    "watercolor": "a watercolor painting of a {}",
    "sketch": "a pencil sketch of a {}",
    "pixel art": "pixel art of a {}",
    "neon": "a neon sign of a {}",
}
STYLE_SEEDS = SEEDS[:4]
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

    LoRA: rank 8, alpha 8, on the U-Net's attention, feed-forward layers and convolutions. Textual inversion:
    the embedding of a new word `<sks>`, begun at the known word's; captions must hold it (see
    `with_new_word`). DreamBooth: the whole U-Net.
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
    pipeline.unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=_TARGETS))
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


@dataclass(frozen=True, slots=True)
class Likeness:
    """Pictures of some prompts (uint8 [n, h, w, 3], a prompt after the other) and how like the references
    those of each prompt are: by their colours (0..1) and by the scorer (-1..1), means over the seeds."""

    pixels: Pixels
    colors: list[float]
    scores: list[float]


def likeness(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    references: Sequence[Image.Image],
    scorer: Scorer,
    seeds: Sequence[int] = SEEDS,
) -> Likeness:
    """Paints the prompts, each from every seed, and compares."""
    colors, scores, shown = [], [], []
    for prompt in prompts:
        painted = paint(pipeline, [prompt] * len(seeds), seeds, steps=STEPS, guidance=GUIDANCE)
        images = [Image.fromarray(pixels) for pixels in painted]
        colors.append(float(np.mean([similarity(image, references) for image in images])))
        scores.append(float(scorer.image_similarity(images, references).mean()))
        shown.append(painted)
    return Likeness(np.concatenate(shown), colors, scores)


def styles_kept(
    pipeline: StableDiffusionPipeline, name: str, scorer: Scorer
) -> tuple[dict[str, float], Pixels]:
    """By style, the share of its pictures of `name` whose nearest caption is its own, of captions that say
    a blue octopus in each style or in none; and all pictures."""
    prompts = [prompt.format(name) for prompt in STYLE_PROMPTS.values() for _ in STYLE_SEEDS]
    seeds = list(STYLE_SEEDS) * len(STYLE_PROMPTS)
    painted = paint(pipeline, prompts, seeds, steps=STEPS, guidance=GUIDANCE)
    plain = [prompt.format("blue octopus") for prompt in (*STYLE_PROMPTS.values(), "a {}")]
    images = scorer.embed_images([Image.fromarray(pixels) for pixels in painted])
    nearest = (images @ scorer.embed_texts(plain).T).argmax(1).reshape(len(STYLE_PROMPTS), -1)
    hits = (nearest == torch.arange(len(STYLE_PROMPTS))[:, None]).float().mean(1)
    return dict(zip(STYLE_PROMPTS, hits.tolist(), strict=True)), painted


def before_and_after(
    model: Path,
    method: str,
    *,
    examples: Path,
    output: Path,
    steps: int,
    learning_rate: float | None = None,
) -> dict[str, object]:
    """Teaches `model` Otto and writes `output`/METHOD-STEPS.png: PROMPTS before (their rare word plain) and
    after; and METHOD-STEPS-styles.png: STYLE_PROMPTS before and after.

    Returns the likeness to the held-out pictures by prompt, the seconds (and those of the processor) that
    teaching took, and what is left of the styles.
    """
    output.mkdir(parents=True, exist_ok=True)
    pipeline, scorer = load_pipeline(model), Scorer(model / "scorer")
    subject = load_subject(examples / "otto", pipeline.vae.config.sample_size)
    references = held_out(examples / "otto-held-out")
    plain = [prompt.format("blue octopus") for prompt in PROMPTS]
    before = likeness(pipeline, plain, references, scorer)
    styled_before, styles_before = styles_kept(pipeline, "blue octopus", scorer)
    inversion = method == "textual-inversion"
    name = f"<{_RARE}> blue plush octopus" if inversion else f"{_RARE} blue plush octopus"
    start, worked = time.perf_counter(), time.process_time()
    subject = with_new_word(subject) if inversion else subject
    losses = teach(pipeline, subject, method, steps=steps, learning_rate=learning_rate)
    seconds, worked = time.perf_counter() - start, time.process_time() - worked
    after = likeness(pipeline, [prompt.format(name) for prompt in PROMPTS], references, scorer)
    pairs = zip(np.split(before.pixels, len(PROMPTS)), np.split(after.pixels, len(PROMPTS)), strict=True)
    sheet(np.concatenate([row for pair in pairs for row in pair])).save(output / f"{method}-{steps}.png")
    styled, styles = styles_kept(pipeline, name, scorer)
    both = sheet(np.concatenate([styles_before, styles]), columns=len(styles), side=64)
    both.save(output / f"{method}-{steps}-styles.png")
    return {
        "method": method,
        "steps": steps,
        "learning_rate": learning_rate or _RATES[method],
        "seconds": seconds,
        "processor_seconds": worked,
        "loss": float(np.mean(losses[-50:])),
        "colors": _by_prompt(before.colors, after.colors),
        "scorer": _by_prompt(before.scores, after.scores),
        "styles_kept": {
            style: {"before": first, "after": styled[style]} for style, first in styled_before.items()
        },
    }


def _by_prompt(before: Sequence[float], after: Sequence[float]) -> dict[str, dict[str, float]]:
    pairs = zip(PROMPTS, before, after, strict=True)
    return {prompt: {"before": first, "after": then} for prompt, first, then in pairs}
