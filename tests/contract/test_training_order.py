"""Trainings beside each other over a real channel: paused, waiting for their turn, too large, suspected."""

from __future__ import annotations

from pathlib import Path

import pytest

from atelier.v1 import adapter_pb2, generation_pb2, training_pb2
from tests.contract.harness import Service, Start, kinds, refused, running
from tests.contract.test_train import STEPS, begin, seqs, until, watch_request

QUEUED = training_pb2.TRAINING_STATE_QUEUED
RUNNING = training_pb2.TRAINING_STATE_RUNNING
PAUSED = training_pb2.TRAINING_STATE_PAUSED


async def pause(service: Service, training: str) -> int:
    request = training_pb2.PauseTrainingRequest(training=training)
    return (await service.trainings.PauseTraining(request)).training.state


async def resume(service: Service, training: str) -> int:
    request = training_pb2.ResumeTrainingRequest(training=training)
    return (await service.trainings.ResumeTraining(request)).training.state


async def state(service: Service, training: str) -> training_pb2.Training:
    request = training_pb2.GetTrainingRequest(training=training)
    return (await service.trainings.GetTraining(request)).training


async def cancel(service: Service, training: str) -> None:
    await service.trainings.CancelTraining(training_pb2.CancelTrainingRequest(training=training))


async def warned(stream: object, reason: str) -> str:
    """What the next warning of that reason says."""
    while (warning := (await until(stream, "warning")).warning).reason != reason:
        pass
    return warning.message


async def test_a_paused_training_leaves_with_a_checkpoint_and_goes_on_from_it(service: Service) -> None:
    stream, training = await begin(service, instance_prompt="hold")
    await until(stream, "checkpoint")
    assert await pause(service, training) == PAUSED
    assert await pause(service, training) == PAUSED, "idempotent"
    assert "step 3" in await warned(stream, "PAUSED")
    assert (await state(service, training)).state == PAUSED
    assert await resume(service, training) == QUEUED
    assert (await until(stream, "restarted")).restarted.reason == "RESUMED"
    assert (await until(stream, "completed")).completed.step == 20
    events = await service.watch(training)
    assert seqs(events) == list(range(1, len(events) + 1))
    for call in (pause(service, training), resume(service, training)):
        refusal = await refused(call)
        assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "TRAINING_ENDED")
    assert (await refused(pause(service, "nobody"))).reason == "TRAINING_NOT_FOUND"


async def test_a_pause_and_what_follows_at_once_are_all_heeded(service: Service) -> None:
    """The worker is told to pause, and has not answered yet when its user thinks again."""
    stream, training = await begin(service, instance_prompt="hold")
    await until(stream, "checkpoint")
    await pause(service, training)
    await resume(service, training)
    assert (await until(stream, "completed")).completed.step == 20
    stream, training = await begin(service, name="other", instance_prompt="hold")
    await until(stream, "checkpoint")
    await pause(service, training)
    await cancel(service, training)
    assert (await until(stream, "completed")).completed.state == training_pb2.TRAINING_STATE_CANCELLED


async def test_a_training_stays_paused_whoever_dies(tmp_path: Path) -> None:
    async with running(tmp_path) as service:
        stream, training = await begin(service, instance_prompt="hold")
        await until(stream, "checkpoint")
        await pause(service, training)
        await warned(stream, "PAUSED")
        service.application.worker.kill()
        await service.until(2)
        await service.until_ready()
        assert (await state(service, training)).state == PAUSED
    async with running(tmp_path) as service:
        assert (await state(service, training)).state == PAUSED
        await cancel(service, training)
        assert (await service.watch(training))[-1].completed.adapter == "otto@v1@5"


async def test_trainings_wait_for_their_turn_the_highest_priority_first(start: Start) -> None:
    service = await start(max_running_trainings=1)
    stream, first = await begin(service, name="first", instance_prompt="hold")
    await until(stream, "checkpoint")
    streams = {}
    for name, priority in (
        ("low", generation_pb2.PRIORITY_LOW),
        ("normal", generation_pb2.PRIORITY_NORMAL),
        ("high", generation_pb2.PRIORITY_HIGH),
    ):
        streams[name], training = await begin(service, name=name, priority=priority)
        assert (await state(service, training)).state == QUEUED
    assert (await state(service, first)).state == RUNNING
    await pause(service, first)
    ends = {name: (await until(stream, "completed")).create_time for name, stream in streams.items()}
    order = sorted(ends, key=lambda name: (ends[name].seconds, ends[name].nanos))
    assert order == ["high", "normal", "low"]
    assert (await state(service, first)).state == PAUSED


async def test_what_can_never_fit_is_refused_and_what_does_not_fit_now_waits(start: Start) -> None:
    """The scripted worker has a gigabyte, and a million parameters: a row of 2048 pixels takes 2.4 GB."""
    service = await start()
    refusal = await refused(service.train(resolution=2048, **STEPS))
    assert (refusal.code, refusal.reason) == ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY")
    assert int(refusal.metadata["needed_bytes"]) > int(refusal.metadata["free_bytes"]) == 10**9
    large = {"rank": 64, "train_batch_size": 2, "resolution": 640}
    stream, _ = await begin(service, name="first", instance_prompt="hold", **large)
    await until(stream, "checkpoint")
    events = await service.train(name="second", **STEPS, **large)
    assert kinds(events)[-1] == "completed", "steps take turns: their memory is needed once"


async def test_a_full_disk_pauses_a_training_and_loses_nothing(service: Service) -> None:
    stream, training = await begin(service, instance_prompt="disk-full-once")
    assert "step 5" in await warned(stream, "STORAGE_FULL")
    found = await state(service, training)
    assert (found.state, found.step, found.reason) == (PAUSED, 5, "STORAGE_FULL")
    adapter = await service.adapters.GetAdapter(adapter_pb2.GetAdapterRequest(adapter="otto"))
    assert adapter.adapter.recommended_step == 5
    await resume(service, training)
    assert (await until(stream, "restarted")).restarted.from_step == 5
    assert (await until(stream, "completed")).completed.step == 20
    assert (await state(service, training)).reason == ""


@pytest.mark.parametrize(("script", "starts"), [("stay", 3), ("linger", 4)])
async def test_a_training_that_kills_the_worker_is_found_and_its_neighbour_goes_on(
    service: Service, script: str, starts: int
) -> None:
    """One that lingers is suspected as well: it is tried alone first, and has to leave for the other."""
    neighbour, innocent = await begin(service, name="innocent", instance_prompt=script)
    await until(neighbour, "progress")
    stream, _ = await begin(service, name="culprit", instance_prompt="crash")
    refusal = await refused(until(stream, "never"))
    assert refusal.reason == "TRAINING_CRASH_LOOP"
    await service.until_ready()
    assert (await state(service, innocent)).state in (QUEUED, RUNNING)
    while (await state(service, innocent)).state != RUNNING:
        await until(neighbour, "progress")
    await cancel(service, innocent)
    events = await service.watch(innocent)
    assert events[-1].completed.state == training_pb2.TRAINING_STATE_CANCELLED
    restarts = [event for event in events if event.WhichOneof("event") == "restarted"]
    assert len(restarts) == 2, "the culprit was alone at its third crash"
    markers = service.application._directory.path.glob(f"{innocent}-*.marker")
    assert len(list(markers)) == starts


@pytest.mark.parametrize(
    ("keep", "left"), [({"keep_last": 1}, [20]), ({"keep_last": 2, "keep_every": 10}, [10, 15, 20])]
)
async def test_old_checkpoints_go_when_newer_ones_are_there(
    service: Service, keep: dict[str, int], left: list[int]
) -> None:
    events = await service.train(**STEPS, **keep)
    assert [e.checkpoint.step for e in events if e.WhichOneof("event") == "checkpoint"] == [5, 10, 15, 20]
    answer = await service.adapters.GetAdapter(adapter_pb2.GetAdapterRequest(adapter="otto"))
    assert [checkpoint.step for checkpoint in answer.adapter.checkpoints] == left
    refusal = await refused(service.generate(adapters=[generation_pb2.AdapterSelection(adapter="otto@5")]))
    assert refusal.reason == "ADAPTER_NOT_FOUND"


async def test_what_is_tagged_or_needed_stays(service: Service) -> None:
    stream, training = await begin(service, instance_prompt="hold", keep_last=1)
    await until(stream, "checkpoint")
    tag = adapter_pb2.TagAdapterRequest(adapter="otto@5", tag="production")
    await service.adapters.TagAdapter(tag)
    await pause(service, training)
    await warned(stream, "PAUSED")
    await resume(service, training)
    await until(stream, "completed")
    answer = await service.adapters.GetAdapter(adapter_pb2.GetAdapterRequest(adapter="otto"))
    assert [checkpoint.step for checkpoint in answer.adapter.checkpoints] == [5, 20]


async def test_a_watcher_of_a_paused_training_waits(service: Service) -> None:
    stream, training = await begin(service, instance_prompt="hold")
    await until(stream, "checkpoint")
    await pause(service, training)
    watcher = aiter(service.trainings.WatchTraining(watch_request(training)))
    await warned(watcher, "PAUSED")
    await resume(service, training)
    await until(watcher, "completed")
