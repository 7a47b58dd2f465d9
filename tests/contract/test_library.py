"""Tags, notes, deletions that can be undone, lists: over a real channel."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from atelier.v1 import adapter_pb2 as pb
from atelier_server.jobs import wardrobe
from atelier_server.jobs.checkpoints import count_checkpoints
from atelier_server.jobs.wardrobe import Wardrobe
from tests.contract.harness import Service, Start, import_requests, refused


async def adopt(
    service: Service, name: str, data: bytes = b"fine", *, new_version: bool = False
) -> pb.Adapter:
    requests = import_requests(data, name=name, new_version=new_version)
    return (await service.adapters.ImportAdapter(iter(requests))).adapter


async def names(service: Service, **fields: object) -> list[str]:
    found, token = [], ""
    while True:
        request = pb.ListAdaptersRequest(page_size=2, page_token=token, **fields)
        page = await service.adapters.ListAdapters(request)
        found += [adapter.name for adapter in page.adapters]
        if not (token := page.next_page_token):
            return found


async def test_tags(service: Service) -> None:
    await service.train(max_train_steps=20, checkpointing_steps=10)
    tagged = await service.adapters.TagAdapter(pb.TagAdapterRequest(adapter="otto@10", tag="production"))
    assert tagged.previous == ""
    assert list(tagged.adapter.tags) == ["v1", "production"]
    assert [list(c.tags) for c in tagged.adapter.checkpoints] == [["production"], []]
    request = pb.TagAdapterRequest(adapter="otto", tag="production", expected="v1@20")
    refusal = await refused(service.adapters.TagAdapter(request))
    assert (refusal.code, refusal.reason) == ("ABORTED", "TAG_MOVED")
    assert "v1@10" in refusal.message
    request.expected = "v1@10"
    assert (await service.adapters.TagAdapter(request)).previous == "v1@10"
    loaded = await service.adapters.LoadAdapter(pb.LoadAdapterRequest(adapter="otto@production"))
    assert loaded.adapter == "otto@v1@20"
    untag = pb.UntagAdapterRequest(adapter="otto", tag="production", expected="")
    assert (await refused(service.adapters.UntagAdapter(untag))).code == "ABORTED"
    untag.ClearField("expected")
    assert (await service.adapters.UntagAdapter(untag)).previous == "v1@20"
    assert (await refused(service.adapters.UntagAdapter(untag))).code == "NOT_FOUND"
    refusal = await refused(service.adapters.LoadAdapter(pb.LoadAdapterRequest(adapter="otto@production")))
    assert (refusal.code, refusal.resource) == ("NOT_FOUND", ("adapter", "otto@production"))


async def test_what_is_told_of_a_checkpoint_is_a_reference_to_it(service: Service) -> None:
    """Also of an older version: NAME@STEP means the newest."""
    await service.train(max_train_steps=10)
    await service.train(max_train_steps=10, new_version=True)

    async def loaded(reference: str) -> str:
        return (await service.adapters.LoadAdapter(pb.LoadAdapterRequest(adapter=reference))).adapter

    assert [await loaded(reference) for reference in ("otto", "otto@10", "otto@v1")] == [
        "otto@v2@10",
        "otto@v2@10",
        "otto@v1@10",
    ]
    assert await loaded("otto@v1@10") == "otto@v1@10"
    refusal = await refused(service.adapters.LoadAdapter(pb.LoadAdapterRequest(adapter="otto@v1@20")))
    assert (refusal.code, refusal.resource) == ("NOT_FOUND", ("adapter", "otto@v1@20"))


@pytest.mark.parametrize(
    ("fields", "violated"),
    [
        ({"tag": "v2"}, {"tag"}),
        ({"tag": "750"}, {"tag"}),
        ({"tag": ""}, {"tag"}),
        ({"tag": "x" * 33}, {"tag"}),
        ({"tag": "Best", "adapter": "../x", "expected": "otto@10"}, {"tag", "adapter", "expected"}),
        ({"expected": "v0@1"}, {"expected"}),
    ],
)
async def test_bad_tags(service: Service, fields: dict[str, str], violated: set[str]) -> None:
    request = pb.TagAdapterRequest(**{"adapter": "otto", "tag": "best", **fields})
    refusal = await refused(service.adapters.TagAdapter(request))
    assert (refusal.code, set(refusal.violations)) == ("INVALID_ARGUMENT", violated)


async def test_labels_of_nothing_are_not_found(service: Service) -> None:
    calls = [
        service.adapters.TagAdapter(pb.TagAdapterRequest(adapter="nobody", tag="best")),
        service.adapters.UntagAdapter(pb.UntagAdapterRequest(adapter="nobody", tag="best")),
        service.adapters.AnnotateAdapter(pb.AnnotateAdapterRequest(adapter="nobody", note="x")),
        service.adapters.UndeleteAdapter(pb.UndeleteAdapterRequest(adapter="nobody")),
    ]
    for call in calls:
        refusal = await refused(call)
        assert (refusal.code, refusal.reason) == ("NOT_FOUND", "ADAPTER_NOT_FOUND")


async def test_a_note_and_the_recipe_are_told(service: Service) -> None:
    await service.train(max_train_steps=10, rank=2, learning_rate=0.5)
    note = pb.AnnotateAdapterRequest(adapter="otto@v1", note=" learned on a rainy day \n")
    assert (await service.adapters.AnnotateAdapter(note)).adapter.note == "learned on a rainy day"
    told = (await service.adapters.GetAdapter(pb.GetAdapterRequest(adapter="otto"))).adapter
    assert (told.note, told.family, told.tier) == ("learned on a rainy day", "sd1", pb.ADAPTER_TIER_DISK)
    assert (told.recipe.rank, told.recipe.learning_rate, told.recipe.max_train_steps) == (2, 0.5, 10)
    note.note = "x" * 10_001
    assert (await refused(service.adapters.AnnotateAdapter(note))).violations.keys() == {"note"}


async def test_a_deletion_is_undone(service: Service) -> None:
    await adopt(service, "guest")
    await adopt(service, "guest", b"other", new_version=True)
    deleted = await service.adapters.DeleteAdapter(pb.DeleteAdapterRequest(adapter="guest"))
    listed = await service.adapters.ListAdapters(pb.ListAdaptersRequest(view=pb.ADAPTER_VIEW_DELETED))
    assert [a.version for a in listed.adapters] == [1, 2]
    gap = listed.adapters[0].expire_time.ToSeconds() - listed.adapters[0].delete_time.ToSeconds()
    assert gap == 7 * 86400
    assert abs(listed.adapters[0].expire_time.ToSeconds() - deleted.expire_time.ToSeconds()) <= 60
    assert await names(service) == []
    back = await service.adapters.UndeleteAdapter(pb.UndeleteAdapterRequest(adapter="guest@v2"))
    assert [a.version for a in back.adapters] == [2]
    assert await names(service, all_versions=True) == ["guest"]
    assert (await adopt(service, "guest", b"third", new_version=True)).version == 3


async def test_the_gauge_of_what_is_stored_keeps_up(service: Service) -> None:
    application = service.application

    def stored() -> tuple[float | None, int]:
        labels = {"tier": "disk"}
        told = application.metrics.registry.get_sample_value("atelier_adapters_resident", labels)
        return told, count_checkpoints(application._store)

    await service.train(max_train_steps=20, checkpointing_steps=10)
    await adopt(service, "guest")
    await adopt(service, "guest", b"other", new_version=True)
    assert stored() == (4, 4)
    await service.adapters.DeleteAdapter(pb.DeleteAdapterRequest(adapter="guest@v1"))
    assert stored() == (3, 3)
    await service.adapters.DeleteAdapter(pb.DeleteAdapterRequest(adapter="guest"))
    await service.adapters.DeleteAdapter(pb.DeleteAdapterRequest(adapter="otto"))
    assert stored() == (0, 0)
    await service.adapters.UndeleteAdapter(pb.UndeleteAdapterRequest(adapter="otto"))
    assert stored() == (2, 2)


async def test_what_was_deleted_long_ago_is_removed(start: Start) -> None:
    service = await start(retention_days=0)
    await adopt(service, "guest")
    await service.adapters.DeleteAdapter(pb.DeleteAdapterRequest(adapter="guest"))
    done = await service.application._wardrobe.collect()
    assert done.versions == (("guest", 1),)
    refusal = await refused(service.adapters.UndeleteAdapter(pb.UndeleteAdapterRequest(adapter="guest")))
    assert refusal.code == "NOT_FOUND"


async def test_lists(service: Service) -> None:
    for name, size in (("bolt", 300), ("anna", 100), ("otto", 200)):
        await adopt(service, name, b"x" * size)
    assert await names(service) == ["anna", "bolt", "otto"]
    assert await names(service, order_by="size_bytes desc") == ["bolt", "otto", "anna"]
    assert await names(service, order_by="create_time") == ["bolt", "anna", "otto"]
    await service.generate("a", adapters=[{"adapter": "otto"}])
    assert (await names(service, order_by="last_used_time desc"))[0] == "otto"
    await service.adapters.LoadAdapter(pb.LoadAdapterRequest(adapter="anna"))
    assert await names(service, resident=True) == ["anna"]
    assert await names(service, resident=False, name_prefix="b") == ["bolt"]
    assert await names(service, base="fake") == ["anna", "bolt", "otto"]
    assert await names(service, base="sdxl") == []


async def test_a_pinned_adapter_is_shown_and_given_to_the_next_worker(start: Start) -> None:
    service = await start(slots=5)
    for name in ("otto", "bolt"):
        await adopt(service, name, name.encode())
    pin = pb.LoadAdapterRequest(adapter="otto", pin=True)
    assert (await service.adapters.LoadAdapter(pin)).loaded
    refusal = await refused(service.adapters.LoadAdapter(pb.LoadAdapterRequest(adapter="bolt", pin=True)))
    assert (refusal.code, refusal.reason) == ("RESOURCE_EXHAUSTED", "TOO_MANY_PINS")
    assert await pinned(service) == ["otto"]
    os.kill(service.application.worker.pid, signal.SIGKILL)
    await service.generate("a")  # waits for the next worker
    assert not (await service.adapters.LoadAdapter(pb.LoadAdapterRequest(adapter="otto"))).loaded
    assert await pinned(service) == ["otto"]
    assert (await service.adapters.UnloadAdapter(pb.UnloadAdapterRequest(adapter="otto"))).unloaded == 1
    assert await pinned(service) == []
    assert await names(service, resident=True) == []


async def pinned(service: Service) -> list[str]:
    page = await service.adapters.ListAdapters(pb.ListAdaptersRequest())
    return [adapter.name for adapter in page.adapters if any(c.pinned for c in adapter.checkpoints)]


async def test_bad_lists(service: Service) -> None:
    for name in ("a", "b"):
        await adopt(service, name)
    first = await service.adapters.ListAdapters(pb.ListAdaptersRequest(page_size=1))
    for fields in (
        {"order_by": "loss"},
        {"order_by": "name down"},
        {"view": 9},
        {"name_prefix": "x" * 201},
        {"page_token": first.next_page_token, "name_prefix": "a"},  # of another query
        {"page_token": "bm8="},
    ):
        refusal = await refused(service.adapters.ListAdapters(pb.ListAdaptersRequest(**fields)))
        assert refusal.code == "INVALID_ARGUMENT", fields


async def test_housekeeping_goes_on_whatever_fails(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Else one odd file in the store would end it for as long as the server lives."""
    twice = asyncio.Event()
    tries = 0

    async def collect(self: Wardrobe) -> None:
        nonlocal tries
        tries += 1
        if tries == 2:
            twice.set()
        raise RuntimeError("odd")

    monkeypatch.setattr(wardrobe, "_COLLECT_SECONDS", 0.0)
    monkeypatch.setattr(Wardrobe, "collect", collect)
    keeping = asyncio.create_task(service.application._wardrobe.keep_house())
    seen = asyncio.create_task(twice.wait())
    await asyncio.wait((keeping, seen), timeout=30, return_when=asyncio.FIRST_COMPLETED)
    assert twice.is_set()
    for task in (keeping, seen):
        task.cancel()
    await asyncio.gather(keeping, seen, return_exceptions=True)
    assert "nothing was collected" in caplog.text
