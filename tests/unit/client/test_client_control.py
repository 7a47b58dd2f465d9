"""ControlNets as a caller names them."""

from __future__ import annotations

from pathlib import Path

import pytest

import atelier
from atelier import codec
from atelier.v1.generation_pb2 import ControlNetSelection


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "edges:1.png"
    path.write_bytes(b"a picture")
    return path


def sent(controlnets: object) -> list[ControlNetSelection]:
    return list(codec.generate_request("a cat", (), None, {"controlnets": controlnets}).controlnets)


def test_text_and_objects_say_the_same(picture: Path) -> None:
    plain = ControlNetSelection(name="canny", image=b"a picture")
    assert sent(f"canny={picture}") == [plain]
    assert sent(atelier.Control("canny", picture)) == [plain]
    assert sent([atelier.Control("canny", b"a picture"), f"depth={picture}:0.5"]) == [
        plain,
        ControlNetSelection(name="depth", image=b"a picture", scale=0.5),
    ]
    full = ControlNetSelection(name="canny", image=b"a picture", scale=0.5, start=0.0, end=0.75)
    assert sent([f"canny={picture}:0.5:0-0.75"]) == [full]
    assert sent(atelier.Control("canny", picture, scale=0.5, start=0.0, end=0.75)) == [full]


def test_a_scale_below_zero_is_the_servers_to_refuse(picture: Path) -> None:
    assert sent(f"canny={picture}:-1") == [ControlNetSelection(name="canny", image=b"a picture", scale=-1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("canny=/no/such.png:0.5:0.2", r"is not NAME=FILE\[:SCALE\[:START-END\]\]"),
        ("canny=/no/such.png:1:0-", r"No such file"),
        ("edges.png", r"'edges.png' is not NAME=FILE\[:SCALE\[:START-END\]\]"),
        ("canny=/no/such.png", "No such file"),
        ("canny=/no/such.png:1.2.3", "could not convert string to float"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"controlnets=.*{message}"):
        sent([text])
