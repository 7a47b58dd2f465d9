"""The adapters of a server, for both transports: part of Client and AsyncClient."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import grpc

from atelier import codec
from atelier.errors import UnimplementedError, from_rpc
from atelier.fields import AdapterFormat, ImportFields, ListFields
from atelier.records import Adapter, ExportedAdapter, ImportedAdapter, LoadedAdapter
from atelier.transfer import ExportFile
from atelier.v1 import adapter_pb2 as pb
from atelier.v1.adapter_pb2_grpc import AdapterServiceStub
from atelier.wire import decode

if TYPE_CHECKING:
    from atelier.v1.adapter_pb2_grpc import AdapterServiceAsyncStub


class AdapterCalls:
    """What Client does with adapters. References are NAME, NAME@STEP or NAME@TAG."""

    _adapters: AdapterServiceStub
    _call: Any

    def list_adapters(self, **fields: Unpack[ListFields]) -> Iterator[Adapter]:
        """Every adapter's newest version by name, unless the fields say otherwise."""
        request = codec.list_request(fields)
        while True:
            page = self._call(self._adapters.ListAdapters, request)
            yield from (decode(Adapter, adapter) for adapter in page.adapters)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def get_adapter(self, adapter: str) -> Adapter:
        request = pb.GetAdapterRequest(adapter=adapter)
        return decode(Adapter, self._call(self._adapters.GetAdapter, request).adapter)

    def load_adapter(self, adapter: str, *, pin: bool = False) -> LoadedAdapter:
        """Copies a checkpoint into a device slot before it is asked for; `pin`: until it is unloaded."""
        request = pb.LoadAdapterRequest(adapter=adapter, pin=pin)
        return decode(LoadedAdapter, self._call(self._adapters.LoadAdapter, request))

    def unload_adapter(self, adapter: str) -> int:
        """Frees its slots; how many those were."""
        request = pb.UnloadAdapterRequest(adapter=adapter)
        return int(self._call(self._adapters.UnloadAdapter, request).unloaded)

    def delete_adapter(self, adapter: str) -> datetime | None:
        """All versions of NAME, or one: NAME@vN. Until when `undelete_adapter` brings them back."""
        request = pb.DeleteAdapterRequest(adapter=adapter)
        return codec.time_of(self._call(self._adapters.DeleteAdapter, request), "expire_time")

    def undelete_adapter(self, adapter: str) -> tuple[Adapter, ...]:
        """Brings back what has been deleted: all versions of NAME, or NAME@vN."""
        request = pb.UndeleteAdapterRequest(adapter=adapter)
        response = self._call(self._adapters.UndeleteAdapter, request)
        return tuple(decode(Adapter, found) for found in response.adapters)

    def tag_adapter(self, adapter: str, tag: str, *, expected: str | None = None) -> str:
        """Puts a tag on a checkpoint, or moves it there; what it was on, as vN@STEP, "" if it was not set.

        With `expected` (in the same words) only if it is on that now, else AbortedError.
        """
        request = pb.TagAdapterRequest(adapter=adapter, tag=tag, expected=expected)
        return str(self._call(self._adapters.TagAdapter, request).previous)

    def untag_adapter(self, name: str, tag: str, *, expected: str | None = None) -> str:
        """Takes a tag of adapter NAME away; what it was on."""
        request = pb.UntagAdapterRequest(adapter=name, tag=tag, expected=expected)
        return str(self._call(self._adapters.UntagAdapter, request).previous)

    def annotate_adapter(self, adapter: str, note: str) -> Adapter:
        """Writes a note on a version, in place of the one before; an empty one removes it."""
        request = pb.AnnotateAdapterRequest(adapter=adapter, note=note)
        return decode(Adapter, self._call(self._adapters.AnnotateAdapter, request).adapter)

    def import_adapter(
        self, source: str | Path, name: str, **values: Unpack[ImportFields]
    ) -> ImportedAdapter:
        """Publishes another tool's adapter: a safetensors file, a folder, or a hub's "OWNER/NAME[/PATH]".

        An upload that was interrupted goes on where it was.
        """
        what = codec.AdapterImport(source, name, values)
        offset = self._held(what.query())
        try:
            return decode(ImportedAdapter, self._adapters.ImportAdapter(what.requests(offset)))
        except grpc.RpcError as error:
            raise from_rpc(error) from error

    def _held(self, query: pb.QueryUploadRequest | None) -> int:
        try:
            return int((self._call(self._adapters.QueryUpload, query)).offset) if query else 0
        except UnimplementedError:
            return 0  # an older server

    def export_adapter(
        self, adapter: str, path: str | Path, format: AdapterFormat = "diffusers"
    ) -> ExportedAdapter:
        """Writes a checkpoint to `path`; the file appears only when it is whole."""
        request = codec.export_request(adapter, format)
        try:
            with ExportFile(path) as file:
                for response in self._adapters.ExportAdapter(request):
                    file.add(response)
                return file.finish()
        except grpc.RpcError as error:
            raise from_rpc(error) from error


class AsyncAdapterCalls:
    """The same with `await`."""

    _adapters: AdapterServiceAsyncStub
    _call: Any

    async def list_adapters(self, **fields: Unpack[ListFields]) -> AsyncIterator[Adapter]:
        """Every adapter's newest version by name, unless the fields say otherwise."""
        request = codec.list_request(fields)
        while True:
            page = await self._call(self._adapters.ListAdapters, request)
            for adapter in page.adapters:
                yield decode(Adapter, adapter)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def get_adapter(self, adapter: str) -> Adapter:
        request = pb.GetAdapterRequest(adapter=adapter)
        return decode(Adapter, (await self._call(self._adapters.GetAdapter, request)).adapter)

    async def load_adapter(self, adapter: str, *, pin: bool = False) -> LoadedAdapter:
        """Copies a checkpoint into a device slot before it is asked for; `pin`: until it is unloaded."""
        request = pb.LoadAdapterRequest(adapter=adapter, pin=pin)
        loaded = await self._call(self._adapters.LoadAdapter, request)
        return decode(LoadedAdapter, loaded)

    async def unload_adapter(self, adapter: str) -> int:
        """Frees its slots; how many those were."""
        request = pb.UnloadAdapterRequest(adapter=adapter)
        return int((await self._call(self._adapters.UnloadAdapter, request)).unloaded)

    async def delete_adapter(self, adapter: str) -> datetime | None:
        """All versions of NAME, or one: NAME@vN. Until when `undelete_adapter` brings them back."""
        request = pb.DeleteAdapterRequest(adapter=adapter)
        return codec.time_of(await self._call(self._adapters.DeleteAdapter, request), "expire_time")

    async def undelete_adapter(self, adapter: str) -> tuple[Adapter, ...]:
        """Brings back what has been deleted: all versions of NAME, or NAME@vN."""
        request = pb.UndeleteAdapterRequest(adapter=adapter)
        response = await self._call(self._adapters.UndeleteAdapter, request)
        return tuple(decode(Adapter, found) for found in response.adapters)

    async def tag_adapter(self, adapter: str, tag: str, *, expected: str | None = None) -> str:
        """Puts a tag on a checkpoint, or moves it there; what it was on, as vN@STEP, "" if it was not set.

        With `expected` (in the same words) only if it is on that now, else AbortedError.
        """
        request = pb.TagAdapterRequest(adapter=adapter, tag=tag, expected=expected)
        return str((await self._call(self._adapters.TagAdapter, request)).previous)

    async def untag_adapter(self, name: str, tag: str, *, expected: str | None = None) -> str:
        """Takes a tag of adapter NAME away; what it was on."""
        request = pb.UntagAdapterRequest(adapter=name, tag=tag, expected=expected)
        return str((await self._call(self._adapters.UntagAdapter, request)).previous)

    async def annotate_adapter(self, adapter: str, note: str) -> Adapter:
        """Writes a note on a version, in place of the one before; an empty one removes it."""
        request = pb.AnnotateAdapterRequest(adapter=adapter, note=note)
        return decode(Adapter, (await self._call(self._adapters.AnnotateAdapter, request)).adapter)

    async def import_adapter(
        self, source: str | Path, name: str, **values: Unpack[ImportFields]
    ) -> ImportedAdapter:
        """Publishes another tool's adapter: a safetensors file, a folder, or a hub's "OWNER/NAME[/PATH]".

        An upload that was interrupted goes on where it was.
        """
        what = codec.AdapterImport(source, name, values)
        offset = await self._held(what.query())
        try:
            return decode(ImportedAdapter, await self._adapters.ImportAdapter(what.requests(offset)))
        except grpc.RpcError as error:
            raise from_rpc(error) from error

    async def _held(self, query: pb.QueryUploadRequest | None) -> int:
        try:
            return int((await self._call(self._adapters.QueryUpload, query)).offset) if query else 0
        except UnimplementedError:
            return 0  # an older server

    async def export_adapter(
        self, adapter: str, path: str | Path, format: AdapterFormat = "diffusers"
    ) -> ExportedAdapter:
        """Writes a checkpoint to `path`; the file appears only when it is whole."""
        request = codec.export_request(adapter, format)
        try:
            with ExportFile(path) as file:
                async for response in self._adapters.ExportAdapter(request):
                    file.add(response)
                return file.finish()
        except grpc.RpcError as error:
            raise from_rpc(error) from error
