"""TrainingRecipe to Recipe and back: defaults, every violation at once, contradictions, hashes."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atelier.v1 import generation_pb2, training_pb2
from atelier_server.config import Limits
from atelier_server.core import BaseInfo, Priority, Recipe, TrainingAbilities
from atelier_server.errors import InvalidRequest
from atelier_server.jobs.records import dump, load_recipe
from atelier_server.rpc.codec.checks import Checks
from atelier_server.rpc.codec.recipe import decode_recipe, encode_recipe, hashed
from atelier_server.rpc.codec.training import decode_start

ALL = TrainingAbilities(optimizers=("adamw", "adamw8bit", "prodigy"))
BASE = BaseInfo(
    *(
        "fake",
        "sd1",
        "0" * 64,
        64,
        48,
        "epsilon",
        "pndm",
        77,
        1000,
        "cpu",
        "",
        "float32",
        0,
        (("torch", "2"),),
    ),
    training=ALL,
)


def decode(base: BaseInfo = BASE, **fields: object) -> Recipe:
    message = training_pb2.TrainingRecipe(**{"instance_prompt": "a sks plush"} | fields)  # type: ignore[arg-type]
    checks = Checks()
    recipe = decode_recipe(checks, message, Limits(), base)
    checks.done()
    return recipe


def refused(base: BaseInfo = BASE, **fields: object) -> dict[str, str]:
    """The violations by field."""
    with pytest.raises(InvalidRequest) as caught:
        decode(base, **fields)
    return {v.field: v.description for v in caught.value.violations}


def test_contract_and_recipe_have_the_same_fields() -> None:
    contract = {field.name for field in training_pb2.TrainingRecipe.DESCRIPTOR.fields}
    own = {field.name for field in dataclasses.fields(Recipe)}
    assert contract - {"name", "new_version", "num_images"} == own


def test_defaults_are_those_of_the_noun() -> None:
    assert decode() == Recipe("a sks plush", 48)
    assert decode(rank=4).lora_alpha == 4.0


def test_defaults_that_follow_from_other_fields() -> None:
    recipe = decode(learning_rate=1e-3)
    assert (recipe.text_encoder_lr, recipe.token_lr) == (1e-3, pytest.approx(1e-2))
    assert decode(learning_rate=1.0, optimizer="prodigy").token_lr == 1.0
    assert decode(text_encoder_lr=5e-6, train_text_encoder=True).text_encoder_lr == 5e-6
    assert decode().cache_text_embeddings
    assert not decode(train_text_encoder=True).cache_text_embeddings
    assert not decode(method="pivotal", placeholder_tokens=["<otto>"]).cache_text_embeddings
    assert not decode(cache_text_embeddings=False).cache_text_embeddings


VALID = [
    {},
    {"train_text_encoder": True, "text_encoder_lr": 1e-5, "priority": generation_pb2.PRIORITY_HIGH},
    {"method": "textual_inversion", "placeholder_tokens": ["<a>", "<b>"], "num_vectors": 4},
    {"method": "pivotal", "placeholder_tokens": ["<a>"], "train_text_encoder_ti_frac": 0.3},
    {"method": "dreambooth", "class_prompt": "a plush", "with_prior_preservation": True, "use_ema": True},
    {
        "target_modules": ["attention", "feed_forward"],
        "use_dora": True,
        "init_lora_weights": "pissa_niter_16",
    },
    {"output_preservation_weight": 0.5, "class_prompt": "a plush", "snr_gamma": 5.0},
    {"optimizer": "prodigy", "learning_rate": 1.0, "keep_last": 2, "keep_every": 200, "batch_bucket": 8},
    {"mixed_precision": "bf16", "validation_split": 0.2, "masked_loss": True, "exact": True, "repeats": 3},
]


@pytest.mark.parametrize("fields", VALID)
def test_what_is_told_of_a_recipe_can_be_sent_again(fields: dict[str, object]) -> None:
    recipe = decode(**fields)
    checks = Checks()
    assert decode_recipe(checks, encode_recipe(recipe), Limits(), BASE) == recipe
    assert checks.violations == []


@pytest.mark.parametrize("fields", VALID)
def test_a_recipe_comes_back_from_the_book(fields: dict[str, object]) -> None:
    recipe = decode(**fields)
    assert load_recipe(dump(recipe)) == recipe


def test_a_recipe_of_the_first_release_comes_back_from_the_book() -> None:
    first = {"instance_prompt": "a sks plush", "resolution": 48, "validation_prompts": ["x"], "gone": 1}
    recipe = load_recipe(json.dumps(first))
    assert recipe == Recipe("a sks plush", 48, validation_prompts=("x",))
    assert recipe.priority is Priority.NORMAL


def test_a_repeat_of_a_request_from_before_the_upgrade_has_the_same_hash() -> None:
    """This is what the first release hashed; the digest was computed by it."""
    recipe = training_pb2.TrainingRecipe(name="otto", instance_prompt="a sks plush", num_images=2, rank=4)
    start = training_pb2.TrainRequest.Start(recipe=recipe)
    draft = decode_start(start, Limits(), BASE)
    assert draft.recipe_hash == "f681f687c91c99e95fe9a5ca6193b1a8dfe96c43f169deb39198f6f8c513e06e"
    start.recipe.use_ema = False  # given, though it is the default: another request
    assert decode_start(start, Limits(), BASE).recipe_hash != draft.recipe_hash


CONTRADICTIONS: list[tuple[dict[str, object], str, str]] = [
    (
        {"train_text_encoder": True, "cache_text_embeddings": True},
        "cache_text_embeddings",
        "train_text_encoder",
    ),
    (
        {"method": "pivotal", "placeholder_tokens": ["<o>"], "cache_text_embeddings": True},
        "cache_text_embeddings",
        "'pivotal'",
    ),
    ({"with_prior_preservation": True}, "with_prior_preservation", "class_prompt"),
    ({"output_preservation_weight": 0.5}, "output_preservation_weight", "class_prompt"),
    ({"num_vectors": 4}, "num_vectors", "placeholder_tokens"),
    ({"initializer_token": "octopus"}, "initializer_token", "placeholder_tokens"),
    ({"method": "textual_inversion"}, "placeholder_tokens", "<otto>"),
    ({"placeholder_tokens": ["<o>"]}, "placeholder_tokens", "textual_inversion"),
    ({"placeholder_tokens": ["two words"], "method": "pivotal"}, "placeholder_tokens[0]", "one word"),
    ({"placeholder_tokens": ["<o>", "<o>"], "method": "pivotal"}, "placeholder_tokens", "more than once"),
    (
        {"method": "textual_inversion", "placeholder_tokens": ["<o>"], "train_text_encoder": True},
        "train_text_encoder",
        "pivotal",
    ),
    (
        {
            "method": "pivotal",
            "placeholder_tokens": ["<o>"],
            "pivotal_method": "dreambooth",
            "train_text_encoder": True,
        },
        "train_text_encoder",
        "pivotal_method lora",
    ),
    ({"method": "pivotal", "placeholder_tokens": ["<o>"], "pivotal_method": "x"}, "pivotal_method", "lora"),
    ({"method": "dreambooth", "use_dora": True}, "use_dora", "LoRA"),
    ({"method": "dreambooth", "target_modules": ["feed_forward"]}, "target_modules", "LoRA"),
    ({"keep_every": 150}, "keep_every", "multiple of checkpointing_steps = 100"),
    ({"batch_bucket": 2, "train_batch_size": 4}, "batch_bucket", "train_batch_size = 4"),
    (
        {
            "batch_bucket": 4,
            "train_batch_size": 2,
            "class_prompt": "octopus",
            "with_prior_preservation": True,
            "output_preservation_weight": 1.0,
        },
        "batch_bucket",
        "train_batch_size = 2 pictures and 4 rows of the class",
    ),
    ({"batch_bucket": 3}, "batch_bucket", "2, 4, 8, 16"),
    ({"init_lora_weights": "eva"}, "init_lora_weights", "gaussian"),
    ({"target_modules": ["resnets"]}, "target_modules[0]", "attention"),
    ({"mixed_precision": "fp8"}, "mixed_precision", "bf16"),
    ({"optimizer": "sgd"}, "optimizer", "prodigy"),
    ({"token_lr": 0.0}, "token_lr", "above 0"),
    ({"train_text_encoder_ti_frac": 1.0}, "train_text_encoder_ti_frac", "below 1"),
    ({"validation_split": 1.0}, "validation_split", "below 1"),
    ({"priority": 9}, "priority", "9"),
    (
        {"init_lora_weights": "pissa", "target_modules": ["convolutions"]},
        "init_lora_weights",
        "linear layers",
    ),
    ({"init_lora_weights": "orthogonal", "rank": 3}, "init_lora_weights", "even rank, not 3"),
    (
        {"lr_scheduler": "polynomial", "lr_warmup_steps": 9, "max_train_steps": 9},
        "lr_warmup_steps",
        "some after them",
    ),
    ({"lr_scheduler": "polynomial", "learning_rate": 1e-8}, "learning_rate", "above 1e-07"),
]


@pytest.mark.parametrize(("fields", "field", "words"), CONTRADICTIONS)
def test_a_contradiction_names_field_and_remedy(fields: dict[str, object], field: str, words: str) -> None:
    assert words in refused(**fields)[f"recipe.{field}"]


def test_every_violation_is_told_at_once() -> None:
    found = refused(rank=0, with_prior_preservation=True, keep_every=30, optimizer="sgd", repeats=0)
    assert {name.removeprefix("recipe.") for name in found} == {
        *("rank", "with_prior_preservation", "keep_every", "optimizer", "repeats")
    }


def test_what_a_server_cannot_do_is_refused_by_name() -> None:
    can = TrainingAbilities(
        methods=("lora",), optimizers=("adamw",), precisions=("no",), unheeded=("use_ema", "noise_offset")
    )
    base = replace(BASE, training=can)
    found = refused(
        base,
        method="dreambooth",
        optimizer="adamw8bit",
        mixed_precision="fp16",
        use_ema=True,
        noise_offset=0.1,
    )
    assert "lora" in found["recipe.method"]
    assert "bitsandbytes" in found["recipe.optimizer"]
    assert "cpu" in found["recipe.mixed_precision"]
    assert "not on this server yet" in found["recipe.use_ema"]
    assert "not on this server yet" in found["recipe.noise_offset"]
    assert not decode(base, use_ema=False).use_ema
    cannot_cache = replace(BASE, training=TrainingAbilities(unheeded=("cache_text_embeddings",)))
    assert decode(cannot_cache, method="pivotal", placeholder_tokens=["<otto>"])
    assert refused(cannot_cache, cache_text_embeddings=False).keys() == {"recipe.cache_text_embeddings"}


def test_a_word_of_the_base_is_no_new_token() -> None:
    can = replace(ALL, vocabulary=frozenset({"octopus", "plush"}))
    base = replace(BASE, training=can)
    tokens: dict[str, object] = {"method": "pivotal", "placeholder_tokens": ["<otto>", "Octopus"]}
    found = refused(base, **tokens, initializer_token="blue octopus")
    assert "'Octopus' is a word that the base has already" in found["recipe.placeholder_tokens[1]"]
    assert "single word" in found["recipe.initializer_token"]
    assert decode(base, method="pivotal", placeholder_tokens=["<otto>"], initializer_token="octopus")


@settings(max_examples=100)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "rank": st.integers(-1, 80),
            "learning_rate": st.floats(),
            "placeholder_tokens": st.lists(st.text(max_size=4), max_size=3),
            "num_vectors": st.integers(-1, 40),
            "ema_decay": st.floats(),
            "keep_every": st.integers(-5, 300),
            "checkpointing_steps": st.integers(-5, 100),
            "batch_bucket": st.integers(-1, 17),
            "priority": st.integers(-1, 5),
            "target_modules": st.lists(st.sampled_from(["attention", "x"]), max_size=3),
        },
    )
)
def test_any_recipe_is_right_or_refused(fields: dict[str, object]) -> None:
    try:
        recipe = decode(**fields)
    except InvalidRequest:
        return
    assert asdict(load_recipe(dump(recipe))) == asdict(recipe)
    assert json.dumps(hashed(encode_recipe(recipe), recipe))
