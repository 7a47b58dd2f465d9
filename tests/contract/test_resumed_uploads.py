"""Uploads of adapters: interrupted and gone on with, too long, too short, two at once; no leftovers."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import grpc.aio
import pytest

from atelier.v1 import adapter_pb2 as pb
from atelier_server.jobs.partial_uploads import PartialUploads
from tests.contract.harness import Service, import_requests, refused

DATA = b"fine" + os.urandom(3 * 2**20)
QUERY = pb.QueryUploadRequest(sha256=hashlib.sha256(DATA).hexdigest(), size_bytes=len(DATA))


def partials(service: Service) -> list[Path]:
    folder = service.application._directory.path
    return [*folder.glob("uploads-partial/*"), *folder.glob("uploads/*")]


async def interrupt(service: Service, count: int = 3, name: str = "guest") -> int:
    """Sends the metadata and some chunks, then goes away; how many bytes the server kept."""
    sent = asyncio.Event()

    async def some() -> AsyncIterator[pb.ImportAdapterRequest]:
        for message in import_requests(DATA, name=name)[:count]:
            yield message
        sent.set()
        await asyncio.Event().wait()

    call = service.adapters.ImportAdapter(some())
    await sent.wait()
    while True:  # what is on its way arrives in its own time
        paths = [path for path in partials(service) if path.exists()]
        if paths and paths[0].stat().st_size >= (count - 1) * 2**20 - 2**16:
            break
        await asyncio.sleep(0.01)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    async with asyncio.timeout(60):
        while not (held := (await service.adapters.QueryUpload(QUERY)).offset):
            await asyncio.wait([asyncio.create_task(service.generate("a"))])  # a round through the server
    return held


def rest(offset: int, **fields: object) -> list[pb.ImportAdapterRequest]:
    first, *chunks = import_requests(DATA[offset:], **fields)
    first.metadata.size_bytes, first.metadata.sha256 = len(DATA), QUERY.sha256
    first.metadata.offset = offset
    return [first, *chunks]


async def test_an_interrupted_upload_goes_on(service: Service) -> None:
    assert (await service.adapters.QueryUpload(QUERY)).offset == 0
    held = await interrupt(service)
    assert 0 < held < len(DATA)
    assert len(partials(service)) == 1
    answer = await service.adapters.ImportAdapter(iter(rest(held)))
    assert answer.adapter.checkpoints[0].sha256 == QUERY.sha256
    assert partials(service) == []
    assert (await service.adapters.QueryUpload(QUERY)).offset == 0


async def test_it_may_go_on_earlier_but_not_later(service: Service) -> None:
    held = await interrupt(service)
    refusal = await refused(service.adapters.ImportAdapter(iter(rest(held + 1))))
    assert (refusal.code, set(refusal.violations)) == ("INVALID_ARGUMENT", {"metadata.offset"})
    assert str(held) in refusal.violations["metadata.offset"]
    assert (await service.adapters.QueryUpload(QUERY)).offset == held
    answer = await service.adapters.ImportAdapter(iter(rest(1000)))
    assert answer.adapter.checkpoints[0].sha256 == QUERY.sha256
    assert partials(service) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [("longer", "INVALID_REQUEST"), ("shorter", "UPLOAD_INCOMPLETE"), ("other", "INVALID_REQUEST")],
)
async def test_a_resumed_upload_that_ends_wrong_leaves_nothing(
    service: Service, change: str, reason: str
) -> None:
    held = await interrupt(service)
    messages = rest(held)
    if change == "longer":
        messages.append(pb.ImportAdapterRequest(chunk=b"x"))
    elif change == "shorter":
        messages.pop()
    else:
        messages[-1] = pb.ImportAdapterRequest(chunk=bytes(len(messages[-1].chunk)))
    refusal = await refused(service.adapters.ImportAdapter(iter(messages)))
    assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", reason)
    assert partials(service) == []
    refusal = await refused(service.adapters.GetAdapter(pb.GetAdapterRequest(adapter="guest")))
    assert refusal.code == "NOT_FOUND"


async def test_of_two_uploads_of_one_name_at_once_one_is_taken(service: Service) -> None:
    async def adopt(data: bytes) -> str:
        try:
            await service.adapters.ImportAdapter(iter(import_requests(data)))
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return "OK"

    for contents in ((b"fine one", b"fine two"), (DATA, DATA)):
        told = await asyncio.gather(*(adopt(data) for data in contents))
        assert sorted(told) == ["ALREADY_EXISTS", "OK"]
        assert partials(service) == []
        request = pb.ListAdaptersRequest(all_versions=True)
        assert [a.version for a in (await service.adapters.ListAdapters(request)).adapters][-1:] != []
        await service.adapters.DeleteAdapter(pb.DeleteAdapterRequest(adapter="guest"))


async def test_the_same_content_heals_a_damaged_adapter_under_its_name(service: Service) -> None:
    await service.adapters.ImportAdapter(iter(import_requests(b"fine")))
    blobs = service.application._directory.path.glob("adapters/blobs/*/*")
    next(blob for blob in blobs if blob.read_bytes() == b"fine").write_bytes(b"rot!")
    exported = service.adapters.ExportAdapter(pb.ExportAdapterRequest(adapter="guest"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [_ async for _ in exported]
    assert caught.value.code().name == "DATA_LOSS"
    assert "guest@v1@0" in (caught.value.details() or "")
    listed = await service.adapters.ListAdapters(pb.ListAdaptersRequest())
    assert [(a.name, a.damaged) for a in listed.adapters] == [("guest", True)]
    refusal = await refused(service.generate("a", adapters=[{"adapter": "guest"}]))
    assert refusal.code == "DATA_LOSS"
    assert await service.generate("a")
    refusal = await refused(service.adapters.ImportAdapter(iter(import_requests(b"other content"))))
    assert refusal.code == "ALREADY_EXISTS"
    healed = await service.adapters.ImportAdapter(iter(import_requests(b"fine")))
    assert (healed.adapter.version, healed.adapter.damaged) == (1, False)
    assert await service.generate("a", adapters=[{"adapter": "guest"}])


@pytest.mark.parametrize("fields", [{"sha256": "x"}, {"size_bytes": 0}, {"size_bytes": 2**40}])
async def test_bad_queries(service: Service, fields: dict[str, object]) -> None:
    values = {"sha256": QUERY.sha256, "size_bytes": 5, **fields}
    refusal = await refused(service.adapters.QueryUpload(pb.QueryUploadRequest(**values)))
    assert (refusal.code, set(refusal.violations)) == ("INVALID_ARGUMENT", set(fields))


def cancelled(uploads: PartialUploads, sha256: str) -> Path:
    with suppress(asyncio.CancelledError), uploads.claim("", sha256, 10, 0) as path:
        path.write_bytes(b"12345")
        raise asyncio.CancelledError
    return path


def test_what_nobody_comes_back_for_expires(tmp_path: Path) -> None:
    uploads = PartialUploads(tmp_path)
    for number in range(20):
        path = cancelled(uploads, f"{number:064x}")
        os.utime(path, (number, number + 1_900_000_000))
    assert uploads.held("", f"{19:064x}", 10) == 5
    assert uploads.held("acme", f"{19:064x}", 10) == 0  # another tenant's
    uploads.expire(keep_seconds=10**10)
    assert [uploads.held("", f"{n:064x}", 10) for n in range(20)] == [0] * 4 + [5] * 16  # the newest
    with uploads.claim("", f"{19:064x}", 10, 5) as path:
        uploads.expire(keep_seconds=-(10**10))
        assert list(tmp_path.iterdir()) == [path]  # in use
        path.unlink()
