"""Two tenants on one server: each sees its own, and nothing tells that the other's exists."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from atelier import (
    AlreadyExistsError,
    AsyncClient,
    AtelierError,
    NotFoundError,
    ResourceExhaustedError,
    UnauthenticatedError,
)
from atelier.events import TrainingAccepted, TrainingCompleted
from atelier_server.config import Limits
from tests.contract.harness import Service, Start, picture

TOKENS = {name: name[0] * 40 for name in ("red", "blue", "default")}
RECIPE: dict[str, Any] = {
    "images": [picture()],
    "instance_prompt": "red/otto is what I say",
    "max_train_steps": 10,
    "checkpointing_steps": 5,
}
SAFETENSORS = b"weights"


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.toml"
    path.write_text(
        "".join(
            f'[[token]]\ntenant = "{name}"\nsha256 = "{hashlib.sha256(token.encode()).hexdigest()}"\n'
            for name, token in TOKENS.items()
        )
    )
    return path


@pytest.fixture
async def service(start: Start, tokens: Path) -> Service:
    return await start(tokens_file=tokens)


@pytest.fixture
async def client(service: Service) -> AsyncIterator[Callable[[str], AsyncClient]]:
    clients = {
        name: AsyncClient(f"127.0.0.1:{service.application.port}", token=token, timeout=20)
        for name, token in TOKENS.items()
    }
    yield clients.__getitem__
    for made in clients.values():
        await made.close()


async def trained(client: AsyncClient, name: str = "otto", **more: Any) -> tuple[str, list[Any]]:
    events = [event async for event in client.train(name, **{**RECIPE, **more})]
    assert isinstance(events[0], TrainingAccepted)
    return events[0].training, events


async def missing(call: Any) -> tuple[str, str, object]:
    with pytest.raises(NotFoundError) as caught:
        await (anext(call) if hasattr(call, "__anext__") else call)
    return caught.value.reason, caught.value.message, caught.value.resource


async def test_anothers_adapter_is_as_one_that_never_was(client: Any, tmp_path: Path) -> None:
    red, blue = client("red"), client("blue")
    await trained(red)
    await red.tag_adapter("otto@10", "mine")

    def calls(name: str) -> list[Any]:
        return [
            blue.get_adapter(name),
            blue.load_adapter(name),
            blue.unload_adapter(name),
            blue.delete_adapter(name),
            blue.undelete_adapter(name),
            blue.tag_adapter(f"{name}@10", "mine"),
            blue.untag_adapter(name, "mine"),
            blue.annotate_adapter(name, "mine"),
            blue.merge_adapters([name], "merged"),
            blue.diff_adapters(name, name),
            blue.export_adapter(name, tmp_path / "x.safetensors"),
            blue.generate("x", adapters=name),
            blue.get_training(name),
            blue.cancel_training(name),
            blue.resume_training(name),
            blue.delete_training(name),
            blue.watch_training(name),
        ]

    for theirs, never in zip(calls("otto"), calls("nine"), strict=True):
        found, expected = await missing(theirs), await missing(never)
        assert str(found).replace("otto", "nine") == str(expected)
        assert "/" not in str(found)
    assert [a async for a in blue.list_adapters()] == []
    assert [t async for t in blue.list_trainings()] == []
    assert (await red.get_adapter("otto")).name == "otto"
    # A name of one's own is free, whoever else has it.
    await trained(blue)
    await blue.delete_adapter("otto")
    assert [a.name async for a in red.list_adapters()] == ["otto"]


@pytest.mark.parametrize("tenant", ["blue", "default"])
async def test_a_scope_cannot_be_written_from_outside(client: Any, tenant: str) -> None:
    training, _ = await trained(client("red"))
    other = client(tenant)
    for name in ("red/otto", f"red/{training}", "../red/otto", "/otto"):
        for call in (other.get_training(name), other.watch_training(name), other.delete_training(name)):
            assert (await missing(call))[0] == "TRAINING_NOT_FOUND"
        for call in (other.get_adapter(name), other.generate("x", adapters=name), trained(other, name)):
            with pytest.raises(AtelierError, match="INVALID_REQUEST"):
                await call
    assert [a async for a in other.list_adapters()] == []


async def test_one_reads_ones_own_names_without_a_scope(client: Any, service: Service) -> None:
    red = client("red")
    training, events = await trained(red, validation_prompts=["red/otto"])
    assert training.startswith("otto-")
    assert {event.training for event in events} == {training}
    assert events[0].adapter == "otto"
    completed = events[-1]
    assert isinstance(completed, TrainingCompleted)
    assert completed.adapter == "otto@v1@10"
    told = await red.get_training(training)
    assert (told.id, told.adapter, told.recipe["name"]) == (training, "otto", "otto")
    adapter = await red.get_adapter("otto")
    assert (adapter.name, adapter.training) == ("otto", training)
    # What the user wrote is theirs to the letter.
    assert adapter.trigger == told.recipe["instance_prompt"] == "red/otto is what I say"
    assert told.recipe["validation_prompts"] == ("red/otto",)
    assert (await red.load_adapter("otto")).adapter == "otto@v1@10"
    result = await red.generate("x", adapters="otto")
    assert result.receipt.adapters[0].name == "otto"
    with pytest.raises(AlreadyExistsError) as caught:
        await trained(red)
    assert "red/" not in str(caught.value)
    assert caught.value.resource is not None
    assert caught.value.resource.name == "otto"


async def test_a_tenant_is_one_client_to_the_scheduler_from_wherever_it_calls(client: Any) -> None:
    for name, sharer in (("red", "red"), ("default", "ipv4:127.0.0.1")):
        result = await client(name).generate("x")
        assert json.loads(result.images[0].data)["client"] == sharer


async def test_slots_are_told_to_their_owner(client: Any) -> None:
    await trained(client("red"))
    await client("red").load_adapter("otto")
    red, blue = await client("red").server_info(), await client("blue").server_info()
    assert (red.slots.adapters, blue.slots.adapters) == (("otto@v1@10",), ())
    assert red.slots.used == blue.slots.used == 1


async def test_a_request_id_is_ones_own(client: Any) -> None:
    request_id = "11111111-2222-4333-8444-555555555555"
    first = await client("red").generate("secret", request_id=request_id, seed=1)
    with pytest.raises(AlreadyExistsError):
        await client("red").generate("other", request_id=request_id)
    second = await client("blue").generate("other", request_id=request_id, seed=2)
    assert first.images[0].seed != second.images[0].seed
    await trained(client("red"), request_id=request_id)
    training, _ = await trained(client("blue"), "bolt", request_id=request_id)
    assert training.startswith("bolt-")


async def test_imports_belong_to_their_tenant(client: Any, tmp_path: Path) -> None:
    (tmp_path / "guest.safetensors").write_bytes(SAFETENSORS)
    for tenant in ("red", "default"):
        told = await client(tenant).import_adapter(tmp_path / "guest.safetensors", "guest")
        assert told.adapter.name == "guest"
    assert [a async for a in client("blue").list_adapters()] == []


async def test_what_was_made_without_tokens_is_the_default_tenants(
    client: Any, service: Service, start: Start, tmp_path: Path
) -> None:
    await trained(client("default"))
    await trained(client("red"), "bolt")
    assert [a.name async for a in client("default").list_adapters()] == ["otto"]
    assert [t.adapter async for t in client("default").list_trainings()] == ["otto"]
    assert (tmp_path / "data" / "trainings" / "red").is_dir()


async def test_quotas_are_a_tenants_own(start: Start, tokens: Path, tmp_path: Path) -> None:
    with tokens.open("a") as file:
        file.write(
            "[tenant.red]\nmax_images = 2\nmax_trainings = 1\nmax_stored_bytes = 6\n"
            "max_train_steps_per_day = 15\n"
        )
    (tmp_path / "guest.safetensors").write_bytes(SAFETENSORS)
    service = await start(tokens_file=tokens)
    address = f"127.0.0.1:{service.application.port}"

    async def exceeded(call: Any) -> tuple[str, bool]:
        with pytest.raises(ResourceExhaustedError) as caught:
            await call
        assert caught.value.reason == "QUOTA_EXCEEDED"
        return caught.value.metadata["quota"], caught.value.retry_after is not None

    async with (
        AsyncClient(address, token=TOKENS["red"]) as red,
        AsyncClient(address, token=TOKENS["blue"]) as blue,
    ):
        assert await exceeded(red.generate("x", num_images=3)) == ("max_images", False)
        assert len((await red.generate("x", num_images=2)).images) == 2
        assert len((await blue.generate("x", num_images=3)).images) == 3
        adopt = red.import_adapter(tmp_path / "guest.safetensors", "guest")
        assert await exceeded(adopt) == ("max_stored_bytes", False)
        await blue.import_adapter(tmp_path / "guest.safetensors", "guest")
        training, _ = await trained(red)
        await red.delete_training(training)  # does not give the day's steps back
        await red.delete_adapter("otto")
        assert await exceeded(trained(red)) == ("max_train_steps_per_day", True)
        held = red.train("held", **{**RECIPE, "instance_prompt": "hold", "max_train_steps": 5})
        await anext(aiter(held))
        assert await exceeded(trained(red, "more", max_train_steps=1)) == ("max_trainings", True)
        await trained(blue, max_train_steps=20)


async def test_a_tenant_with_a_crowd_keeps_no_other_out(start: Start, tokens: Path) -> None:
    service = await start(tokens_file=tokens, limits=Limits(max_queued_trainings=1))
    address = f"127.0.0.1:{service.application.port}"
    async with (
        AsyncClient(address, token=TOKENS["red"]) as red,
        AsyncClient(address, token=TOKENS["blue"]) as blue,
    ):
        await anext(aiter(red.train("held", **{**RECIPE, "instance_prompt": "hold"})))
        with pytest.raises(ResourceExhaustedError, match="QUEUE_FULL"):
            await trained(red, "more")
        await trained(blue)


async def test_a_call_that_is_nobodys_is_logged_as_nobodys(
    service: Service, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "atelier_server.rpc.interceptors")
    with pytest.raises(UnauthenticatedError):
        async with AsyncClient(f"127.0.0.1:{service.application.port}", token="x" * 40) as stranger:
            await stranger.server_info()
    await client("red").server_info()
    told = [record for record in caplog.records if record.message == "call ended"]
    assert [getattr(record, "tenant", None) for record in told] == [None, "red"]
