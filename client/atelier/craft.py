"""New adapters out of others or out of tuned models, for both transports: part of Client and AsyncClient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import grpc

from atelier.errors import InternalError, from_rpc
from atelier.records import AdapterDiff, ExtractedAdapter, MergedAdapter
from atelier.v1 import adapter_pb2 as pb
from atelier.v1.adapter_pb2_grpc import AdapterServiceStub
from atelier.wire import decode

if TYPE_CHECKING:
    from atelier.v1.adapter_pb2_grpc import AdapterServiceAsyncStub

Progress = Callable[[int, int], None]


class CraftCalls:
    """What Client makes of adapters."""

    _adapters: AdapterServiceStub
    _call: Any

    def merge_adapters(
        self,
        adapters: Sequence[str],
        name: str,
        *,
        rank: int | None = None,
        new_version: bool = False,
        trigger: str = "",
    ) -> MergedAdapter:
        """Publishes the sum of NAME[@STEP|@TAG|@vN@STEP][:WEIGHT]: exactly, or the nearest of `rank`."""
        request = pb.MergeAdaptersRequest(
            adapters=adapters, name=name, rank=rank, new_version=new_version, trigger=trigger
        )
        try:  # it takes as long as it takes, like an import
            return decode(MergedAdapter, self._adapters.MergeAdapters(request))
        except grpc.RpcError as error:
            raise from_rpc(error) from error

    def extract_adapter(
        self,
        tuned: str,
        name: str,
        rank: int,
        *,
        base: str = "",
        new_version: bool = False,
        trigger: str = "",
        progress: Progress | None = None,
    ) -> ExtractedAdapter:
        """Publishes the difference of a tuned model and its base (default: the server's), to `rank`.

        `progress` hears the layers done and how many there are.
        """
        request = pb.ExtractAdapterRequest(
            tuned=tuned, base=base, name=name, rank=rank, new_version=new_version, trigger=trigger
        )
        call = self._adapters.ExtractAdapter(request)
        try:
            for response in call:
                if (extracted := _heard(response, progress)) is not None:
                    return extracted
        except grpc.RpcError as error:
            raise from_rpc(error) from error
        finally:
            call.cancel()
        raise _cut_off()

    def diff_adapters(self, a: str, b: str) -> AdapterDiff:
        """Two checkpoints side by side."""
        return decode(AdapterDiff, self._call(self._adapters.DiffAdapters, pb.DiffAdaptersRequest(a=a, b=b)))


class AsyncCraftCalls:
    """The same with `await`."""

    _adapters: AdapterServiceAsyncStub
    _call: Any

    async def merge_adapters(
        self,
        adapters: Sequence[str],
        name: str,
        *,
        rank: int | None = None,
        new_version: bool = False,
        trigger: str = "",
    ) -> MergedAdapter:
        """Publishes the sum of NAME[@STEP|@TAG|@vN@STEP][:WEIGHT]: exactly, or the nearest of `rank`."""
        request = pb.MergeAdaptersRequest(
            adapters=adapters, name=name, rank=rank, new_version=new_version, trigger=trigger
        )
        try:
            return decode(MergedAdapter, await self._adapters.MergeAdapters(request))
        except grpc.RpcError as error:
            raise from_rpc(error) from error

    async def extract_adapter(
        self,
        tuned: str,
        name: str,
        rank: int,
        *,
        base: str = "",
        new_version: bool = False,
        trigger: str = "",
        progress: Progress | None = None,
    ) -> ExtractedAdapter:
        """Publishes the difference of a tuned model and its base (default: the server's), to `rank`.

        `progress` hears the layers done and how many there are.
        """
        request = pb.ExtractAdapterRequest(
            tuned=tuned, base=base, name=name, rank=rank, new_version=new_version, trigger=trigger
        )
        call = self._adapters.ExtractAdapter(request)
        try:
            async for response in call:
                if (extracted := _heard(response, progress)) is not None:
                    return extracted
        except grpc.RpcError as error:
            raise from_rpc(error) from error
        finally:
            call.cancel()
        raise _cut_off()

    async def diff_adapters(self, a: str, b: str) -> AdapterDiff:
        """Two checkpoints side by side."""
        request = pb.DiffAdaptersRequest(a=a, b=b)
        return decode(AdapterDiff, await self._call(self._adapters.DiffAdapters, request))


def _heard(response: pb.ExtractAdapterResponse, progress: Progress | None) -> ExtractedAdapter | None:
    if response.WhichOneof("payload") == "completed":
        return decode(ExtractedAdapter, response.completed)
    if progress is not None:
        progress(response.progress.layer, response.progress.total)
    return None


def _cut_off() -> InternalError:
    return InternalError("the server ended the stream without a result")
