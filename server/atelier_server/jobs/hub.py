"""Adapters from the Hugging Face hub: the files of a repository, from its cache or over the network."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from atelier_server.adapters.folder import adapter_files
from atelier_server.errors import AdapterNotFound, InvalidRequest, Unavailable, Violation


@dataclass(frozen=True, slots=True)
class Fetched:
    """A folder or file in the hub's cache on this machine, and what it takes there."""

    path: Path
    size_bytes: int


async def fetch(hub_id: str, max_bytes: int, *, private: bool = True) -> Fetched:
    """OWNER/NAME[/PATH][@REVISION]. What the server's own token and cache may see, unless not `private`.

    Only the adapter's own files are fetched. Without a network the cache alone is asked. Raises
    AdapterNotFound, UnsupportedFormat, InvalidRequest for more than `max_bytes`, Unavailable.
    """
    path = await asyncio.to_thread(_fetch, hub_id, max_bytes, private)
    files = adapter_files(_names(path)) if path.is_dir() else [""]
    size = sum((path / name).stat().st_size for name in files)
    if size > max_bytes:
        raise InvalidRequest.of([Violation("metadata.hub_id", f"{size} bytes are more than {max_bytes}")])
    return Fetched(path, size)


def _fetch(hub_id: str, max_bytes: int, private: bool) -> Path:
    place, _, revision = hub_id.partition("@")
    owner, name, *rest = place.split("/", 2)
    repository, path = f"{owner}/{name}", "".join(rest)
    token = None if private else False  # None: huggingface_hub's own
    try:
        files = _choose(_sizes(repository, revision, token), path, max_bytes)  # before a byte is fetched
        folder = snapshot_download(repository, revision=revision or None, allow_patterns=files, token=token)
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError, HFValidationError) as error:
        raise _missing(hub_id) from error
    except (httpx2.HTTPError, OfflineModeIsEnabled, OSError) as error:
        if not private:
            raise Unavailable(f"the hub cannot be asked for {hub_id} now") from error
        return _cached(repository, revision, path, hub_id)
    return Path(folder) / path


def _sizes(repository: str, revision: str, token: bool | None) -> Mapping[str, int]:
    """Every file of a repository. Without the server's own token, of one that everybody may read."""
    info = HfApi().model_info(
        repository, revision=revision or None, files_metadata=True, timeout=30, token=token
    )
    if token is False and info.gated:
        # Its files may lie in the cache: downloaded with the token that is not to be used now.
        raise _missing(repository)
    return {file.rfilename: file.size or 0 for file in info.siblings or []}


def _choose(sizes: Mapping[str, int], path: str, max_bytes: int) -> list[str]:
    """The files to fetch: the one at `path`, or those that make the adapter of the repository."""
    if path and path not in sizes:
        raise EntryNotFoundError(path)
    files = [path] if path else adapter_files(sizes)
    total = sum(sizes[name] for name in files)
    if total > max_bytes:
        raise InvalidRequest.of([Violation("metadata.hub_id", f"{total} bytes are more than {max_bytes}")])
    return files


def _cached(repository: str, revision: str, path: str, hub_id: str) -> Path:
    """What an earlier download left."""
    try:
        found = Path(snapshot_download(repository, revision=revision or None, local_files_only=True)) / path
    except LocalEntryNotFoundError as error:
        raise Unavailable(f"{hub_id} is not in the cache, and the hub cannot be reached") from error
    if not found.exists():
        raise _missing(hub_id)
    return found


def _missing(hub_id: str) -> AdapterNotFound:
    return AdapterNotFound(f"the hub has no {hub_id!r} that this server may read", name=hub_id)


def _names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
