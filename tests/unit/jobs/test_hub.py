"""Adapters from the hub's cache, without a network; what is fetched with one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import huggingface_hub.constants
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from atelier_server.errors import AdapterNotFound, InvalidRequest, Unavailable, UnsupportedFormat
from atelier_server.jobs import hub


class FakeHub:
    """A repository that may be unreachable, and the cache that downloads from it fill."""

    def __init__(self, folder: Path, files: Mapping[str, int]) -> None:
        self.folder = folder
        self.files = files
        self.reachable = True
        self.error: Exception = OfflineModeIsEnabled("no network")
        self.gated = False
        self.fetched: list[str] | None = None
        self.tokens: list[bool | None] = []

    def model_info(self, repository: str, *, token: bool | None, **_: Any) -> Any:
        self.tokens.append(token)
        if not self.reachable:
            raise self.error
        return SimpleNamespace(
            gated=self.gated,
            siblings=[SimpleNamespace(rfilename=name, size=size) for name, size in self.files.items()],
        )

    def snapshot_download(
        self,
        repository: str,
        *,
        allow_patterns: list[str] | None = None,
        local_files_only: bool = False,
        **_: Any,
    ) -> str:
        if local_files_only:
            if not self.folder.exists():
                raise LocalEntryNotFoundError("not cached")
            return str(self.folder)
        self.fetched = allow_patterns
        for name in allow_patterns or ():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(b"x" * self.files[name])
        return str(self.folder)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    files = {
        "README.md": 9,
        "pytorch_lora_weights.safetensors": 100,
        "toy_emb.safetensors": 10,
        "other.safetensors": 1000,
    }
    fake = FakeHub(tmp_path / "snapshot", files)
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    monkeypatch.setattr(hub, "snapshot_download", fake.snapshot_download)
    return fake


async def test_only_the_adapter_is_fetched(repository: FakeHub) -> None:
    found = await hub.fetch("someone/toy", 1000)
    assert repository.fetched == ["pytorch_lora_weights.safetensors", "toy_emb.safetensors"]
    assert (found.path, found.size_bytes) == (repository.folder, 110)
    found = await hub.fetch("someone/toy/other.safetensors@main", 1000)
    assert (found.path.name, found.size_bytes) == ("other.safetensors", 1000)


async def test_a_tenant_sees_what_everybody_sees(repository: FakeHub) -> None:
    await hub.fetch("someone/toy", 1000, private=False)
    await hub.fetch("someone/toy", 1000)
    assert repository.tokens == [False, None]
    repository.reachable = False  # the cache may hold what the operator alone may read
    with pytest.raises(Unavailable, match="cannot be asked"):
        await hub.fetch("someone/toy", 1000, private=False)


async def test_a_tenant_gets_nothing_that_the_operator_had_to_ask_for(repository: FakeHub) -> None:
    repository.gated = True
    await hub.fetch("someone/toy", 1000)
    with pytest.raises(AdapterNotFound, match="that this server may read"):
        await hub.fetch("someone/toy", 1000, private=False)


async def test_a_network_that_fails_is_no_error_of_ours(repository: FakeHub) -> None:
    await hub.fetch("someone/toy", 1000)
    repository.reachable, repository.error = False, httpx2.ConnectError("no route to host")
    assert (await hub.fetch("someone/toy", 1000)).size_bytes == 110
    with pytest.raises(Unavailable, match="cannot be asked"):
        await hub.fetch("someone/toy", 1000, private=False)


async def test_too_much_is_refused_before_it_is_fetched(repository: FakeHub) -> None:
    with pytest.raises(InvalidRequest, match="110 bytes are more than 100"):
        await hub.fetch("someone/toy", 100)
    assert repository.fetched is None


async def test_the_cache_does_without_a_network(repository: FakeHub) -> None:
    await hub.fetch("someone/toy", 1000)
    repository.reachable = False
    assert (await hub.fetch("someone/toy", 1000)).size_bytes == 110
    with pytest.raises(InvalidRequest):
        await hub.fetch("someone/toy", 100)
    with pytest.raises(AdapterNotFound):
        await hub.fetch("someone/toy/missing.safetensors", 1000)


async def test_what_is_not_there_is_told(repository: FakeHub) -> None:
    with pytest.raises(AdapterNotFound, match=r"someone/toy/no\.safetensors"):
        await hub.fetch("someone/toy/no.safetensors", 1000)
    repository.files = {"README.md": 1}
    with pytest.raises(UnsupportedFormat, match=r"README\.md"):
        await hub.fetch("someone/toy", 1000)
    repository.reachable = False
    with pytest.raises(Unavailable, match="not in the cache"):
        await hub.fetch("someone/toy", 1000)


async def test_the_real_cache_is_read_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout that huggingface_hub itself leaves on a disk."""
    root = tmp_path / "models--someone--toy"
    (root / "snapshots" / "abc").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc")
    (root / "snapshots" / "abc" / "toy.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found = await hub.fetch("someone/toy", 1000)
    assert (found.path / "toy.safetensors").read_bytes() == b"weights"
