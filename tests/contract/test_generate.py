"""Generate over a real channel: order, joins, cancellation, lost workers, admission."""

from __future__ import annotations

import asyncio
import json
import os
import signal

from atelier.v1 import adapter_pb2, generation_pb2
from atelier_server.config import Limits
from tests.contract.harness import Service, Start, kinds, new_id, refused
from tests.pictures import soft_colours


def pictures(messages: list[generation_pb2.GenerateResponse]) -> dict[int, bytes]:
    """Puts the chunks together; fails where they are out of order."""
    files: dict[int, bytes] = {}
    for message in messages:
        if message.WhichOneof("event") == "image":
            chunk = message.image
            assert len(chunk.data) <= 2**20
            assert chunk.offset == len(files.get(chunk.index, b""))
            files[chunk.index] = files.get(chunk.index, b"") + chunk.data
            assert chunk.last == (len(files[chunk.index]) == chunk.size)
    return files


async def first(call: object) -> generation_pb2.GenerateResponse:
    return await anext(aiter(call))


async def test_events_come_in_the_promised_order(service: Service) -> None:
    messages = await service.generate("a cat", num_images=2, num_inference_steps=4, seed=7)
    names = kinds(messages)
    assert names[0] == "queued"
    assert names[-1] == "completed"
    assert names.count("image") == 2
    assert messages[0].queued.position == 0
    completed = messages[-1].completed
    assert completed.seed == 7
    assert [m.image.seed for m in messages if m.WhichOneof("event") == "image"] == [7, 8]
    receipt = completed.receipt
    assert (receipt.base_model, receipt.scheduler, receipt.width, receipt.seed) == ("fake", "ddim", 64, 7)
    assert (receipt.prompt, receipt.num_inference_steps, receipt.guidance_scale) == ("a cat", 4, 7.5)
    assert receipt.versions["torch"] == "none"
    assert receipt.versions["atelier"]
    assert receipt.create_time.seconds > 0


async def test_large_pictures_are_chunked_and_never_interleaved(service: Service) -> None:
    messages = await service.generate("big", num_images=2, num_inference_steps=1)
    images = [m.image.index for m in messages if m.WhichOneof("event") == "image"]
    assert images == [0, 0, 0, 1, 1, 1]
    assert pictures(messages)[1] == bytes(range(256)) * 4096 * 3


async def test_a_drawn_seed_is_told(service: Service) -> None:
    one, two = await service.generate("a"), await service.generate("a")
    assert one[-1].completed.seed != two[-1].completed.seed


async def test_repeats_join_and_then_get_the_stored_result(service: Service) -> None:
    request_id = new_id()
    request = generation_pb2.GenerateRequest(prompt="hold", request_id=request_id)
    one, two = service.generations.Generate(request), service.generations.Generate(request)
    await first(one)
    await first(two)
    assert service.application.generations.count == 1
    released = await service.generate("release")
    assert json.loads(pictures(released)[0])["submitted"] == 2
    rest_one, rest_two = [m async for m in one], [m async for m in two]
    assert pictures(rest_one) == pictures(rest_two)
    stored = await service.generate("hold", request_id=request_id)
    assert kinds(stored)[0] == "queued"
    assert kinds(stored)[-1] == "completed"
    assert pictures(stored) == pictures(rest_one)
    assert stored[-1] == rest_one[-1]


async def test_another_body_under_the_same_id_is_refused(service: Service) -> None:
    request_id = new_id()
    await service.generate("a", request_id=request_id)
    refusal = await refused(service.generate("b", request_id=request_id))
    assert (refusal.code, refusal.reason) == ("ALREADY_EXISTS", "REQUEST_ID_REUSED")
    assert refusal.resource == ("request", request_id)


async def test_the_last_reader_cancels(service: Service) -> None:
    request = generation_pb2.GenerateRequest(prompt="hold", request_id=new_id())
    one, two = service.generations.Generate(request), service.generations.Generate(request)
    await first(one)
    await first(two)
    one.cancel()
    seen = json.loads(pictures(await service.generate("look"))[0])
    assert seen["cancelled"] == 0
    two.cancel()
    async with asyncio.timeout(30):
        await service.application.generations.idle.wait()
    seen = json.loads(pictures(await service.generate("look"))[0])
    assert seen["cancelled"] == 1


async def test_a_deadline_that_cannot_be_met_costs_nothing(service: Service) -> None:
    request = generation_pb2.GenerateRequest(prompt="hold", num_inference_steps=200)
    refusal = await refused(first(service.generations.Generate(request, timeout=1.0)))
    assert (refusal.code, refusal.reason) == ("DEADLINE_EXCEEDED", "DEADLINE_TOO_SHORT")
    assert json.loads(pictures(await service.generate("look"))[0])["submitted"] == 1
    assert (await service.generate("a", num_inference_steps=200))[-1].completed.seed
    few = generation_pb2.GenerateRequest(
        prompt="a", num_inference_steps=200, image=soft_colours(), strength=0.01
    )
    done = [event async for event in service.generations.Generate(few, timeout=1.0)]
    assert done[-1].completed.seed, "two of the 200 steps are taken, and counted"


async def test_a_picture_that_cannot_fit_the_device_costs_nothing(service: Service) -> None:
    size = {"width": 1024, "height": 1024, "num_inference_steps": 1}
    strict = {"reproducibility": generation_pb2.REPRODUCIBILITY_STRICT, "batch_bucket": 16}
    refusal = await refused(service.generate("hold", **size, **strict))
    assert (refusal.code, refusal.reason) == ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY")
    assert refusal.metadata["needed_bytes"] == str(16 * 1024 * 1024 * 100)
    assert refusal.metadata["free_bytes"] == str(10**9)
    assert json.loads(pictures(await service.generate("look"))[0])["submitted"] == 1
    await service.generate("a", **size)


async def test_priorities_and_clients_reach_the_worker(service: Service) -> None:
    messages = await service.generate("a", priority=generation_pb2.PRIORITY_HIGH)
    assert json.loads(pictures(messages)[0])["priority"] == "HIGH"
    assert json.loads(pictures(messages)[0])["client"] in ("ipv4:127.0.0.1", "ipv6:[::1]")
    refusal = await refused(service.generate("a", priority=9))
    assert set(refusal.violations) == {"priority"}


async def test_an_unknown_adapter_is_not_found(service: Service) -> None:
    adapters = [generation_pb2.AdapterSelection(adapter="otto@750:0.8")]
    refusal = await refused(service.generate("a", adapters=adapters))
    assert (refusal.code, refusal.reason) == ("NOT_FOUND", "ADAPTER_NOT_FOUND")
    assert refusal.resource == ("adapter", "otto")
    assert refusal.trailers["x-request-id"]


async def test_every_violation_is_listed_at_once(service: Service) -> None:
    adapters = [generation_pb2.AdapterSelection(adapter=name) for name in ("../x", "otto:nan")]
    refusal = await refused(
        service.generate(
            "x" * 100_000,
            request_id="7",
            width=100,
            height=10**6,
            num_images=0,
            num_inference_steps=10**6,
            guidance_scale=float("nan"),
            scheduler="magic",
            batch_bucket=3,
            adapters=adapters,
            seed=2**64 - 1,
            reproducibility=9,
        )
    )
    assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    assert set(refusal.violations) == {
        "prompt",
        "request_id",
        "width",
        "height",
        "num_images",
        "num_inference_steps",
        "guidance_scale",
        "scheduler",
        "batch_bucket",
        "adapters[0].adapter",
        "adapters[1].adapter",
        "reproducibility",
    }
    assert "dpmpp-2m-sde" in refusal.violations["scheduler"]
    assert kinds(await service.generate("the next call works"))[-1] == "completed"


async def test_a_failed_job_ends_with_its_status(service: Service) -> None:
    refusal = await refused(service.generate("fail"))
    assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "NONFINITE_IMAGE")
    assert refusal.metadata == {"index": "0"}


async def test_a_full_queue_says_when_to_come_back(start: Start) -> None:
    service = await start(limits=Limits(max_queued_generations=1))
    held = service.generations.Generate(generation_pb2.GenerateRequest(prompt="hold"))
    await first(held)
    refusal = await refused(service.generate("a"))
    assert (refusal.code, refusal.reason, refusal.retry_seconds) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL", 5)
    held.cancel()


async def test_a_lost_worker_is_only_a_pause(service: Service) -> None:
    call = service.generations.Generate(generation_pb2.GenerateRequest(prompt="crash-once"))
    messages = [message async for message in call]
    names = kinds(messages)
    assert names[-1] == "completed"
    assert names.count("queued") >= 2
    assert messages[-1].completed.timings.restarts == 1
    info = service.application.status
    assert info.restarts == 1


async def test_a_picture_that_was_sent_is_not_sent_again(service: Service) -> None:
    messages = await service.generate("image-crash-once", num_images=2)
    assert [m.image.index for m in messages if m.WhichOneof("event") == "image"] == [0, 1]
    assert messages[-1].completed.timings.restarts == 1


async def test_the_third_death_is_told_and_others_survive(service: Service) -> None:
    held = service.generations.Generate(generation_pb2.GenerateRequest(prompt="hold"))
    await first(held)
    refusal = await refused(service.generate("crash"))
    assert (refusal.code, refusal.reason) == ("UNAVAILABLE", "WORKER_LOST")
    assert refusal.retry_seconds == 5
    rest = [message async for message in held]
    assert kinds(rest)[-1] == "completed"
    assert rest[-1].completed.timings.restarts == 2
    assert all(json.loads(data)["alone"] for data in pictures(rest).values())


async def test_kill_minus_nine_of_the_worker(service: Service) -> None:
    call = service.generations.Generate(generation_pb2.GenerateRequest(prompt="hold"))
    stream = aiter(call)
    while (await anext(stream)).WhichOneof("event") != "progress":
        pass
    os.kill(service.application.worker.pid, signal.SIGKILL)
    while (await anext(stream)).WhichOneof("event") != "progress":
        pass
    await service.generate("release")
    rest = [message async for message in stream]
    assert rest[-1].completed.timings.restarts == 1


async def test_an_adapter_in_use_is_not_deleted(service: Service) -> None:
    await service.train()
    adapters = [generation_pb2.AdapterSelection(adapter="otto:0.5")]
    held = service.generations.Generate(generation_pb2.GenerateRequest(prompt="hold", adapters=adapters))
    await first(held)
    delete = adapter_pb2.DeleteAdapterRequest(adapter="otto")
    refusal = await refused(service.adapters.DeleteAdapter(delete))
    assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "ADAPTER_IN_USE")
    await service.generate("release")
    messages = [message async for message in held]
    used = messages[-1].completed.receipt.adapters
    assert [(a.name, a.version, a.step, a.weight) for a in used] == [("otto", 1, 500, 0.5)]
    await service.adapters.DeleteAdapter(delete)
    refusal = await refused(service.adapters.DeleteAdapter(delete))
    assert refusal.code == "NOT_FOUND"
