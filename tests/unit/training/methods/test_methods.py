"""Every method: killed, it goes on to the same bits, alone and in company; what it publishes; refusals."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from atelier_server.adapters.bank import SlotBank
from atelier_server.adapters.canonical import CanonicalAdapter, tensors_of
from atelier_server.adapters.stored import decode_stored
from atelier_server.diffusion.base import load_base
from atelier_server.errors import DataLoss, InvalidRequest
from atelier_server.training.company import StepReport, micro_step
from atelier_server.training.trainer import Trainer
from tests.bases import save_base
from tests.unit.training.conftest import Studio, furnished

WORDS: dict[str, Any] = {"placeholder_tokens": ("<otto>",), "instance_prompt": "a <otto> octopus"}
PIVOTAL: dict[str, Any] = {**WORDS, "method": "pivotal", "max_train_steps": 6, "lr_scheduler": "cosine"}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"caption_dropout": 0.3, "lr_scheduler": "polynomial", "random_flip": True},
    "accumulating": {"gradient_accumulation_steps": 3, "train_batch_size": 1},
    "text": {"train_text_encoder": True, "text_encoder_lr": 5e-4, "caption_dropout": 0.3},
    "dora": {"use_dora": True, "target_modules": ("attention", "feed_forward", "convolutions")},
    "pissa": {"init_lora_weights": "pissa_niter_2", "use_rslora": True},
    "tokens": {**WORDS, "method": "textual_inversion", "num_vectors": 2, "initializer_token": "octopus"},
    "pivotal": {**PIVOTAL, "use_dora": True},
    "pivotal with text": {**PIVOTAL, "train_text_encoder": True, "init_lora_weights": "olora"},
}
# Everything else that moves.
KNOBS: dict[str, Any] = {
    "optimizer": "prodigy",
    "use_ema": True,
    "noise_offset": 0.1,
    "random_flip": True,
    "cache_latents": False,
    "random_crop": True,
    "validation_split": 0.3,
    "snr_gamma": 5.0,
    "gradient_accumulation_steps": 2,
}
STEPS = 6


def take(trainer: Trainer, steps: int) -> list[StepReport]:
    return [trainer.train_step() for _ in range(steps)]


def bits(adapter: CanonicalAdapter) -> dict[str, bytes]:
    tensors = {f"{n}.{p}": t for n, module in adapter.modules.items() for p, t in tensors_of(module)}
    tensors |= {f"{w}.{e}": t for w, by in adapter.tokens.items() for e, t in by.items()}
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("method", [*METHODS, "knobs"])
def test_a_training_that_is_killed_goes_on_to_the_same_bits(studio: Studio, method: str) -> None:
    """At a random step of each phase; what it did after its last checkpoint is lost."""
    own = KNOBS if method == "knobs" else METHODS[method]
    recipe = {"max_train_steps": STEPS, **own, "batch_bucket": 4}
    straight = studio.trainer(**recipe, version=1)
    reports = take(straight, STEPS)
    chance = random.Random(method)
    killed = studio.trainer(**recipe, version=2)
    for kept in (chance.randrange(1, 3), chance.randrange(3, STEPS)):
        again = take(killed, kept - killed.step)
        assert again == reports[kept - len(again) : kept]
        killed.publish()
        for _ in range(chance.randrange(3)):  # lost
            micro_step([killed])
        torch.manual_seed(99)
        killed = studio.trainer(**recipe, version=2, resume_step=kept)
        assert killed.step == kept
    assert take(killed, STEPS - killed.step) == reports[kept:]
    assert bits(killed.adapter()) == bits(straight.adapter())
    assert killed.publish().sha256 == straight.publish().sha256


@pytest.fixture(scope="module")
def half_precision(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """SDXL's layout, with weights in bfloat16."""
    base = load_base(str(save_base("sdxl", tmp_path_factory.mktemp("sdxl"))), "cpu", "bfloat16")
    bank = SlotBank(slots=1, max_rank=16)
    for component in ("unet", *base.family.text_encoders):
        bank.wrap(base.modules[component], component)
    return furnished((base, bank), tmp_path_factory.mktemp("studio"))


@pytest.mark.parametrize("method", ["dora", "pivotal with text"])
def test_on_a_base_in_half_precision_too(half_precision: Studio, method: str) -> None:
    """What learns is float32, in both text encoders as well."""
    studio, version = half_precision, 1 if method == "dora" else 2
    recipe = {"max_train_steps": 4, **METHODS[method], "gradient_checkpointing": True, "version": version}
    straight = studio.trainer(**recipe)
    reports = take(straight, 2)
    straight.publish()
    reports += take(straight, 2)
    resumed = studio.trainer(**recipe, resume_step=2)
    assert take(resumed, 2) == reports[2:]
    adapter = resumed.adapter()
    assert bits(adapter) == bits(straight.adapter())
    assert all(t.dtype == torch.float32 for m in adapter.modules.values() for _, t in tensors_of(m))
    if method == "pivotal with text":
        assert {name.split(".")[0] for name in adapter.modules} == {"unet", "text_encoder", "text_encoder_2"}
        assert adapter.tokens["<otto>"].keys() == {"text_encoder", "text_encoder_2"}


def test_methods_of_all_kinds_in_one_forward(studio: Studio) -> None:
    """Whoever is beside them, their bits are those of trainings that were alone; a kill in between, too."""
    recipes = [
        {"max_train_steps": 4, "train_batch_size": 2, **METHODS[name], "gradient_checkpointing": True}
        for name in ("dora", "text", "tokens", "pivotal")
    ]
    recipes = [{**recipe, "batch_bucket": 8} for recipe in recipes]
    alone = [studio.trainer(**recipe) for recipe in recipes]
    for trainer in alone:
        take(trainer, 4)
    shared = [studio.trainer(**recipe) for recipe in recipes]
    for _ in range(2):
        assert all(isinstance(outcome, StepReport) for outcome in micro_step(shared))
    shared[3].publish()
    micro_step(shared[3:])  # lost
    shared = [studio.trainer(**recipes[3], resume_step=2), shared[0], shared[2], shared[1]]
    for _ in range(2):
        assert all(isinstance(outcome, StepReport) for outcome in micro_step(shared))
    for trainer, other in zip(shared, (alone[3], alone[0], alone[2], alone[1]), strict=True):
        assert bits(trainer.adapter()) == bits(other.adapter())


@pytest.mark.parametrize("method", METHODS)
def test_what_is_published_is_what_was_learned(studio: Studio, method: str) -> None:
    """The stored adapter, read and active in the bank, gives the U-Net that the training had."""
    trainer = studio.trainer(**{"max_train_steps": STEPS, **METHODS[method]})
    take(trainer, STEPS)
    batch = trainer.begin()
    with torch.no_grad(), studio.bank.train(batch.leaves):
        ours = studio.denoiser.predict(batch.noisy, batch.timesteps, batch.conditioning)
    adapter = decode_stored(Path(trainer.publish().path).read_bytes())
    studio.bank.check(adapter)
    rows, words = studio.bank.alone(adapter)
    assert trainer._drawn is not None
    family = studio.base.family
    for index, (caption, framing) in enumerate(
        zip(trainer._drawn.captions, trainer._drawn.framings, strict=True)
    ):
        with torch.no_grad(), studio.bank.use(rows, words):
            text = (
                studio.base.encode_negative(None)
                if caption is None
                else studio.base.encode_prompt(caption, words=words.ids)
            )
            row = family.condition(text, framing)
            states = row.prompt_embeds[None]
            conditioning = type(row)(states, {key: value[None] for key, value in row.added.items()})
            one = slice(index, index + 1)
            theirs = studio.denoiser.predict(batch.noisy[one], batch.timesteps[one], conditioning)
        assert torch.allclose(ours[one], theirs, atol=2e-5)
    with torch.no_grad(), studio.bank.use(None):
        base = studio.denoiser.predict(batch.noisy, batch.timesteps, batch.conditioning)
    assert method == "tokens" or not torch.allclose(ours, base, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "field", "told"),
    [
        ({"init_lora_weights": "loftq"}, "recipe.init_lora_weights", "loftq"),
        ({"init_lora_weights": "eva"}, "recipe.init_lora_weights", "eva"),
        ({"init_lora_weights": "corda"}, "recipe.init_lora_weights", "corda"),
        ({"init_lora_weights": "nonsense"}, "recipe.init_lora_weights", "nonsense"),
        ({"init_lora_weights": "orthogonal", "rank": 5}, "recipe.init_lora_weights", "even"),
        (
            {"init_lora_weights": "pissa", "target_modules": ("convolutions",)},
            "recipe.init_lora_weights",
            "pissa",
        ),
        ({"init_lora_weights": "pissa", "rank": 9}, "recipe.rank", "twice the rank"),
        (
            {**WORDS, "method": "textual_inversion", "placeholder_tokens": ("octopus",)},
            "recipe.placeholder_tokens",
            "'octopus'",
        ),
        (
            {**WORDS, "method": "pivotal", "initializer_token": "a red octopus"},
            "recipe.initializer_token",
            "not one token",
        ),
        ({"method": "nonsense"}, "recipe.method", "nonsense"),
    ],
)
def test_what_the_base_cannot_do_is_refused_by_name(
    studio: Studio, changes: dict[str, Any], field: str, told: str
) -> None:
    before = {name: weight.clone() for name, weight in studio.base.unet.state_dict().items()}
    with pytest.raises(InvalidRequest, match=told) as caught:
        studio.trainer(**changes)
    assert caught.value.violations[0].field == field
    assert all(torch.equal(before[name], weight) for name, weight in studio.base.unet.state_dict().items())


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_initialisations_out_of_the_base_leave_it_alone(studio: Studio, name: str) -> None:
    unet = studio.base.unet
    before = {key: weight.clone() for key, weight in unet.state_dict().items()}
    trainer = studio.trainer(init_lora_weights=name, rank=4)
    batch = trainer.begin()
    with torch.no_grad():
        with studio.bank.train(batch.leaves):
            first = studio.denoiser.predict(batch.noisy, batch.timesteps, batch.conditioning)
        base = studio.denoiser.predict(batch.noisy, batch.timesteps, batch.conditioning)
    assert torch.equal(first, base)  # nothing is learned yet
    take(trainer, 1)
    assert all(torch.equal(before[key], weight) for key, weight in unet.state_dict().items())
    assert {module.rank for module in trainer.adapter().low_rank.values()} == {8}


def test_tokens_are_frozen_once_weights_learn(studio: Studio) -> None:
    trainer = studio.trainer(**PIVOTAL)
    first = trainer.adapter()
    assert not first.modules
    take(trainer, 3)
    pivot = trainer.adapter()
    assert bits(pivot) != bits(first)
    take(trainer, 2)
    later = trainer.adapter()
    assert later.modules
    assert torch.equal(later.tokens["<otto>"]["text_encoder"], pivot.tokens["<otto>"]["text_encoder"])


def test_a_batch_without_the_token_moves_nothing_but_by_momentum(studio: Studio) -> None:
    """No caption has it: the gradients are zero, alone as beside others."""
    recipe = {
        **WORDS,
        "method": "textual_inversion",
        "instance_prompt": "an octopus",
        "adam_weight_decay": 0.0,
    }
    trainer = studio.trainer(**recipe)
    before = bits(trainer.adapter())
    take(trainer, 1)
    assert bits(trainer.adapter()) == before


def test_another_recipe_or_base_cannot_go_on(studio: Studio) -> None:
    trainer = studio.trainer()
    take(trainer, 1)
    trainer.publish()
    with pytest.raises(DataLoss, match="recipe_sha256"):
        studio.trainer(resume_step=1, learning_rate=2e-3)
    assert studio.trainer(resume_step=1, validation_prompts=("a",), keep_last=2).step == 1
    sha256, studio.base.sha256 = studio.base.sha256, "another"
    try:
        with pytest.raises(DataLoss, match="base_sha256"):
            studio.trainer(resume_step=1)
    finally:
        studio.base.sha256 = sha256
