"""Any mix of strict requests, joined at any step, composed in any order: each has the bits it has alone."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atelier_server.adapters.canonical import CanonicalAdapter, DenseModule, LoraModule, Module
from atelier_server.adapters.store import ADAPTER_FILE
from atelier_server.adapters.stored import write_stored
from atelier_server.core import AdapterUse, GenerationJob, InitImage, Mode, SchedulerOptions
from atelier_server.guides import ControlUse
from benchmarks.desk import Desk, job
from tests.adapters import random_adapter, write
from tests.bases import save_base, save_controlnet
from tests.pictures import right_part, soft_colours

SCHEDULERS = ("ddim", "euler", "euler-a", "dpmpp-2m", "unipc", "heun")
SAMPLE, SOAK = 8, 150
RANKS = (2, 8, 16, 32)
Table = tuple[Desk, list[AdapterUse]]


@pytest.fixture(scope="module")
def desk() -> Iterator[Table]:
    root = Path(tempfile.mkdtemp())
    desk = Desk("pocket", root / "data", slots=3, max_rank=32)
    files = [
        write(random_adapter(i, rank=rank, alpha=rank / 2, convolutions=i == 2), root / f"a{i}.safetensors")
        for i, rank in enumerate(RANKS)
    ]
    yield desk, desk.publish(files)
    shutil.rmtree(root)


@pytest.fixture(scope="module", params=["sd2", "sdxl"])
def studio(request: pytest.FixtureRequest) -> Iterator[Table]:
    """A base of another family with a ControlNet, and adapters that reach into the text encoders."""
    root = Path(tempfile.mkdtemp())
    base = save_base(request.param, root / "base")
    net = save_controlnet(request.param, root / "net", base)
    desk = Desk(str(base), root / "data", slots=3, max_rank=32, controlnets=(("lines", str(net)),))
    yield desk, [_publish(desk, number, rank) for number, rank in enumerate(RANKS)]
    shutil.rmtree(root)


def _publish(desk: Desk, number: int, rank: int) -> AdapterUse:
    """Attention of the U-Net; of the text encoders too from the second on; the last has a word of its own.

    The third is every second layer a DoRA, every third a full difference, and changes the norms, too.
    """
    runner, generator = desk.runner, torch.Generator().manual_seed(number)
    projections = (".to_q", ".to_v", ".q_proj", ".fc1") if number else (".to_q", ".to_v")
    modules: dict[str, Module] = {}
    for name, layer in runner.bank.layers.items():
        if name.endswith(projections):
            out, features = layer.weight.shape
            a = torch.randn(rank, features, generator=generator) / features**0.5
            b = torch.randn(out, rank, generator=generator) * 0.2
            modules[name] = LoraModule(a, b, rank / 2)
            if number == 2 and len(modules) % 2 == 0:
                magnitude = layer.weight.norm(dim=1) * (1 + 0.2 * torch.rand(out, generator=generator))
                modules[name] = replace(modules[name], magnitude=magnitude)
            elif number == 2 and len(modules) % 3 == 0:
                modules[name] = DenseModule(b @ a / rank)
    if number == 2:
        norms = {name: shape for name, shape in runner.bank.shapes.items() if len(shape) == 1}
        modules |= {name: DenseModule(torch.randn(s, generator=generator) * 0.1) for name, s in norms.items()}
    words = {
        encoder.name: torch.randn(2, encoder.model.config.hidden_size, generator=generator)
        for encoder in runner.base.encoders
    }
    adapter = CanonicalAdapter(modules, {"<sks>": words} if number == 3 else {})
    record = runner.store.publish_version(
        lambda folder: write_stored(adapter, folder / ADAPTER_FILE),
        name=f"a{number}",
        trigger="",
        base_model="",
        base_sha256="",
        family="",
        new_version=False,
        rank=rank,
        lora_alpha=rank / 2,
    )
    return AdapterUse(record.id, 1.0, record.path, record.sha256)


# What a picture begins with: noise, a picture, a picture of which a part is painted anew.
INITS = (
    None,
    InitImage(soft_colours(), "soft", 0.7),
    InitImage(soft_colours(), "soft", 1.0, right_part(), "right"),
    InitImage(soft_colours(), "soft", 0.6, right_part(), "right"),
)
# Short, none, weighted, and too long for pocket's text encoder.
PROMPTS = ("a red octopus", "", "a (red:1.4) octopus (on a beach:0.5)", "a red octopus on a beach, " * 12)
OPTIONS = (SchedulerOptions(), SchedulerOptions(timestep_spacing="trailing"))
CONTROLS = (
    (),
    (ControlUse("lines", soft_colours(), "soft", ""),),
    (ControlUse("lines", right_part(), "right", "", scale=0.5, start=0.3),),
)


@dataclass(frozen=True)
class Drawn:
    """A request; `adapters` are indices."""

    adapters: list[int]
    fading: bool
    scheduler: str
    steps: int
    guidance: float
    rescale: float
    seed: int
    init: InitImage | None
    options: SchedulerOptions
    prompt: str
    clip_skip: int
    controls: tuple[ControlUse, ...] = ()


REQUEST = st.builds(
    Drawn,
    adapters=st.lists(st.integers(0, 3), max_size=2, unique=True),
    fading=st.booleans(),
    scheduler=st.sampled_from(SCHEDULERS),
    steps=st.integers(2, 4),
    guidance=st.sampled_from([1.0, 4.0]),
    rescale=st.sampled_from([0.0, 0.7]),
    seed=st.integers(0, 3),
    init=st.sampled_from(INITS),
    options=st.sampled_from(OPTIONS),
    prompt=st.sampled_from(PROMPTS),
    clip_skip=st.integers(0, 1),
)


WITH_CONTROLS = st.tuples(REQUEST, st.sampled_from(CONTROLS), st.booleans()).map(
    lambda drawn: replace(
        drawn[0], controls=drawn[1], prompt=f"a <sks> {drawn[0].prompt}" if drawn[2] else drawn[0].prompt
    )
)


def request(number: int, uses: list[AdapterUse], drawn: Drawn) -> GenerationJob:
    weights = (1.0, 0.0) if drawn.fading else ()
    composed = tuple(replace(uses[i], weight=0.5 + i / 4, weights=weights) for i in drawn.adapters)
    return replace(
        job(f"r{number}", drawn.prompt, *composed, steps=drawn.steps, seed=drawn.seed),
        scheduler=drawn.scheduler,
        scheduler_options=drawn.options,
        guidance_scale=drawn.guidance,
        guidance_rescale=drawn.rescale,
        init=drawn.init,
        clip_skip=drawn.clip_skip,
        controlnets=drawn.controls,
        mode=Mode.STRICT,
        bucket=8,
    )


def check(desk: Table, mix: list[Drawn]) -> None:
    table, uses = desk
    jobs = [request(number, uses, drawn) for number, drawn in enumerate(mix)]
    together = table.generate(jobs)
    for one in jobs:
        turned = replace(one, adapters=tuple(reversed(one.adapters)))
        alone = table.generate([turned])[one.id]
        # The file tells the adapters in the order in which they were asked for: pixels are compared.
        assert pixels(alone[0]) == pixels(together[one.id][0])


def pixels(file: bytes) -> bytes:
    """The compressed picture without what is written beside it."""
    return file[file.index(b"IDAT") :]


@given(st.lists(REQUEST, min_size=2, max_size=6))
@settings(max_examples=SAMPLE, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_a_sample_of_mixes(desk: Table, mix: list[Drawn]) -> None:
    check(desk, mix)


@pytest.mark.soak
@pytest.mark.timeout(3000)
@given(st.lists(REQUEST, min_size=2, max_size=6))
@settings(max_examples=SOAK, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_many_mixes(desk: Table, mix: list[Drawn]) -> None:
    check(desk, mix)


@given(st.lists(WITH_CONTROLS, min_size=2, max_size=6))
@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_a_sample_of_mixes_with_text_parts_and_controlnets(studio: Table, mix: list[Drawn]) -> None:
    check(studio, mix)


@pytest.mark.soak
@pytest.mark.timeout(3000)
@given(st.lists(WITH_CONTROLS, min_size=2, max_size=6))
@settings(max_examples=SOAK, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_many_mixes_with_text_parts_and_controlnets(studio: Table, mix: list[Drawn]) -> None:
    check(studio, mix)
