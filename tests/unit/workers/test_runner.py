"""The runner on a real base: what the loop and the device's memory may ask of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from atelier_server.adapters.canonical import CanonicalAdapter, blank
from atelier_server.core import GenerationJob, Mode, Recipe, TrainingJob
from atelier_server.engine.scheduler import ImageTask
from atelier_server.errors import NonfiniteLoss
from atelier_server.messages import WorkerSettings
from atelier_server.workers.runner import TorchRunner
from atelier_server.workers.trainings import TrainerRuns


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> TorchRunner:
    folder: Path = tmp_path_factory.mktemp("data")
    return TorchRunner(
        WorkerSettings(
            model="pocket",
            device="cpu",
            dtype="float32",
            data_dir=str(folder),
            slots=2,
            threads=0,
            host_adapter_bytes=0,
            max_lora_rank=8,
        )
    )


def task(arrival: int, prompt: str) -> ImageTask:
    job = GenerationJob(
        id=f"job-{arrival}",
        prompt=prompt,
        negative_prompt="",
        adapters=(),
        seed=arrival,
        num_images=1,
        num_inference_steps=4,
        guidance_scale=1.0,
        scheduler="dpmpp-2m",
        width=64,
        height=64,
        mode=Mode.FAST,
        bucket=0,
    )
    return ImageTask(job=job, index=0, arrival=arrival)


def test_texts_of_two_lengths_of_which_one_finds_no_memory_step_both_or_none(
    runner: TorchRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [task(1, "a beach"), task(2, "a red octopus " * 30)]
    pictures = []
    for one in tasks:
        runner.open(one, {})
        pictures.append(runner._pictures[one.arrival])
    assert len({picture.tokens for picture in pictures}) == 2
    runner.denoise(tasks, 2, {})
    before = [picture.trajectory.latents for picture in pictures]
    predict, calls = runner.denoiser.predict, []

    def short_of_memory(*args: Any) -> torch.Tensor:
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no more")
        return predict(*args)

    with monkeypatch.context() as patch:
        patch.setattr(runner.denoiser, "predict", short_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            runner.denoise(tasks, 2, {})
    assert len(calls) == 2
    assert [picture.trajectory.index for picture in pictures] == [1, 1]
    assert all(torch.equal(p.trajectory.latents, b) for p, b in zip(pictures, before, strict=True))


def test_an_import_is_tried_without_compiling_anything(
    runner: TorchRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = []

    @contextmanager
    def eagerly() -> Iterator[None]:
        inside.append(True)
        yield
        inside.pop()

    def measure(adapter: CanonicalAdapter) -> float:
        assert inside
        return 0.25

    monkeypatch.setattr(runner, "_eagerly", eagerly)
    monkeypatch.setattr(runner._probe, "measure", measure)
    assert runner._tried(blank(runner.bank.shapes)) == 0.25
    assert not inside


@pytest.mark.parametrize("what", ["train", "publish"])
def test_trainings_compile_nothing_either(what: str) -> None:
    inside = []

    @contextmanager
    def eagerly() -> Iterator[None]:
        inside.append(True)
        try:
            yield
        finally:
            inside.pop()

    def forward() -> Any:
        assert inside
        raise NonfiniteLoss("seen", {"step": "1"})

    trainer: Any = SimpleNamespace(begin=forward, publish=forward, state_bytes=lambda: 0)
    runs = TrainerRuns(lambda _: trainer, eagerly)
    run = runs.open(TrainingJob("otto-1", "otto", 1, Recipe("otto", 64), ()))
    if what == "train":
        (outcome,) = runs.train([run])
        assert isinstance(outcome, NonfiniteLoss)
    else:
        with pytest.raises(NonfiniteLoss):
            run.publish()
    assert not inside
