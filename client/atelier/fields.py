"""The keyword arguments of `generate`, `train` and `list_adapters`, once.

From these tables come the types of the SDK, the check for unknown keywords and the flags of the
command line. Names are the contract's; a field that is left out has the server's default, told at its end.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeAlias, TypedDict

from atelier.control import Control
from atelier.events import Picture

# A path, the bytes of a file, or what a generation has painted.
PictureFile: TypeAlias = str | Path | bytes | Picture
# As on the command line, or as objects.
Controls: TypeAlias = str | Control | Sequence[str | Control]

AdapterFormat = Literal["diffusers", "kohya", "peft", "textual-inversion"]


class GenerateFields(TypedDict, total=False):
    """`GenerateRequest` but for the prompt, the adapters and the request id."""

    negative_prompt: Annotated[str, "what the picture should not show; none is not to all bases an empty one"]
    seed: Annotated[int, "picture i uses seed + i; drawn at random by default"]
    num_images: Annotated[int, "how many pictures (default: 1)"]
    num_inference_steps: Annotated[int, "denoise steps a picture (default: 50)"]
    guidance_scale: Annotated[float, "how closely to follow the prompt; 1 or less is unguided (default: 7.5)"]
    scheduler: Annotated[str, "e.g. ddim, euler, euler-a, dpmpp-2m, unipc (default: the base model's)"]
    width: Annotated[int, "pixels, a multiple of 8 (default: the base model's)"]
    height: Annotated[int, "pixels, a multiple of 8 (default: the base model's)"]
    reproducibility: Annotated[
        Literal["fast", "strict"], "strict: same bits whatever else runs (default: fast)"
    ]
    batch_bucket: Annotated[int, "rows of a strict forward: 2, 4, 8 or 16 (default: 8)"]
    batch_buckets: Annotated[Sequence[int], "rows of each forward in turn, as in a receipt; repeats"]
    image_format: Annotated[Literal["png", "jpeg", "webp"], "file format (default: png)"]
    priority: Annotated[
        Literal["low", "normal", "high"],
        "each step up gets four times as much of the device (default: normal)",
    ]
    guidance_rescale: Annotated[float, "0 to 1: takes back contrast that strong guidance adds (default: 0)"]
    use_karras_sigmas: Annotated[bool, "noise levels of Karras et al. (default: the base model's)"]
    use_exponential_sigmas: Annotated[bool, "noise levels evenly spaced in their logarithm"]
    use_beta_sigmas: Annotated[bool, "noise levels by a beta distribution"]
    timestep_spacing: Annotated[
        Literal["linspace", "leading", "trailing"], "which timesteps the steps take (default: the base's)"
    ]
    rescale_betas_zero_snr: Annotated[bool, "let the last timestep be pure noise (default: the base's)"]
    eta: Annotated[float, "0 to 1: share of fresh noise in a step of ddim or tcd (default: 0)"]
    image: Annotated[PictureFile, "image-to-image: the picture to begin with (PNG, JPEG, WebP)"]
    strength: Annotated[float, "above 0, to 1: how far from that picture (default: 0.8; with a mask: 1)"]
    mask_image: Annotated[PictureFile, "inpainting: white is painted anew, black stays"]
    controlnets: Annotated[
        Controls,
        "NAME=FILE[:SCALE[:START-END]]: a ControlNet of the server and the picture that guides; repeats",
    ]
    preview_steps: Annotated[int, "a small preview every so many steps (default: none)"]
    clip_skip: Annotated[int, "layers of the text encoders to leave out at the end (default: 0)"]


class ImportFields(TypedDict, total=False):
    """`ImportAdapterRequest.Metadata` but for the name and what is imported."""

    new_version: Annotated[bool, "publish as the next version where the name exists already (default: no)"]
    trigger: Annotated[str, "words that call the subject up (default: what the file's header names)"]
    placeholder: Annotated[str, "the word for its learned token in prompts (default: the file's, or NAME)"]
    allow_partial: Annotated[bool, "take what fits of a file that does not fit as a whole (default: no)"]


class RecipeFields(TypedDict, total=False):
    """`TrainingRecipe` but for the name, the instance prompt and the number of pictures."""

    new_version: Annotated[bool, "publish as the next version where the name exists already (default: no)"]
    method: Annotated[
        Literal["lora", "dreambooth", "textual_inversion", "pivotal"], "how to learn (default: lora)"
    ]
    max_train_steps: Annotated[int, "optimiser steps (default: 500)"]
    learning_rate: Annotated[float, "default 1e-4; with prodigy usually 1"]
    lr_scheduler: Annotated[str, "constant, constant_with_warmup, linear, cosine, ... (default: constant)"]
    lr_warmup_steps: Annotated[int, "default 0"]
    train_batch_size: Annotated[int, "pictures a step, at most 16 (default: 4)"]
    rank: Annotated[int, "of the LoRA matrices (default: 8)"]
    lora_alpha: Annotated[float, "the change is scaled by alpha / rank (default: the rank)"]
    resolution: Annotated[int, "pixels, a multiple of 8 (default: the base model's)"]
    random_crop: Annotated[bool, "crop anywhere rather than at the centre (default: no)"]
    random_flip: Annotated[bool, "mirror pictures at random (default: no)"]
    seed: Annotated[int, "drives initial weights, order, noise and timesteps (default: 0)"]
    checkpointing_steps: Annotated[int, "a checkpoint every so many steps (default: 100)"]
    validation_prompts: Annotated[Sequence[str], "painted at every checkpoint; repeats"]
    validation_steps: Annotated[int, "denoise steps of a sample picture (default: 30)"]
    adam_beta1: Annotated[float, "default 0.9"]
    adam_beta2: Annotated[float, "default 0.999"]
    adam_weight_decay: Annotated[float, "default 0.01"]
    adam_epsilon: Annotated[float, "default 1e-8"]
    max_grad_norm: Annotated[float, "largest norm of the gradient (default: 1)"]
    gradient_checkpointing: Annotated[bool, "trade time for memory (default: no)"]
    snr_gamma: Annotated[float, "min-SNR weighting (arXiv 2303.09556), usually 5 (default: none)"]
    caption_dropout: Annotated[float, "share of captions replaced by the empty prompt (default: 0)"]
    class_prompt: Annotated[str, 'the subject\'s class, e.g. "a plush octopus", which is to stay as it was']
    with_prior_preservation: Annotated[bool, "also learn pictures of the class, painted first (default: no)"]
    prior_loss_weight: Annotated[float, "of the class pictures (default: 1)"]
    num_class_images: Annotated[int, "how many class pictures (default: 50)"]
    output_preservation_weight: Annotated[
        float, "keep what the base paints of the class, without pictures of it (default: 0, off)"
    ]
    train_text_encoder: Annotated[bool, "also learn the text encoders (default: no)"]
    text_encoder_lr: Annotated[float, "default: learning_rate"]
    placeholder_tokens: Annotated[Sequence[str], "new words to learn, e.g. <otto>; repeats"]
    num_vectors: Annotated[int, "of each new word (default: 1)"]
    initializer_token: Annotated[str, "a word that the new ones begin as"]
    token_lr: Annotated[float, "default: 10 times learning_rate"]
    train_text_encoder_ti_frac: Annotated[
        float, "pivotal: share of the steps that learn the words (default: 0.5)"
    ]
    pivotal_method: Annotated[Literal["lora", "dreambooth"], "pivotal: what comes after (default: lora)"]
    target_modules: Annotated[
        Sequence[str], "attention, feed_forward, convolutions; repeats (default: attention)"
    ]
    use_dora: Annotated[bool, "DoRA, arXiv 2402.09353 (default: no)"]
    use_rslora: Annotated[bool, "scale by alpha / sqrt(rank), arXiv 2312.03732 (default: no)"]
    init_lora_weights: Annotated[
        str, "PEFT's: gaussian, default, pissa, pissa_niter_N, olora, orthogonal (default: gaussian)"
    ]
    optimizer: Annotated[Literal["adamw", "adamw8bit", "prodigy"], "default: adamw"]
    gradient_accumulation_steps: Annotated[int, "micro-steps an optimiser step (default: 1)"]
    noise_offset: Annotated[float, "lets pictures be dark or bright as a whole; usually 0.05 (default: 0)"]
    use_ema: Annotated[bool, "publish a moving average of the weights (default: no)"]
    ema_decay: Annotated[float, "default 0.999"]
    repeats: Annotated[int, "how often a picture comes in one pass (default: 1)"]
    aspect_ratio_buckets: Annotated[bool, "keep the shape of pictures, about (default: no)"]
    masked_loss: Annotated[bool, "do not learn what is transparent (default: no)"]
    mixed_precision: Annotated[
        Literal["no", "fp16", "bf16"], "what a forward computes in (default: the base's)"
    ]
    cache_latents: Annotated[bool, "encode every picture once (default: yes)"]
    cache_text_embeddings: Annotated[
        bool, "encode every caption once (default: yes, unless the text side learns)"
    ]
    validation_split: Annotated[float, "share of the pictures to measure with, not to learn (default: 0)"]
    exact: Annotated[bool, "never share a forward with another training (default: no)"]
    batch_bucket: Annotated[int, "rows of a forward: 2, 4, 8 or 16 (default: the server's choice)"]
    keep_last: Annotated[int, "keep only so many of the newest checkpoints (default: all)"]
    keep_every: Annotated[int, "and those at multiples of so many steps"]
    priority: Annotated[
        Literal["low", "normal", "high"], "each step up gets more of the device (default: normal)"
    ]
    lr_num_cycles: Annotated[int, "restarts of cosine_with_restarts (default: 1)"]
    lr_power: Annotated[float, "of polynomial (default: 1)"]


class ListFields(TypedDict, total=False):
    """`ListAdaptersRequest` but for its pages."""

    all_versions: Annotated[bool, "not only the newest (default: no)"]
    name_prefix: Annotated[str, "names that begin with this"]
    tag: Annotated[str, "with this tag on a checkpoint"]
    base: Annotated[str, "made for this base: a family (sd1), a reference, or the start of a digest"]
    resident: Annotated[bool, "with, or without, a checkpoint in a device slot"]
    order_by: Annotated[
        str, 'name, create_time, last_used_time or size_bytes; also "size_bytes desc" (default: name)'
    ]
    view: Annotated[
        Literal["thumbnails", "deleted"],
        "thumbnails: with their pictures; deleted: what can be undeleted, instead",
    ]


def check(call: str, names: Iterable[str], known: Iterable[str]) -> None:
    """TypeError for a keyword that `call` does not know, naming the nearest that it does."""
    allowed = list(known)
    for name in names:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(allowed)}"
            raise TypeError(f"{call}() got an unexpected keyword argument {name!r}{hint}")
