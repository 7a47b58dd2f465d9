"""Lists of adapters and their labels: requests to queries, versions to messages."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from atelier.v1 import adapter_pb2 as pb
from atelier.v1 import training_pb2
from atelier_server.adapters.labels import TAG, Expect
from atelier_server.adapters.records import VersionMeta
from atelier_server.core import AdapterRef, CheckpointId
from atelier_server.jobs.listing import Listed, Order, Position, Query, Tier
from atelier_server.rpc.codec import pages
from atelier_server.rpc.codec.checks import Checks, shown
from atelier_server.rpc.codec.times import timestamp

_PAGE_WITH_PICTURES = 100
_NOTE_CHARACTERS = 10_000
_FILTER_CHARACTERS = 200
_TIERS = {
    Tier.DEVICE: pb.ADAPTER_TIER_DEVICE,
    Tier.HOST: pb.ADAPTER_TIER_HOST,
    Tier.DISK: pb.ADAPTER_TIER_DISK,
    Tier.REMOTE: pb.ADAPTER_TIER_REMOTE,
}
_KEYS: dict[Order, type] = {Order.NAME: str, Order.CREATED: float, Order.USED: float, Order.SIZE: int}
_EXPECTED = re.compile(r"v([1-9][0-9]{0,8})@(0|[1-9][0-9]{0,8})")


@dataclass(frozen=True, slots=True)
class PageRequest:
    """One page of a list. `method` is what its page tokens belong to: each query has tokens of its own."""

    query: Query
    size: int
    after: Position | None
    thumbnails: bool
    method: str

    def token(self, last: Position | None) -> str:
        return pages.page_token(self.method, list(last)) if last else ""


def decode_list(request: pb.ListAdaptersRequest, tenant: str) -> PageRequest:
    """Raises InvalidRequest."""
    checks = Checks()
    size = pages.page_size(checks, request.page_size)
    thumbnails = request.view == pb.ADAPTER_VIEW_THUMBNAILS
    by, _, direction = request.order_by.strip().partition(" ")
    known = [order.value for order in Order]
    if (by and by not in known) or direction.strip() not in ("", "asc", "desc"):
        checks.refuse(
            "order_by", f'{shown(request.order_by)} is none of {", ".join(known)}, each also with " desc"'
        )
        by = ""
    if request.view not in pb.AdapterView.values():
        checks.refuse("view", f"{request.view} is no AdapterView")
    for field in ("name_prefix", "tag", "base"):
        checks.text(field, getattr(request, field), _FILTER_CHARACTERS)
    query = Query(
        tenant=tenant,
        all_versions=request.all_versions,
        name_prefix=request.name_prefix,
        tag=request.tag,
        base=request.base,
        resident=request.resident if request.HasField("resident") else None,
        order=Order(by or "name"),
        descending=direction.strip() == "desc",
        deleted=request.view == pb.ADAPTER_VIEW_DELETED,
    )
    method = f"adapters-{hashlib.sha256(repr(query).encode()).hexdigest()[:16]}"
    key = pages.page_key(checks, method, request.page_token, (_KEYS[query.order], str, int))
    checks.done()
    after = (key[0], key[1], key[2]) if key else None
    return PageRequest(
        query, min(size, _PAGE_WITH_PICTURES) if thumbnails else size, after, thumbnails, method
    )


def decode_tag(request: pb.TagAdapterRequest) -> tuple[AdapterRef, str, CheckpointId | Expect]:
    """The checkpoint's reference, the tag, what it is expected to be on. Raises InvalidRequest."""
    checks = Checks()
    ref = checks.reference("adapter", request.adapter) or AdapterRef("")
    expected = _tag(checks, request, ref.name)
    checks.done()
    return ref, request.tag, expected


def decode_untag(request: pb.UntagAdapterRequest) -> tuple[str, str, CheckpointId | Expect]:
    """The adapter's name, the tag, what it is expected to be on. Raises InvalidRequest."""
    checks = Checks()
    name = checks.name("adapter", request.adapter)
    expected = _tag(checks, request, name)
    checks.done()
    return name, request.tag, expected


def decode_note(request: pb.AnnotateAdapterRequest) -> tuple[AdapterRef, str]:
    """Raises InvalidRequest."""
    checks = Checks()
    ref = checks.reference("adapter", request.adapter)
    checks.text("note", request.note, _NOTE_CHARACTERS)
    checks.done()
    return ref or AdapterRef(""), request.note.strip()


def encode_target(checkpoint: CheckpointId | None) -> str:
    """vN@STEP; "" for none."""
    return f"v{checkpoint.version}@{checkpoint.step}" if checkpoint else ""


def encode_listed(listed: Listed, *, recipe: bool = False) -> pb.Adapter:
    """A version that has a checkpoint."""
    version = listed.version
    meta, recommended = version.meta, version.recommended
    message = pb.Adapter(
        name=meta.name,
        version=meta.version,
        tags=version.tags,
        checkpoints=_checkpoints(listed),
        recommended_step=recommended.id.step if recommended else 0,
        trigger=meta.trigger,
        rank=recommended.rank if recommended else 0,
        lora_alpha=recommended.lora_alpha if recommended else 0.0,
        base_model=meta.base_model,
        base_sha256=meta.base_sha256,
        training=meta.training,
        create_time=timestamp(meta.create_time),
        family=meta.family,
        note=version.note,
        thumbnail=listed.thumbnail,
        damaged=version.damaged,
        size_bytes=version.size_bytes,
        tier=_TIERS[listed.tiers[recommended.id]] if recommended else pb.ADAPTER_TIER_UNSPECIFIED,
    )
    if listed.last_used:
        message.last_used_time.CopyFrom(timestamp(max(listed.last_used.values())))
    if version.delete_time is not None and listed.expire_time is not None:
        message.delete_time.CopyFrom(timestamp(version.delete_time))
        message.expire_time.CopyFrom(timestamp(listed.expire_time))
    if recipe and meta.recipe:
        message.recipe.CopyFrom(_recipe(meta))
    return message


def _checkpoints(listed: Listed) -> list[pb.Checkpoint]:
    return [
        pb.Checkpoint(
            step=record.id.step,
            sha256=record.sha256,
            size_bytes=record.size_bytes,
            create_time=timestamp(record.create_time),
            loss=record.loss,
            resident=listed.tiers[record.id] is Tier.DEVICE,
            tags=record.tags,
            damaged=record.damaged,
            tier=_TIERS[listed.tiers[record.id]],
            pinned=record.id in listed.pinned,
            last_used_time=timestamp(used) if (used := listed.last_used.get(record.id)) else None,
        )
        for record in listed.version.checkpoints
    ]


def _recipe(meta: VersionMeta) -> training_pb2.TrainingRecipe:
    """What the store says of it; fields of another release are passed over."""
    message = training_pb2.TrainingRecipe(name=meta.name)
    known = message.DESCRIPTOR.fields_by_name
    for name, value in meta.recipe.items():
        if name not in known or value is None:
            continue
        try:
            if known[name].is_repeated:
                getattr(message, name).extend(value)
            else:
                setattr(message, name, value)
        except (TypeError, ValueError):
            continue
    return message


def _tag(
    checks: Checks, request: pb.TagAdapterRequest | pb.UntagAdapterRequest, name: str
) -> CheckpointId | Expect:
    """Checks the tag; what it is expected to be on."""
    if not TAG.fullmatch(request.tag):
        checks.refuse(
            "tag",
            f"{shown(request.tag)} is no tag: lower-case letters, digits and dashes, a letter first, at most "
            "32; v1, v2, ... are the versions'",
        )
    if not request.HasField("expected"):
        return Expect.ANYTHING
    if not request.expected:
        return Expect.NOTHING
    match = _EXPECTED.fullmatch(request.expected)
    if match is None:
        checks.refuse("expected", f"{shown(request.expected)} is not vN@STEP, e.g. v1@750, and not empty")
        return Expect.ANYTHING
    return CheckpointId(name, int(match[1]), int(match[2]))
