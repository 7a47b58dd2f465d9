"""Pictures at the door."""

from __future__ import annotations

import io
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image

from atelier_server.rpc.pictures import examine


def encoded(format: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((40, 30), 50).convert("RGB").save(file, format, **options)
    return file.getvalue()


CASES = [
    ("PNG", {}),
    ("JPEG", {}),
    ("WEBP", {}),
    ("WEBP", {"lossless": True}),
    ("WEBP", {"exif": b"Exif\0\0"}),
]


@pytest.mark.parametrize(("format", "options"), CASES)
def test_good_pictures_pass_and_their_header_is_believed(format: str, options: dict) -> None:
    data = encoded(format, **options)
    verdict = examine(data, 40 * 30)
    assert (verdict.suffix, verdict.problem) == (format.lower(), "")
    assert examine(data, 40 * 30 - 1).problem.startswith("is 40 x 30;")


def test_a_picture_that_lies_is_measured_upright() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    verdict = examine(encoded("JPEG", exif=exif), 10**6)
    assert (verdict.width, verdict.height) == (30, 40)


@pytest.mark.parametrize(("grey", "mode"), [(0, "L"), (127, "L"), (1, "1"), (200, "RGB")])
def test_the_brightest_grey_is_told(grey: int, mode: str) -> None:
    file = io.BytesIO()
    picture = Image.new(mode, (40, 30))
    picture.paste((grey,) * 3 if mode == "RGB" else grey, (3, 3, 4, 4))
    picture.save(file, "PNG")
    assert examine(file.getvalue(), 10**6).brightest == (255 if mode == "1" else grey)


@pytest.mark.parametrize(
    ("picture", "brightest", "transparent"),
    [
        (Image.new("I;16", (4, 4), 0x4000), 0x40, False),
        (Image.new("RGBA", (4, 4), (255, 255, 255, 0)), 0, True),
        (Image.new("RGBA", (4, 4), (90, 90, 90, 255)), 90, False),
    ],
)
def test_the_brightest_grey_is_that_of_eight_bits_on_black(
    picture: Image.Image, brightest: int, transparent: bool
) -> None:
    file = io.BytesIO()
    picture.save(file, "PNG")
    verdict = examine(file.getvalue(), 10**6)
    assert (verdict.problem, verdict.brightest, verdict.transparent) == ("", brightest, transparent)


@pytest.mark.parametrize(("format", "options"), CASES)
def test_cut_pictures_are_refused(format: str, options: dict) -> None:
    data = encoded(format, **options)
    for size in (3, 12, 20, 40, len(data) // 2):
        assert examine(data[:size], 10**6).problem


def test_a_bomb_is_refused_by_its_header() -> None:
    bomb = encoded("PNG")
    bomb = bomb[:16] + struct.pack(">II", 20_000, 20_000) + bomb[24:]
    assert examine(bomb, 50_000_000).problem.startswith("is 20000 x 20000;")


@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF____WEBPVP8X"]),
)
def test_garbage_never_raises(data: bytes, magic: bytes) -> None:
    assert examine(magic + data, 10**6).problem
