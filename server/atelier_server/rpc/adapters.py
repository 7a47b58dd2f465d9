"""AdapterService: decode, ask the wardrobe, encode."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

from atelier.v1 import adapter_pb2 as pb
from atelier.v1 import adapter_pb2_grpc
from atelier_server.config import Limits
from atelier_server.core import AdapterRef
from atelier_server.errors import InvalidRequest, Violation
from atelier_server.jobs.craft import Craft
from atelier_server.jobs.hub import fetch
from atelier_server.jobs.wardrobe import Wardrobe
from atelier_server.rpc import caller
from atelier_server.rpc.codec.adapter import (
    decode_deletion,
    decode_export,
    decode_import,
    decode_reference,
    decode_upload,
    encode_report,
)
from atelier_server.rpc.codec.craft import (
    decode_diff,
    decode_extract,
    decode_merge,
    encode_diff,
    encode_extraction,
)
from atelier_server.rpc.codec.generated import CHUNK_BYTES
from atelier_server.rpc.codec.listing import (
    decode_list,
    decode_note,
    decode_tag,
    decode_untag,
    encode_listed,
    encode_target,
)
from atelier_server.rpc.codec.times import timestamp
from atelier_server.rpc.interceptors import Context
from atelier_server.rpc.receive import receive_file


class AdapterServicer(adapter_pb2_grpc.AdapterServiceServicer):
    def __init__(self, wardrobe: Wardrobe, craft: Craft, limits: Limits) -> None:
        self._wardrobe = wardrobe
        self._craft = craft
        self._limits = limits

    async def ListAdapters(
        self, request: pb.ListAdaptersRequest, context: Context
    ) -> pb.ListAdaptersResponse:
        page = decode_list(request, caller.scope().tenant)
        found, last = await asyncio.to_thread(
            self._wardrobe.listing.page, page.query, page.after, page.size, thumbnails=page.thumbnails
        )
        return pb.ListAdaptersResponse(
            adapters=[encode_listed(listed) for listed in found], next_page_token=page.token(last)
        )

    async def GetAdapter(self, request: pb.GetAdapterRequest, context: Context) -> pb.GetAdapterResponse:
        listed = await self._wardrobe.show(decode_reference(request.adapter))
        adapter = encode_listed(listed, recipe=True)
        if (report := await self._wardrobe.report(listed.version)) is not None:
            adapter.report.CopyFrom(encode_report(report))
        return pb.GetAdapterResponse(adapter=adapter)

    async def LoadAdapter(self, request: pb.LoadAdapterRequest, context: Context) -> pb.LoadAdapterResponse:
        checkpoint, loaded = await self._wardrobe.load(decode_reference(request.adapter), pin=request.pin)
        return pb.LoadAdapterResponse(adapter=str(checkpoint), loaded=loaded)

    async def UnloadAdapter(
        self, request: pb.UnloadAdapterRequest, context: Context
    ) -> pb.UnloadAdapterResponse:
        unloaded = await self._wardrobe.unload(decode_reference(request.adapter))
        return pb.UnloadAdapterResponse(unloaded=unloaded)

    async def DeleteAdapter(
        self, request: pb.DeleteAdapterRequest, context: Context
    ) -> pb.DeleteAdapterResponse:
        expires = await self._wardrobe.delete(*decode_deletion(request.adapter))
        return pb.DeleteAdapterResponse(expire_time=timestamp(expires))

    async def UndeleteAdapter(
        self, request: pb.UndeleteAdapterRequest, context: Context
    ) -> pb.UndeleteAdapterResponse:
        found = await self._wardrobe.undelete(*decode_deletion(request.adapter))
        return pb.UndeleteAdapterResponse(adapters=[encode_listed(listed) for listed in found])

    async def TagAdapter(self, request: pb.TagAdapterRequest, context: Context) -> pb.TagAdapterResponse:
        listed, was = await self._wardrobe.tag(*decode_tag(request))
        return pb.TagAdapterResponse(adapter=encode_listed(listed), previous=encode_target(was))

    async def UntagAdapter(
        self, request: pb.UntagAdapterRequest, context: Context
    ) -> pb.UntagAdapterResponse:
        was = await self._wardrobe.untag(*decode_untag(request))
        return pb.UntagAdapterResponse(previous=encode_target(was))

    async def AnnotateAdapter(
        self, request: pb.AnnotateAdapterRequest, context: Context
    ) -> pb.AnnotateAdapterResponse:
        listed = await self._wardrobe.annotate(*decode_note(request))
        return pb.AnnotateAdapterResponse(adapter=encode_listed(listed))

    async def ImportAdapter(
        self, request_iterator: AsyncIterator[pb.ImportAdapterRequest], context: Context
    ) -> pb.ImportAdapterResponse:
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("payload") != "metadata":
            raise InvalidRequest.of([Violation("metadata", "must be the first message")])
        metadata = first.metadata
        name, terms = decode_import(metadata, self._limits)
        await self._wardrobe.check_name(name, new_version=metadata.new_version)
        with self._wardrobe.uploads.turn(caller.tenant().name):
            async with self._source(request_iterator, metadata) as source:
                listed, answer = await self._wardrobe.adopt(
                    source, name, new_version=metadata.new_version, terms=terms
                )
        return pb.ImportAdapterResponse(
            adapter=encode_listed(listed),
            detected_format=answer.report.format,
            matched_modules=len(answer.report.matched),
            report=encode_report(answer.report),
        )

    async def QueryUpload(self, request: pb.QueryUploadRequest, context: Context) -> pb.QueryUploadResponse:
        sha256, size_bytes = decode_upload(request, self._limits)
        partial = self._wardrobe.uploads.partial
        await asyncio.to_thread(partial.expire)
        return pb.QueryUploadResponse(offset=partial.held(caller.tenant().name, sha256, size_bytes))

    @asynccontextmanager
    async def _source(
        self,
        stream: AsyncIterator[pb.ImportAdapterRequest],
        metadata: pb.ImportAdapterRequest.Metadata,
    ) -> AsyncIterator[Path]:
        """What is to be imported, as a file or folder that is there for the block."""
        if metadata.hub_id:
            # The server's access to the hub is its operator's, not every tenant's.
            private = not caller.tenant().scope.tenant
            found = await fetch(metadata.hub_id, self._limits.max_adapter_bytes, private=private)
            async with self._wardrobe.space(caller.tenant(), found.size_bytes):
                yield found.path
            return
        uploads, tenant = self._wardrobe.uploads, caller.tenant()
        path = uploads.file()
        try:
            async with self._wardrobe.space(tenant, metadata.size_bytes):
                upload = (tenant.name, metadata.sha256, metadata.size_bytes)
                with uploads.partial.claim(*upload, metadata.offset) as partial:
                    await receive_file(stream, metadata, partial)
                    partial.rename(path)
                files = [(file.name, file.size_bytes) for file in metadata.files]
                yield await asyncio.to_thread(self._wardrobe.uploads.unpack, path, files) if files else path
        finally:
            path.unlink(missing_ok=True)
            await asyncio.to_thread(shutil.rmtree, path.with_suffix(""), ignore_errors=True)

    async def ExportAdapter(
        self, request: pb.ExportAdapterRequest, context: Context
    ) -> AsyncIterator[pb.ExportAdapterResponse]:
        ref, layout = decode_export(request)
        async with self._wardrobe.exported(ref, layout) as (checkpoint, answer):
            yield pb.ExportAdapterResponse(
                metadata=pb.ExportAdapterResponse.Metadata(
                    adapter=str(AdapterRef(checkpoint.name, str(checkpoint.step))),
                    size_bytes=answer.size_bytes,
                    sha256=answer.sha256,
                )
            )
            async for chunk in _chunks(Path(answer.path)):
                yield pb.ExportAdapterResponse(chunk=chunk)

    async def MergeAdapters(
        self, request: pb.MergeAdaptersRequest, context: Context
    ) -> pb.MergeAdaptersResponse:
        refs, target, rank = decode_merge(request, self._limits)
        listed, kept = await self._craft.merge(caller.tenant(), refs, target, rank)
        return pb.MergeAdaptersResponse(adapter=encode_listed(listed), kept=kept)

    async def ExtractAdapter(
        self, request: pb.ExtractAdapterRequest, context: Context
    ) -> AsyncIterator[pb.ExtractAdapterResponse]:
        tenant = caller.tenant()
        target = decode_extract(request, self._limits, tenant)
        extraction = self._craft.extract(tenant, request.tuned, request.base, target, request.rank)
        async with aclosing(extraction):
            async for told in extraction:
                yield encode_extraction(told)

    async def DiffAdapters(
        self, request: pb.DiffAdaptersRequest, context: Context
    ) -> pb.DiffAdaptersResponse:
        return encode_diff(*await self._craft.diff(*decode_diff(request)))


async def _chunks(path: Path) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
            yield chunk
