"""Whatever comes over the wire is a valid job or an InvalidRequest, never another error."""

from __future__ import annotations

import base64
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atelier.v1 import generation_pb2, training_pb2
from atelier_server.access.tenants import Scope
from atelier_server.config import Limits
from atelier_server.core import ROW_BUCKETS, SCHEDULERS, BaseInfo, Mode
from atelier_server.errors import InvalidRequest, Violation
from atelier_server.rpc import status
from atelier_server.rpc.codec import pages
from atelier_server.rpc.codec.checks import Checks
from atelier_server.rpc.codec.generation import decode_generate
from atelier_server.rpc.codec.training import decode_start

LIMITS = Limits()
BASE = BaseInfo(
    "fake", "sd1", "0" * 64, 64, 48, "epsilon", "pndm", 77, 1000, "cpu", "", "float32", 0, (("torch", "2"),)
)
ints = st.one_of(st.integers(-(2**31), 2**31 - 1), st.integers(-1, 64))
floats = st.one_of(st.floats(), st.floats(0, 2))
texts = st.one_of(st.text(max_size=20), st.sampled_from(["otto", "otto@750:0.8", "../x", *SCHEDULERS]))


def message(cls: type, **fields: st.SearchStrategy) -> st.SearchStrategy:
    """Messages of `cls` with any of the fields set."""
    return st.fixed_dictionaries({}, optional=fields).map(lambda values: cls(**values))


requests = message(
    generation_pb2.GenerateRequest,
    request_id=st.one_of(texts, st.uuids().map(str)),
    prompt=texts,
    negative_prompt=texts,
    adapters=st.lists(message(generation_pb2.AdapterSelection, adapter=texts), max_size=6),
    seed=st.integers(0, 2**64 - 1),
    controlnets=st.lists(
        message(
            generation_pb2.ControlNetSelection,
            name=texts,
            image=st.binary(max_size=8),
            scale=floats,
            start=floats,
            end=floats,
        ),
        max_size=3,
    ),
    num_images=ints,
    num_inference_steps=ints,
    guidance_scale=floats,
    scheduler=texts,
    width=ints,
    height=ints,
    reproducibility=st.integers(0, 5),
    batch_bucket=ints,
    image_format=st.integers(0, 5),
    guidance_rescale=floats,
    use_karras_sigmas=st.booleans(),
    use_exponential_sigmas=st.booleans(),
    use_beta_sigmas=st.booleans(),
    timestep_spacing=st.one_of(texts, st.sampled_from(["leading", "trailing"])),
    rescale_betas_zero_snr=st.booleans(),
    eta=floats,
    image=st.binary(max_size=8),
    mask_image=st.binary(max_size=8),
    strength=floats,
)
recipes = message(
    training_pb2.TrainingRecipe,
    name=texts,
    instance_prompt=texts,
    new_version=st.booleans(),
    num_images=ints,
    method=st.one_of(texts, st.just("lora")),
    max_train_steps=ints,
    learning_rate=floats,
    lr_scheduler=texts,
    lr_warmup_steps=ints,
    train_batch_size=ints,
    rank=ints,
    lora_alpha=floats,
    resolution=ints,
    seed=st.integers(0, 2**64 - 1),
    checkpointing_steps=ints,
    validation_prompts=st.lists(texts, max_size=20),
    validation_steps=ints,
    adam_beta1=floats,
    adam_epsilon=floats,
    max_grad_norm=floats,
    snr_gamma=floats,
    caption_dropout=floats,
)


@given(requests)
def test_any_generate_request_is_a_valid_job_or_refused(request: generation_pb2.GenerateRequest) -> None:
    try:
        draft = decode_generate(request, LIMITS, BASE)
    except InvalidRequest:
        return
    job = draft.job
    assert job.width % 8 == job.height % 8 == 0
    assert 8 <= job.width <= LIMITS.max_width
    assert 1 <= job.num_images <= LIMITS.max_num_images
    assert 1 <= job.num_inference_steps <= LIMITS.max_inference_steps
    assert math.isfinite(job.guidance_scale)
    assert job.scheduler in SCHEDULERS
    assert job.seed + job.num_images - 1 < 2**64
    assert job.bucket in ROW_BUCKETS if job.mode is Mode.STRICT else job.bucket == 0
    assert len(draft.refs) == len(request.adapters)
    assert all(math.isfinite(ref.weight) for ref in draft.refs)


@given(recipes, st.one_of(texts, st.uuids().map(str)))
def test_any_recipe_is_valid_or_refused(recipe: training_pb2.TrainingRecipe, request_id: str) -> None:
    try:
        draft = decode_start(
            training_pb2.TrainRequest.Start(recipe=recipe, request_id=request_id), LIMITS, BASE
        )
    except InvalidRequest:
        return
    valid = draft.recipe
    assert 1 <= valid.rank <= LIMITS.max_lora_rank
    assert valid.resolution % 8 == 0
    assert 0 < valid.learning_rate < math.inf
    assert valid.lora_alpha > 0


def test_defaults_are_the_contract() -> None:
    job = decode_generate(generation_pb2.GenerateRequest(), LIMITS, BASE).job
    assert (job.num_images, job.num_inference_steps, job.guidance_scale) == (1, 50, 7.5)
    assert (job.width, job.height, job.scheduler, job.bucket) == (64, 48, "pndm", 0)
    strict = generation_pb2.GenerateRequest(reproducibility=generation_pb2.REPRODUCIBILITY_STRICT)
    assert decode_generate(strict, LIMITS, BASE).job.bucket == 8
    recipe = training_pb2.TrainingRecipe(name="otto", instance_prompt="x", num_images=1, rank=4)
    draft = decode_start(training_pb2.TrainRequest.Start(recipe=recipe), LIMITS, BASE)
    assert (draft.recipe.lora_alpha, draft.recipe.resolution, draft.recipe.max_train_steps) == (4.0, 48, 500)


def test_an_option_that_a_scheduler_lacks_is_named_with_those_that_have_it() -> None:
    base = replace(BASE, scheduler_options=(("pndm", ("timestep_spacing",)), ("ddim", ("eta",))))
    request = generation_pb2.GenerateRequest(eta=0.5, timestep_spacing="odd", use_karras_sigmas=True)
    with pytest.raises(InvalidRequest) as refused:
        decode_generate(request, LIMITS, base)
    told = {violation.field: violation.description for violation in refused.value.violations}
    assert told["eta"] == "scheduler pndm has no eta; those that have it: ddim"
    assert told["timestep_spacing"] == "'odd' is none of linspace, leading, trailing"
    assert "pndm has no use_karras_sigmas" in told["use_karras_sigmas"]
    request = generation_pb2.GenerateRequest(scheduler="ddim", eta=0.5)
    assert decode_generate(request, LIMITS, base).job.scheduler_options.given == {"eta": 0.5}


def test_a_scheduler_that_the_base_cannot_be_used_with_is_refused() -> None:
    base = replace(BASE, schedulers=("ddim", "euler"))
    request = generation_pb2.GenerateRequest(scheduler="pndm")
    with pytest.raises(InvalidRequest, match="scheduler: 'pndm' is none of ddim, euler"):
        decode_generate(request, LIMITS, base)


def test_one_kind_of_sigmas_at_a_time() -> None:
    request = generation_pb2.GenerateRequest(use_karras_sigmas=True, use_beta_sigmas=True)
    with pytest.raises(InvalidRequest, match="use_beta_sigmas: only one kind of sigmas at a time"):
        decode_generate(request, LIMITS, BASE)


def test_zero_is_not_unset() -> None:
    assert decode_generate(generation_pb2.GenerateRequest(), LIMITS, BASE).job.negative_prompt is None
    request = generation_pb2.GenerateRequest(seed=0, guidance_scale=0.0, negative_prompt="")
    job = decode_generate(request, LIMITS, BASE).job
    assert job.negative_prompt == ""
    assert (job.seed, job.guidance_scale, job.guided) == (0, 0.0, False)
    with pytest.raises(InvalidRequest, match="num_inference_steps: 0 is not between 1 and 200"):
        decode_generate(generation_pb2.GenerateRequest(num_inference_steps=0), LIMITS, BASE)


def test_the_body_hash_covers_all_but_the_id() -> None:
    def hashed(**fields: object) -> str:
        return decode_generate(generation_pb2.GenerateRequest(**fields), LIMITS, BASE).body_hash

    id_ = "00000000-0000-4000-8000-000000000000"
    assert hashed(prompt="a", request_id=id_) == hashed(prompt="a")
    assert hashed(prompt="a", seed=0) != hashed(prompt="a")


@given(st.text(max_size=40))
def test_any_page_token_is_a_key_or_refused(token: str) -> None:
    checks = Checks()
    key = pages.page_key(checks, "trainings", token, (int,))
    assert key is None
    assert bool(checks.violations) == bool(token)
    given_key = pages.page_token("trainings", [5])
    assert pages.page_key(checks, "trainings", given_key, (int,)) == [5]


@pytest.mark.parametrize("content", ["[" * 100_000, f'["trainings", {2**63}]', f'["trainings", -{10**40}]'])
def test_a_page_token_that_nobody_gave_is_refused(content: str) -> None:
    """Neither deeper than Python's stack nor beyond what the database can count."""
    checks = Checks()
    token = base64.urlsafe_b64encode(content.encode()).decode()
    assert pages.page_key(checks, "trainings", token, (int,)) is None
    assert [violation.field for violation in checks.violations] == ["page_token"]


@given(st.integers(1, 500), st.integers(0, 3000))
def test_details_stay_small(count: int, length: int) -> None:
    error = InvalidRequest.of([Violation("f" * 50, "ä" * length) for _ in range(count)])
    message_text, trailers = status.trailers(error, Scope())
    assert len(message_text) <= 400
    assert sum(len(value) for _, value in trailers) < 8192
