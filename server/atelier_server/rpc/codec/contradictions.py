"""Knobs of a recipe that contradict each other, its base, its device or its server.

A field at its default contradicts nothing: a recipe with every field written out means what a short one does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from atelier_server.core import METHODS, ROW_BUCKETS, BaseInfo, Recipe
from atelier_server.core.recipe import OPTIMIZERS, PRECISIONS
from atelier_server.rpc.codec.checks import Checks, shown

_DEFAULTS = Recipe("", 0)
# Initialisations for convolutions as for linear layers.
_ANY_LAYER = ("gaussian", "default")
_POLYNOMIAL_END = 1e-7  # diffusers' lr_end
# What says how low-rank matrices are made; where none are, it says nothing.
_LORA_ONLY = ("use_dora", "use_rslora", "init_lora_weights", "target_modules")


def check_contradictions(checks: Checks, recipe: Recipe, values: Mapping[str, Any], base: BaseInfo) -> None:
    """`values` are the fields that the request itself set."""
    _check_method(checks, recipe, base)
    _check_class(checks, recipe)
    _check_text(checks, recipe, values)
    _check_tokens(checks, recipe)
    _check_vocabulary(checks, recipe, base.training.vocabulary)
    _check_rows(checks, recipe)
    _check_weights(checks, recipe)
    _check_schedule(checks, recipe)


def _check_method(checks: Checks, recipe: Recipe, base: BaseInfo) -> None:
    can = base.training
    if base.inpainting:
        checks.refuse("recipe.method", "this base is an inpainting model: it paints, and is not taught here")
    elif recipe.method in METHODS and recipe.method not in can.methods:
        known = ", ".join(can.methods) or "nothing"
        checks.refuse(
            "recipe.method",
            f"{shown(recipe.method)} is not on this server; with its base it learns by {known}",
        )
    elif (
        recipe.method == "pivotal"
        and recipe.pivotal_method == "dreambooth"
        and "dreambooth" not in can.methods
    ):
        checks.refuse("recipe.pivotal_method", "'dreambooth' is not on this server")
    if recipe.optimizer in OPTIMIZERS and recipe.optimizer not in can.optimizers:
        needs = ": it needs a CUDA GPU and bitsandbytes" if recipe.optimizer == "adamw8bit" else ""
        known = ", ".join(can.optimizers)
        checks.refuse(
            "recipe.optimizer", f"{shown(recipe.optimizer)} is not on this server{needs}; there is {known}"
        )
    if recipe.mixed_precision in PRECISIONS and recipe.mixed_precision not in can.precisions:
        checks.refuse(
            "recipe.mixed_precision",
            f"{shown(recipe.mixed_precision)} is none that {base.dtype} weights have on {base.device}: "
            f"there is {', '.join(can.precisions)}",
        )
    for field in can.unheeded:
        # Where the text side learns, captions are not cached: nobody asked for that.
        follows = field == "cache_text_embeddings" and recipe.learns_text
        refused = any(v.field == f"recipe.{field}" for v in checks.violations)
        if not (follows or refused) and getattr(recipe, field) != getattr(_DEFAULTS, field):
            checks.refuse(f"recipe.{field}", "is not on this server yet; leave it out")
    if _without_lora(recipe):
        for field in _LORA_ONLY:
            if getattr(recipe, field) != getattr(_DEFAULTS, field):
                told = _told(getattr(recipe, field))
                checks.refuse(f"recipe.{field}", f"{told} is for LoRA; {_learner(recipe)} learns no LoRA")


def _check_class(checks: Checks, recipe: Recipe) -> None:
    if recipe.class_prompt.strip():
        return
    if recipe.with_prior_preservation:
        checks.refuse(
            "recipe.with_prior_preservation", "true needs class_prompt: what the class pictures show"
        )
    if recipe.output_preservation_weight > 0:
        checks.refuse(
            "recipe.output_preservation_weight",
            f"{recipe.output_preservation_weight:g} needs class_prompt: what stands in for instance_prompt",
        )


def _check_text(checks: Checks, recipe: Recipe, values: Mapping[str, Any]) -> None:
    if recipe.train_text_encoder and recipe.method == "textual_inversion":
        checks.refuse(
            "recipe.train_text_encoder",
            "true, but textual_inversion learns vectors of tokens and nothing else; use pivotal or lora",
        )
    if recipe.train_text_encoder and recipe.method == "pivotal" and recipe.pivotal_method == "dreambooth":
        checks.refuse(
            "recipe.train_text_encoder",
            "true, but pivotal with dreambooth learns the U-Net and the new tokens; use pivotal_method lora",
        )
    if values.get("cache_text_embeddings") and recipe.learns_text:
        why = f"method {shown(recipe.method)}" if recipe.learns_tokens else "train_text_encoder"
        checks.refuse(
            "recipe.cache_text_embeddings",
            f"true, but with {why} a caption's embedding changes from step to step; leave it out",
        )


def _check_tokens(checks: Checks, recipe: Recipe) -> None:
    tokens = recipe.placeholder_tokens
    if recipe.learns_tokens and not tokens:
        checks.refuse(
            "recipe.placeholder_tokens", f"{recipe.method} learns tokens: name at least one, e.g. <otto>"
        )
    if recipe.learns_tokens:
        return
    if tokens and recipe.method in METHODS:
        checks.refuse(
            "recipe.placeholder_tokens",
            f"{recipe.method} learns no tokens; use method textual_inversion or pivotal, or leave them out",
        )
    for field in ("num_vectors", "initializer_token"):
        value = getattr(recipe, field)
        if value != getattr(_DEFAULTS, field) and not tokens:
            checks.refuse(
                f"recipe.{field}", f"{_told(value)} is about placeholder_tokens, and there are none"
            )


def _check_vocabulary(checks: Checks, recipe: Recipe, vocabulary: frozenset[str]) -> None:
    if not vocabulary or not recipe.learns_tokens:
        return
    for i, token in enumerate(recipe.placeholder_tokens):
        if token.lower() in vocabulary:
            checks.refuse(
                f"recipe.placeholder_tokens[{i}]",
                f"{shown(token)} is a word that the base has already; choose another, e.g. <my-{token}>",
            )
    initializer = recipe.initializer_token.strip().lower()
    if initializer and initializer not in vocabulary:
        checks.refuse(
            "recipe.initializer_token",
            f"{shown(recipe.initializer_token)} is not a single word (token) of the base's vocabulary",
        )


def _check_rows(checks: Checks, recipe: Recipe) -> None:
    if recipe.batch_bucket in ROW_BUCKETS and recipe.batch_bucket < recipe.rows:
        besides = recipe.rows // recipe.train_batch_size - 1 if recipe.train_batch_size > 0 else 0
        checks.refuse(
            "recipe.batch_bucket",
            f"{recipe.batch_bucket} rows do not hold train_batch_size = {recipe.train_batch_size} pictures"
            + (f" and {besides * recipe.train_batch_size} rows of the class" if besides else ""),
        )
    if recipe.checkpointing_steps > 0 and recipe.keep_every % recipe.checkpointing_steps:
        checks.refuse(
            "recipe.keep_every",
            f"{recipe.keep_every} is not a multiple of checkpointing_steps = {recipe.checkpointing_steps}",
        )


def _check_weights(checks: Checks, recipe: Recipe) -> None:
    """What PEFT's initialisations want."""
    init = recipe.init_lora_weights
    if init not in _ANY_LAYER and "convolutions" in recipe.target_modules:
        checks.refuse(
            "recipe.init_lora_weights",
            f"{shown(init)} is for linear layers; leave convolutions out of target_modules, or use gaussian",
        )
    if init == "orthogonal" and recipe.rank % 2:
        checks.refuse("recipe.init_lora_weights", f"'orthogonal' needs an even rank, not {recipe.rank}")


def _check_schedule(checks: Checks, recipe: Recipe) -> None:
    """diffusers' polynomial goes down to a rate of its own, over the steps after the warm-up."""
    if recipe.lr_scheduler != "polynomial":
        return
    if recipe.lr_warmup_steps == recipe.max_train_steps:
        checks.refuse(
            "recipe.lr_warmup_steps",
            f"{recipe.lr_warmup_steps} are all of max_train_steps; polynomial needs some after them",
        )
    for field in ("learning_rate", "text_encoder_lr", "token_lr"):
        rate = getattr(recipe, field)
        if 0 < rate <= _POLYNOMIAL_END:
            checks.refuse(
                f"recipe.{field}", f"{rate:g} is not above {_POLYNOMIAL_END:g}, where polynomial ends"
            )


def _without_lora(recipe: Recipe) -> bool:
    return _learner(recipe) in ("dreambooth", "textual_inversion")


def _learner(recipe: Recipe) -> str:
    return recipe.pivotal_method if recipe.method == "pivotal" else recipe.method


def _told(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(value)
    return shown(value) if isinstance(value, str) else str(value)
