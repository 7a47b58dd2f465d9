"""Merging, extracting and comparing adapters: requests and answers."""

from __future__ import annotations

import re
from dataclasses import replace

from atelier.v1 import adapter_pb2 as pb
from atelier_server.access.tenants import Tenant
from atelier_server.config import Limits
from atelier_server.core import AdapterRef, AdapterUse
from atelier_server.jobs.listing import Listed
from atelier_server.report import AdapterComparison, BlockComparison, PublishAs
from atelier_server.rpc.codec.checks import Checks, shown
from atelier_server.rpc.codec.listing import encode_listed

_MOST_ADAPTERS = 32
_LONGEST_REFERENCE = 1000
# What a tenant may name: the embedded model, or one of the hub.
_PUBLIC = re.compile(r"pocket|(?!.*(?:\.\.|\.safetensors$))\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)


def decode_merge(
    request: pb.MergeAdaptersRequest, limits: Limits
) -> tuple[tuple[AdapterRef, ...], PublishAs, int | None]:
    """Which, as what, to which rank. Raises InvalidRequest with every violation."""
    checks = Checks()
    if not 1 <= len(request.adapters) <= _MOST_ADAPTERS:
        checks.refuse("adapters", f"{len(request.adapters)} are not between 1 and {_MOST_ADAPTERS}")
    refs = [
        checks.reference(f"adapters[{number}]", text, weight=True)
        for number, text in enumerate(request.adapters[:_MOST_ADAPTERS])
    ]
    rank = request.rank if request.HasField("rank") else None
    if rank is not None:
        checks.integer("rank", rank, 1, limits.max_lora_rank)
    target = _target(checks, request, limits)
    checks.done()
    return _summed([ref for ref in refs if ref is not None]), target, rank


def decode_extract(request: pb.ExtractAdapterRequest, limits: Limits, tenant: Tenant) -> PublishAs:
    """As what. Raises InvalidRequest with every violation."""
    checks = Checks()
    checks.integer("rank", request.rank, 1, limits.max_lora_rank)
    for field, reference in (("tuned", request.tuned), ("base", request.base)):
        checks.text(field, reference, _LONGEST_REFERENCE, empty=field == "base")
        # The files of the server's machine are its operator's, who is the only tenant or has none.
        if tenant.scope.tenant and reference and not _PUBLIC.fullmatch(reference):
            checks.refuse(field, f"{shown(reference)} is no hub id such as OWNER/NAME")
    target = _target(checks, request, limits)
    checks.done()
    return target


def decode_diff(request: pb.DiffAdaptersRequest) -> tuple[AdapterRef, AdapterRef]:
    checks = Checks()
    a, b = checks.reference("a", request.a), checks.reference("b", request.b)
    checks.done()
    return a or AdapterRef(""), b or AdapterRef("")


def encode_extraction(told: tuple[int, int] | tuple[Listed, float]) -> pb.ExtractAdapterResponse:
    first, second = told
    if isinstance(first, Listed):
        completed = pb.ExtractAdapterResponse.Completed(adapter=encode_listed(first), kept=second)
        return pb.ExtractAdapterResponse(completed=completed)
    progress = pb.ExtractAdapterResponse.Progress(layer=first, total=int(second))
    return pb.ExtractAdapterResponse(progress=progress)


def encode_diff(a: AdapterUse, b: AdapterUse, comparison: AdapterComparison) -> pb.DiffAdaptersResponse:
    message = pb.DiffAdaptersResponse
    return message(
        a=str(a.checkpoint),
        b=str(b.checkpoint),
        only_a=comparison.only_a,
        only_b=comparison.only_b,
        common=comparison.common,
        differing=[
            message.Module(
                name=module.name,
                kind_a=module.kind_a,
                rank_a=module.rank_a,
                alpha_a=module.alpha_a,
                kind_b=module.kind_b,
                rank_b=module.rank_b,
                alpha_b=module.alpha_b,
            )
            for module in comparison.differing
        ],
        blocks=[_encode_block(block) for block in comparison.blocks],
        whole=_encode_block(comparison.whole),
    )


def _encode_block(block: BlockComparison) -> pb.DiffAdaptersResponse.Block:
    return pb.DiffAdaptersResponse.Block(
        block=block.block,
        norm_a=block.norm_a,
        norm_b=block.norm_b,
        norm_difference=block.norm_difference,
        cosine=block.cosine,
    )


def _target(
    checks: Checks, request: pb.MergeAdaptersRequest | pb.ExtractAdapterRequest, limits: Limits
) -> PublishAs:
    checks.text("trigger", request.trigger, limits.max_prompt_characters)
    return PublishAs(checks.name("name", request.name), request.new_version, request.trigger)


def _summed(refs: list[AdapterRef]) -> tuple[AdapterRef, ...]:
    """Each checkpoint once, with its weights added."""
    summed: dict[tuple[str, str], AdapterRef] = {}
    for ref in refs:
        key = (ref.name, ref.selector)
        before = summed[key].weight if key in summed else 0.0
        summed[key] = replace(ref, weight=before + ref.weight)
    return tuple(summed.values())
