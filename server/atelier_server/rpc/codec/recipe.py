"""TrainingRecipe to Recipe: every default filled in, everything that is wrong with it noted; and back."""

from __future__ import annotations

import re
from typing import Any

from atelier.v1 import training_pb2 as pb
from atelier_server.config import Limits
from atelier_server.core import ROW_BUCKETS, BaseInfo, Priority, Recipe
from atelier_server.core.recipe import (
    LORA_INITS,
    LR_SCHEDULERS,
    METHODS,
    OPTIMIZERS,
    PIVOTAL_METHODS,
    PRECISIONS,
    TARGET_MODULES,
)
from atelier_server.rpc.codec.checks import Checks, shown
from atelier_server.rpc.codec.contradictions import check_contradictions
from atelier_server.rpc.codec.priority import PRIORITIES, check_priority

MAX_VALIDATION_PROMPTS = 16
MAX_TOKENS = 16
MAX_VECTORS = 32
MAX_ACCUMULATION = 128
MAX_CLASS_IMAGES = 1000
MAX_REPEATS = 1000
_INT32 = 2**31 - 1
_MAX_RATE = 1e30
_MAX_WEIGHT = 1e6
_PISSA = re.compile(r"pissa_niter_[1-9][0-9]?")
_NOT_THE_RECIPES = ("name", "new_version", "num_images")
# Fields of the first release: a request that has no other keeps the hash that it had there.
_FIRST = (
    *("instance_prompt", "resolution", "method", "max_train_steps", "learning_rate", "lr_scheduler"),
    *("lr_warmup_steps", "train_batch_size", "rank", "lora_alpha", "random_crop", "random_flip", "seed"),
    *("checkpointing_steps", "validation_prompts", "validation_steps", "adam_beta1", "adam_beta2"),
    *("adam_weight_decay", "adam_epsilon", "max_grad_norm", "gradient_checkpointing", "snr_gamma"),
    "caption_dropout",
)


def given(message: pb.TrainingRecipe) -> dict[str, Any]:
    """The fields of `Recipe` that the message sets, as they are in it."""
    values: dict[str, Any] = {}
    for field, value in message.ListFields():
        if field.name in _NOT_THE_RECIPES:
            continue
        values[field.name] = tuple(value) if field.is_repeated else value
    if "priority" in values:
        values["priority"] = PRIORITIES.get(values["priority"], Priority.NORMAL)
    return values


def decode_recipe(checks: Checks, message: pb.TrainingRecipe, limits: Limits, base: BaseInfo) -> Recipe:
    """Fills in every default, and notes every violation."""
    values = given(message)
    values.setdefault("instance_prompt", "")
    values.setdefault("resolution", min(base.native_width, base.native_height))
    values.setdefault("lora_alpha", float(max(values.get("rank", Recipe("", 0).rank), 1)))
    recipe = Recipe(**values)
    check_priority(checks, "recipe.priority", message.priority)
    _check_subject(checks, recipe, limits)
    _check_pictures(checks, recipe, limits)
    _check_adapter(checks, recipe, limits)
    _check_tokens(checks, recipe, values, limits)
    _check_optimizer(checks, recipe, values)
    _check_checkpoints(checks, recipe, limits)
    check_contradictions(checks, recipe, values, base)
    return recipe


def hashed(message: pb.TrainingRecipe, recipe: Recipe) -> dict[str, Any]:
    """What a repeat of the request has to have in common; only the first release's fields have defaults."""
    return {name: getattr(recipe, name) for name in _FIRST} | given(message)


def encode_recipe(recipe: Recipe) -> pb.TrainingRecipe:
    """With every default filled in: sent again, it means the same."""
    message = pb.TrainingRecipe()
    for field in message.DESCRIPTOR.fields:
        value = None if field.name in _NOT_THE_RECIPES else getattr(recipe, field.name)
        if field.is_repeated:
            getattr(message, field.name).extend(value or ())
        elif value is not None:
            setattr(message, field.name, value)
    return message


def _check_subject(checks: Checks, recipe: Recipe, limits: Limits) -> None:
    longest = limits.max_prompt_characters
    checks.text("recipe.instance_prompt", recipe.instance_prompt, longest, empty=False)
    checks.text("recipe.class_prompt", recipe.class_prompt, longest)
    checks.choice("recipe.method", recipe.method, METHODS)
    checks.choice("recipe.pivotal_method", recipe.pivotal_method, PIVOTAL_METHODS)
    checks.between("recipe.train_text_encoder_ti_frac", recipe.train_text_encoder_ti_frac)
    checks.number("recipe.prior_loss_weight", recipe.prior_loss_weight, 0.0, _MAX_WEIGHT)
    checks.integer("recipe.num_class_images", recipe.num_class_images, 1, MAX_CLASS_IMAGES)
    checks.number("recipe.output_preservation_weight", recipe.output_preservation_weight, 0.0, _MAX_WEIGHT)


def _check_pictures(checks: Checks, recipe: Recipe, limits: Limits) -> None:
    checks.size("recipe.resolution", recipe.resolution, min(limits.max_width, limits.max_height))
    checks.integer("recipe.train_batch_size", recipe.train_batch_size, 1, limits.max_train_batch_size)
    if recipe.batch_bucket:
        checks.choice("recipe.batch_bucket", recipe.batch_bucket, ROW_BUCKETS)
    checks.number("recipe.caption_dropout", recipe.caption_dropout, 0.0, 1.0)
    checks.integer("recipe.repeats", recipe.repeats, 1, MAX_REPEATS)
    checks.half_open("recipe.validation_split", recipe.validation_split)


def _check_adapter(checks: Checks, recipe: Recipe, limits: Limits) -> None:
    checks.integer("recipe.rank", recipe.rank, 1, limits.max_lora_rank)
    checks.number("recipe.lora_alpha", recipe.lora_alpha, 0.0, open_low=True)
    for i, target in enumerate(recipe.target_modules):
        checks.choice(f"recipe.target_modules[{i}]", target, TARGET_MODULES)
    checks.distinct("recipe.target_modules", recipe.target_modules)
    init = recipe.init_lora_weights
    if init not in LORA_INITS and not _PISSA.fullmatch(init):
        checks.refuse(
            "recipe.init_lora_weights", f"{shown(init)} is none of {', '.join(LORA_INITS)}, pissa_niter_N"
        )


def _check_tokens(checks: Checks, recipe: Recipe, values: dict[str, Any], limits: Limits) -> None:
    tokens = recipe.placeholder_tokens
    checks.count("recipe.placeholder_tokens", tokens, MAX_TOKENS, "tokens")
    for i, token in enumerate(tokens[:MAX_TOKENS]):
        checks.word(f"recipe.placeholder_tokens[{i}]", token)
    checks.distinct("recipe.placeholder_tokens", tokens)
    checks.integer("recipe.num_vectors", recipe.num_vectors, 1, MAX_VECTORS)
    checks.text("recipe.initializer_token", recipe.initializer_token, limits.max_prompt_characters)
    for field in ("token_lr", "text_encoder_lr"):
        if field in values:
            checks.number(f"recipe.{field}", values[field], 0.0, _MAX_RATE, open_low=True)


def _check_optimizer(checks: Checks, recipe: Recipe, values: dict[str, Any]) -> None:
    # The limit is what float32 holds: a rate that turns the loss to NaN stops the training at that step.
    checks.number("recipe.learning_rate", recipe.learning_rate, 0.0, _MAX_RATE, open_low=True)
    checks.choice("recipe.lr_scheduler", recipe.lr_scheduler, LR_SCHEDULERS)
    checks.integer("recipe.lr_warmup_steps", recipe.lr_warmup_steps, 0, max(recipe.max_train_steps, 0))
    checks.integer("recipe.lr_num_cycles", recipe.lr_num_cycles, 1, max(recipe.max_train_steps, 1))
    checks.number("recipe.lr_power", recipe.lr_power, 0.0, open_low=True)
    checks.choice("recipe.optimizer", recipe.optimizer, OPTIMIZERS)
    for field in ("adam_beta1", "adam_beta2", "ema_decay"):
        checks.half_open(f"recipe.{field}", getattr(recipe, field))
    checks.number("recipe.adam_weight_decay", recipe.adam_weight_decay, 0.0)
    checks.number("recipe.adam_epsilon", recipe.adam_epsilon, 0.0, open_low=True)
    checks.number("recipe.max_grad_norm", recipe.max_grad_norm, 0.0, open_low=True)
    steps = recipe.gradient_accumulation_steps
    checks.integer("recipe.gradient_accumulation_steps", steps, 1, MAX_ACCUMULATION)
    checks.number("recipe.noise_offset", recipe.noise_offset, 0.0, 1.0)
    if recipe.snr_gamma is not None:
        checks.number("recipe.snr_gamma", recipe.snr_gamma, 0.0, _MAX_WEIGHT, open_low=True)
    if "mixed_precision" in values and recipe.mixed_precision:
        checks.choice("recipe.mixed_precision", recipe.mixed_precision, PRECISIONS)


def _check_checkpoints(checks: Checks, recipe: Recipe, limits: Limits) -> None:
    checks.integer("recipe.max_train_steps", recipe.max_train_steps, 1, limits.max_train_steps)
    checks.integer("recipe.checkpointing_steps", recipe.checkpointing_steps, 1, _INT32)
    checks.integer("recipe.validation_steps", recipe.validation_steps, 1, limits.max_inference_steps)
    checks.count("recipe.validation_prompts", recipe.validation_prompts, MAX_VALIDATION_PROMPTS, "prompts")
    for i, prompt in enumerate(recipe.validation_prompts[:MAX_VALIDATION_PROMPTS]):
        checks.text(f"recipe.validation_prompts[{i}]", prompt, limits.max_prompt_characters)
    checks.integer("recipe.keep_last", recipe.keep_last, 0, _INT32)
    checks.integer("recipe.keep_every", recipe.keep_every, 0, _INT32)
