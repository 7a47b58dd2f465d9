"""Train and its relatives over a real channel: the log, uploads, crashes, cancel, resume, pages."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from atelier.v1 import adapter_pb2, training_pb2
from atelier_server.adapters.store import AdapterStore
from atelier_server.config import Limits
from tests.contract.harness import (
    Service,
    Start,
    import_requests,
    kinds,
    new_id,
    picture,
    refused,
    running,
    train_requests,
)

STEPS = {"max_train_steps": 20, "checkpointing_steps": 5}


def seqs(events: list[training_pb2.TrainingEvent]) -> list[int]:
    return [event.seq for event in events]


async def begin(service: Service, **fields: object) -> tuple[object, str]:
    """A training on its way, read up to its first event; its stream and id."""
    stream = aiter(service.trainings.Train(iter(train_requests(**{**STEPS, **fields}))))
    return stream, (await anext(stream)).event.training


async def until(stream: object, kind: str) -> training_pb2.TrainingEvent:
    while True:
        event = (await anext(stream)).event
        if event.WhichOneof("event") == kind:
            return event


async def test_a_training_tells_its_life_in_order(service: Service) -> None:
    events = await service.train(
        picture(), picture("JPEG"), picture("WEBP"), **STEPS, validation_prompts=["on a beach"]
    )
    names = kinds(events)
    assert seqs(events) == list(range(1, len(events) + 1))
    assert (names[0], names[-1]) == ("accepted", "completed")
    assert [e.checkpoint.step for e in events if e.WhichOneof("event") == "checkpoint"] == [5, 10, 15, 20]
    samples = [e.sample for e in events if e.WhichOneof("event") == "sample"]
    assert [(s.step, s.data) for s in samples] == [(n, b"sample %d" % n) for n in (5, 10, 15, 20)]
    # The last progress before a checkpoint is always told.
    before = [events[i - 1].progress.step for i, name in enumerate(names) if name == "checkpoint"]
    assert before == [5, 10, 15, 20]
    completed = events[-1].completed
    assert (completed.state, completed.step, completed.adapter) == (
        training_pb2.TRAINING_STATE_SUCCEEDED,
        20,
        "otto@v1@20",
    )
    assert events[0].accepted.estimated_bytes > 0
    assert events[0].accepted.estimated_seconds == pytest.approx(20 * 4 * 3 * 0.01)
    answer = await service.trainings.GetTraining(training_pb2.GetTrainingRequest(training="otto"))
    training = answer.training
    assert (training.id, training.last_seq) == (events[0].training, len(events))
    assert training.recipe.num_images == 3
    assert training.recipe.rank == 8
    assert training.HasField("end_time")


async def test_watching_goes_on_where_it_was(service: Service) -> None:
    events = await service.train(**STEPS)
    for after in (0, 3, len(events) - 1, len(events)):
        assert await service.watch("otto", after) == events[after:]
    refusal = await refused(service.watch("otto", -1))
    assert set(refusal.violations) == {"after_seq"}
    refusal = await refused(service.watch("nobody"))
    assert (refusal.code, refusal.reason) == ("NOT_FOUND", "TRAINING_NOT_FOUND")
    assert refusal.resource == ("training", "nobody")


async def test_a_watcher_misses_nothing_that_comes(service: Service) -> None:
    stream, training = await begin(service, instance_prompt="hold")
    watcher = asyncio.create_task(service.watch(training))
    await until(stream, "checkpoint")
    await service.trainings.CancelTraining(training_pb2.CancelTrainingRequest(training=training))
    events = await watcher
    assert seqs(events) == list(range(1, len(events) + 1))
    assert events[-1].completed.state == training_pb2.TRAINING_STATE_CANCELLED
    assert events[-1].completed.adapter == "otto@v1@5"


async def test_a_repeat_gets_the_same_training(service: Service) -> None:
    request_id = new_id()
    events = await service.train(request_id=request_id, **STEPS)
    assert await service.train(request_id=request_id, **STEPS) == events
    only_start = train_requests(request_id=request_id, **STEPS)[:1]
    stream = service.trainings.Train(iter(only_start))
    assert [response.event async for response in stream] == events
    for pictures, steps in (((), 21), ((picture(color="blue"),), 20)):
        fields = {**STEPS, "max_train_steps": steps}
        refusal = await refused(service.train(*pictures, request_id=request_id, **fields))
        assert (refusal.code, refusal.reason) == ("ALREADY_EXISTS", "REQUEST_ID_REUSED")


async def test_the_same_request_twice_at_once_is_one_training(service: Service) -> None:
    request_id = new_id()
    one, two = await asyncio.gather(*(service.train(request_id=request_id, **STEPS) for _ in range(2)))
    assert one == two


async def test_a_taken_name_needs_new_version(service: Service) -> None:
    await service.train(**STEPS)
    refusal = await refused(service.train(**STEPS))
    assert (refusal.code, refusal.reason) == ("ALREADY_EXISTS", "ADAPTER_EXISTS")
    assert refusal.resource == ("adapter", "otto")
    events = await service.train(**STEPS, new_version=True)
    assert events[0].accepted.version == 2


async def test_a_training_that_failed_without_a_checkpoint_leaves_its_name_free(service: Service) -> None:
    nan = {"instance_prompt": "nan", "checkpointing_steps": 10, "max_train_steps": 20}
    refusal = await refused(service.train(**nan))
    assert refusal.reason == "NONFINITE_LOSS"
    events = await service.train(**STEPS)
    assert events[-1].completed.adapter == "otto@v2@20"


async def test_such_a_name_is_free_for_an_import_too(service: Service) -> None:
    nan = {"instance_prompt": "nan", "checkpointing_steps": 10, "max_train_steps": 20}
    await refused(service.train(**nan))
    answer = await service.adapters.ImportAdapter(iter(import_requests(b"fine", name="otto")))
    assert (answer.adapter.name, answer.adapter.version) == ("otto", 2)
    refusal = await refused(service.adapters.ImportAdapter(iter(import_requests(b"fine", name="otto"))))
    assert refusal.reason == "ADAPTER_EXISTS"


async def test_every_violation_of_a_recipe_is_listed(service: Service) -> None:
    nan = float("nan")
    refusal = await refused(
        service.train(
            name="../x",
            instance_prompt=" ",
            num_images=0,
            method="magic",
            max_train_steps=0,
            learning_rate=nan,
            lr_scheduler="x",
            lr_warmup_steps=-1,
            train_batch_size=17,
            rank=10**6,
            lora_alpha=0.0,
            resolution=100,
            checkpointing_steps=0,
            validation_prompts=["x" * 100_000],
            validation_steps=0,
            adam_beta1=1.0,
            adam_epsilon=-1.0,
            max_grad_norm=float("inf"),
            snr_gamma=nan,
            caption_dropout=2.0,
        )
    )
    assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    assert len(refusal.violations) == 20
    assert "recipe.rank" in refusal.violations
    assert kinds(await service.train(**STEPS))[-1] == "completed"


BOMB = (
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
    + (20_000).to_bytes(4, "big") * 2
    + b"\x08\x02\x00\x00\x00"
    + bytes(4000)
)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"just some text", "is not a PNG, JPEG or WebP picture"),
        (BOMB, "is 20000 x 20000"),
        (picture("JPEG", (64, 64))[:-300], "cannot be decoded"),
        (picture()[:40], "cannot be decoded"),
    ],
)
async def test_a_bad_picture_is_named(service: Service, data: bytes, problem: str) -> None:
    refusal = await refused(service.train(picture(), data))
    assert refusal.code == "INVALID_ARGUMENT"
    assert set(refusal.violations) == {"images[1]"}
    assert refusal.violations["images[1]"].startswith("'photo-1.png' " + problem)
    assert list((service.application._directory.path / "uploads").iterdir()) == []
    assert kinds(await service.train(**STEPS))[-1] == "completed"


async def send(service: Service, messages: list[training_pb2.TrainRequest]) -> None:
    async for _ in service.trainings.Train(iter(messages)):
        pass


async def test_a_stream_that_ends_before_its_pictures(service: Service) -> None:
    whole = train_requests(picture(), picture())
    refusal = await refused(send(service, whole[:-1]))
    assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "UPLOAD_INCOMPLETE")
    assert "1 of 2 pictures" in refusal.message
    whole[-1].image.size_bytes += 1
    refusal = await refused(send(service, whole))
    assert refusal.reason == "UPLOAD_INCOMPLETE"


async def test_broken_orders_are_refused(service: Service) -> None:
    start, one, two = train_requests(picture(), picture())
    longer = training_pb2.TrainRequest()
    longer.CopyFrom(one)
    longer.image.size_bytes -= 1
    huge = training_pb2.TrainRequest()
    huge.CopyFrom(one)
    huge.image.size_bytes = 2**40
    for messages in ([], [one], [start, two], [start, one, start], [start, one, one], [start, longer]):
        refusal = await refused(send(service, messages))
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    refusal = await refused(send(service, [start, huge]))
    assert set(refusal.violations) == {"images[0].size_bytes"}


async def test_a_loss_that_is_no_number_ends_the_training(service: Service) -> None:
    stream, training = await begin(service, instance_prompt="nan")
    refusal = await refused(until(stream, "never"))
    assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "NONFINITE_LOSS")
    assert refusal.metadata == {"step": "6"}
    again = await refused(service.watch(training))
    assert (again.reason, again.metadata) == ("NONFINITE_LOSS", {"step": "6"})
    answer = await service.adapters.GetAdapter(adapter_pb2.GetAdapterRequest(adapter="otto"))
    assert answer.adapter.recommended_step == 5
    assert answer.adapter.training == training


async def test_a_lost_worker_restarts_from_the_last_checkpoint(service: Service) -> None:
    events = await service.train(**STEPS, instance_prompt="crash-once")
    (restarted,) = [e.restarted for e in events if e.WhichOneof("event") == "restarted"]
    assert (restarted.from_step, restarted.reason) == (5, "WORKER_LOST")
    assert seqs(events) == list(range(1, len(events) + 1))
    assert [e.checkpoint.step for e in events if e.WhichOneof("event") == "checkpoint"] == [5, 10, 15, 20]


async def test_a_checkpoint_whose_event_was_lost_is_found_in_the_store(service: Service) -> None:
    events = await service.train(**STEPS, instance_prompt="silent-crash-once", validation_prompts=["x"])
    names = kinds(events)
    assert [e.checkpoint.step for e in events if e.WhichOneof("event") == "checkpoint"] == [5, 10, 15, 20]
    assert names.index("checkpoint") < names.index("restarted")


async def test_three_crashes_at_one_step_are_enough(service: Service) -> None:
    stream, training = await begin(service, instance_prompt="crash")
    refusal = await refused(until(stream, "never"))
    assert (refusal.code, refusal.reason) == ("ABORTED", "TRAINING_CRASH_LOOP")
    assert refusal.metadata == {"step": "1"}
    resume = training_pb2.ResumeTrainingRequest(training=training)
    await service.until_ready()
    answer = await service.trainings.ResumeTraining(resume)
    assert answer.training.state == training_pb2.TRAINING_STATE_QUEUED
    assert answer.training.reason == ""


async def test_cancel_resume_delete(service: Service, tmp_path: Path) -> None:
    stream, training = await begin(service, instance_prompt="hold")
    await until(stream, "checkpoint")
    refusal = await refused(
        service.trainings.DeleteTraining(training_pb2.DeleteTrainingRequest(training=training))
    )
    assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "TRAINING_NOT_ENDED")
    refusal = await refused(
        service.trainings.ResumeTraining(training_pb2.ResumeTrainingRequest(training=training))
    )
    assert refusal.reason == "TRAINING_NOT_ENDED"
    delete = adapter_pb2.DeleteAdapterRequest(adapter="otto")
    assert (await refused(service.adapters.DeleteAdapter(delete))).reason == "ADAPTER_IN_USE"
    cancel = training_pb2.CancelTrainingRequest(training=training)
    await service.trainings.CancelTraining(cancel)
    assert (await until(stream, "completed")).completed.state == training_pb2.TRAINING_STATE_CANCELLED
    answer = await service.trainings.CancelTraining(cancel)
    assert answer.training.state == training_pb2.TRAINING_STATE_CANCELLED
    await service.trainings.ResumeTraining(training_pb2.ResumeTrainingRequest(training=training))
    events = await service.watch(training)
    assert seqs(events) == list(range(1, len(events) + 1))
    assert kinds(events).count("completed") == 2
    assert [e.restarted.reason for e in events if e.WhichOneof("event") == "restarted"] == ["RESUMED"]
    assert events[-1].completed.state == training_pb2.TRAINING_STATE_SUCCEEDED
    refusal = await refused(service.trainings.CancelTraining(cancel))
    assert refusal.reason == "TRAINING_ENDED"
    await service.trainings.DeleteTraining(training_pb2.DeleteTrainingRequest(training=training))
    assert not (tmp_path / "data" / "trainings" / training).exists()
    assert (await refused(service.watch(training))).code == "NOT_FOUND"
    await service.adapters.DeleteAdapter(delete)


async def test_cancel_on_disconnect(service: Service) -> None:
    call = service.trainings.Train(
        iter(train_requests(cancel_on_disconnect=True, **STEPS, instance_prompt="hold"))
    )
    stream = aiter(call)
    await until(stream, "checkpoint")
    call.cancel()
    events = await service.watch("otto")
    assert events[-1].completed.state == training_pb2.TRAINING_STATE_CANCELLED


async def test_a_training_outlives_its_client(service: Service) -> None:
    call = service.trainings.Train(iter(train_requests(**STEPS, instance_prompt="hold")))
    await until(aiter(call), "checkpoint")
    call.cancel()
    os.kill(service.application.worker.pid, signal.SIGKILL)
    await until(aiter(service.trainings.WatchTraining(watch_request("otto"))), "restarted")
    answer = await service.trainings.GetTraining(training_pb2.GetTrainingRequest(training="otto"))
    assert not answer.training.HasField("end_time")


def watch_request(training: str) -> training_pb2.WatchTrainingRequest:
    return training_pb2.WatchTrainingRequest(training=training)


async def test_a_new_front_goes_on_with_what_it_finds(tmp_path: Path) -> None:
    async with running(tmp_path) as service:
        stream, training = await begin(service, instance_prompt="hold")
        seen = [1, (await until(stream, "checkpoint")).seq]
        service.application.leave()
        refusal = await refused(until(stream, "never"))
        assert (refusal.code, refusal.reason) == ("UNAVAILABLE", "SERVER_DRAINING")
    async with running(tmp_path) as service:
        stream = aiter(service.trainings.WatchTraining(watch_request(training)))
        assert (await until(stream, "restarted")).restarted.reason == "SERVER_RESTARTED"
        await until(stream, "completed")
        events = await service.watch(training)
        assert seqs(events) == list(range(1, len(events) + 1))
        assert seen[-1] in seqs(events)


async def test_a_version_without_its_training_is_swept(tmp_path: Path) -> None:
    AdapterStore(tmp_path / "adapters").create_version(
        name="otto", trigger="", base_model="", base_sha256="", training="otto-gone", new_version=False
    )
    async with running(tmp_path) as service:
        events = await service.train(**STEPS)
        assert events[0].accepted.version == 1


async def test_pages(service: Service) -> None:
    ids = [(await service.train(name=name, **STEPS))[0].training for name in ("a", "b", "c")]
    seen, token = [], ""
    while True:
        page = await service.trainings.ListTrainings(
            training_pb2.ListTrainingsRequest(page_size=2, page_token=token)
        )
        seen += [training.id for training in page.trainings]
        if not (token := page.next_page_token):
            break
    assert seen == ids[::-1]
    first = await service.adapters.ListAdapters(adapter_pb2.ListAdaptersRequest(page_size=1))
    assert [adapter.name for adapter in first.adapters] == ["a"]
    rest = await service.adapters.ListAdapters(
        adapter_pb2.ListAdaptersRequest(page_token=first.next_page_token)
    )
    assert [adapter.name for adapter in rest.adapters] == ["b", "c"]
    for request in (
        training_pb2.ListTrainingsRequest(page_size=-1, page_token="x"),
        training_pb2.ListTrainingsRequest(page_size=-1, page_token=first.next_page_token),
    ):
        refusal = await refused(service.trainings.ListTrainings(request))
        assert set(refusal.violations) == {"page_size", "page_token"}


async def test_too_many_trainings(start: Start) -> None:
    service = await start(limits=Limits(max_queued_trainings=1))
    await begin(service, instance_prompt="hold")
    refusal = await refused(service.train(name="b", **STEPS))
    assert (refusal.code, refusal.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
