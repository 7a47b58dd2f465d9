"""A picture painted again from the receipt in its file, and compared with it. Needs Pillow."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict, Unpack

from PIL import ExifTags, ImageChops, UnidentifiedImageError
from PIL import Image as PillowImage

from atelier import transfer
from atelier.aio import AsyncClient
from atelier.client import Client
from atelier.control import Control
from atelier.events import Image, Receipt, ReceiptAdapter, ReceiptControlNet
from atelier.fields import Controls, PictureFile
from atelier.records import BaseModel, ServerInfo
from atelier.selection import Selection

# What else than the request decides about the bits.
_CIRCUMSTANCES = ("dtype", "device", "quantization", "compiled")
_FORMATS = {"PNG": "png", "JPEG": "jpeg", "WEBP": "webp"}
# What a request takes over from a receipt as it is.
_SAME = (
    "prompt",
    "seed",
    "num_inference_steps",
    "guidance_scale",
    "guidance_rescale",
    "scheduler",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "timestep_spacing",
    "rescale_betas_zero_snr",
    "eta",
    "width",
    "height",
    "strength",
    "clip_skip",
)


class Given(TypedDict, total=False):
    """The pictures that a picture began with or was guided by: a receipt has their hashes only."""

    image: PictureFile
    mask_image: PictureFile
    controlnets: Controls


@dataclass(frozen=True, slots=True)
class Replayed:
    """`image` painted anew beside the one of the file: `largest_difference` of any channel, 0 to 255.

    `changes` are what is not as it was: versions, dtype, device, the base's configs, whether it is compiled.
    """

    image: Image
    receipt: Receipt
    bit_equal: bool
    largest_difference: int
    changes: tuple[str, ...]


def read_receipt(file: bytes) -> Receipt:
    """The receipt in a PNG, JPEG or WebP file of Atelier's. ValueError where there is none."""
    with _opened(file) as picture:
        text = picture.info.get("atelier") or picture.getexif().get(ExifTags.Base.ImageDescription)
    try:
        told = json.loads(str(text))
        adapters = tuple(_record(ReceiptAdapter, adapter) for adapter in told["adapters"])
        controlnets = tuple(_record(ReceiptControlNet, use) for use in told.get("controlnets", ()))
        more = {"create_time": None, "adapters": adapters, "controlnets": controlnets}
        receipt: Receipt = _record(Receipt, told | more)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("the file has no receipt of Atelier's") from None
    return receipt


def replay(client: Client, file: PictureFile, **given: Unpack[Given]) -> Replayed:
    """Paints the file's picture again, in forwards of the rows that it was painted in, and compares.

    ValueError where that cannot be done: no receipt, another base model, a missing picture.
    """
    before = transfer.picture_bytes(file)
    receipt = read_receipt(before)
    check_server(receipt, client.server_info())
    return compare(before, receipt, client.generate(**arguments(before, receipt, **given)).images[0])


async def replay_async(client: AsyncClient, file: PictureFile, **given: Unpack[Given]) -> Replayed:
    """As `replay`."""
    before = transfer.picture_bytes(file)
    receipt = read_receipt(before)
    check_server(receipt, await client.server_info())
    result = await client.generate(**arguments(before, receipt, **given))
    return compare(before, receipt, result.images[0])


def arguments(file: bytes, receipt: Receipt, **given: Unpack[Given]) -> dict[str, Any]:
    """What `generate` is called with."""
    with _opened(file) as picture:
        image_format = _FORMATS.get(str(picture.format), "png")
    negative = receipt.negative_prompt
    rows = (
        {"batch_buckets": receipt.batch_buckets}
        if receipt.batch_buckets
        else {"batch_bucket": receipt.batch_bucket}
    )
    return {
        **{name: value for name in _SAME if (value := getattr(receipt, name)) is not None},
        **({"negative_prompt": negative} if negative or receipt.empty_negative_prompt else {}),
        **rows,
        "reproducibility": "strict",
        "image_format": image_format,
        "adapters": [Selection(a.name, a.weights or (a.weight,), a.sha256) for a in receipt.adapters],
        "controlnets": _controls(receipt.controlnets, given.get("controlnets", ())),
        "image": _same_file("image", given.get("image"), receipt.image_sha256),
        "mask_image": _same_file("mask_image", given.get("mask_image"), receipt.mask_image_sha256),
    }


def check_server(receipt: Receipt, info: ServerInfo) -> None:
    """ValueError where the server has another base model, or other weights under a ControlNet's name."""
    base = info.base_model
    if base is not None and base.sha256 and base.sha256 != receipt.base_sha256:
        raise ValueError(
            f"the picture was painted with {_told(receipt.base_model, receipt)} "
            f"(sha256 {receipt.base_sha256[:12]}...), "
            f"the server has {_told(base.reference, base)} (sha256 {base.sha256[:12]}...)"
        )
    has = {net.name: net.sha256 for net in info.controlnets}
    for use in receipt.controlnets:
        if (found := has.get(use.name, use.sha256)) != use.sha256:
            raise ValueError(
                f"the picture was painted with another ControlNet {use.name} "
                f"(sha256 {use.sha256[:12]}...) than the server has (sha256 {found[:12]}...)"
            )


def _told(reference: str, of: Receipt | BaseModel) -> str:
    return f"{reference} in {of.quantization}" if of.quantization else reference


def compare(file: bytes, receipt: Receipt, image: Image) -> Replayed:
    """What has come of it."""
    again = read_receipt(image.data)
    with _opened(file) as before, _opened(image.data) as after:
        one, other = before.convert("RGB"), after.convert("RGB")
    if one.size != other.size:
        raise ValueError(
            f"the file is {one.size} and its receipt says {other.size}: it has been changed since"
        )
    largest = max(ImageChops.difference(one, other).tobytes())
    return Replayed(image, again, largest == 0, largest, tuple(_changes(receipt, again)))


def _changes(before: Receipt, after: Receipt) -> Iterable[str]:
    for name in _CIRCUMSTANCES:
        was, now = getattr(before, name), getattr(after, name)
        if was != now:
            yield f"{name} {_word(was)}, now {_word(now)}"
    # Receipts of before these were told say nothing of them.
    for name in ("base_config_sha256", "device_description"):
        was, now = getattr(before, name), getattr(after, name)
        if was and was != now:
            yield f"{name} {was}, now {_word(now)}"
    for package in sorted({*before.versions, *after.versions}):
        was, now = (receipt.versions.get(package, "none") for receipt in (before, after))
        if was != now:
            yield f"{package} {was}, now {now}"


def _word(value: str | bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value or "none"


def _controls(used: Sequence[ReceiptControlNet], given: Controls) -> list[Control]:
    """The ControlNets of the receipt with the pictures that are given. ValueError for what it has not."""
    mine = {one.name: one for one in Control.several(given)}
    for name in mine.keys() - {use.name for use in used}:
        raise ValueError(f"controlnets {name}: the picture was made without it")
    return [_control(use, mine.get(use.name)) for use in used]


def _control(use: ReceiptControlNet, given: Control | None) -> Control:
    for key in ("scale", "start", "end"):
        asked, was = getattr(given, key, None), getattr(use, key)
        if asked not in (None, was):
            raise ValueError(
                f"controlnets {use.name}: the picture was made with {key} {was:g}, not {asked:g}"
            )
    source = given.image if given is not None else None
    image = _same_file(f"controlnets {use.name}", source, use.image_sha256)
    return Control(use.name, image or b"", use.scale, use.start, use.end)


def _same_file(field: str, source: PictureFile | None, sha256: str) -> bytes | None:
    """The bytes of the file with that hash; none where none was."""
    if source is None:
        if sha256:
            raise ValueError(f"{field}: needed, the file with sha256 {sha256}")
        return None
    data = transfer.picture_bytes(source)
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        wanted = f"sha256 {sha256[:12]}..." if sha256 else "none"
        raise ValueError(f"{field}: this file has sha256 {found[:12]}..., the picture was made with {wanted}")
    return data


def _opened(file: bytes) -> PillowImage.Image:
    try:
        return PillowImage.open(io.BytesIO(file))
    except UnidentifiedImageError:
        raise ValueError("the file is no picture") from None


def _record(kind: type[Any], values: dict[str, Any]) -> Any:
    """A record of the values that it knows, lists as tuples."""
    known = {field.name for field in fields(kind)}
    return kind(
        **{
            key: tuple(value) if isinstance(value, list) else value
            for key, value in values.items()
            if key in known
        }
    )
