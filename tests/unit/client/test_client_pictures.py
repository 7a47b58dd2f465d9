"""Contact sheets, colours, the demo's report and the demo's server."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image, ImageFont

from atelier import wire
from atelier.cli import curve, report
from atelier.cli.local_server import LocalServer, ServerFailedError
from atelier.cli.similarity import histogram, intersection, similarity
from atelier.sheet import PAPER, Layout, contact_sheet, wrap
from atelier.v1 import training_pb2

RED, GREEN, BLUE = (220, 20, 20), (20, 200, 20), (20, 40, 220)
BARE = Layout(cell=40, gap=4, margin=10)


# ------------------------------------------------------------------------------------------------- sheets
def test_pictures_lie_where_they_belong(make_picture: Callable[..., bytes]) -> None:
    rows = [[make_picture(RED), make_picture(GREEN)], [make_picture(BLUE), None]]
    sheet = contact_sheet(rows, layout=BARE)
    assert sheet.size == (10 + 40 + 4 + 40 + 10, 10 + 40 + 4 + 40 + 10)
    assert sheet.getpixel((30, 30)) == RED
    assert sheet.getpixel((74, 30)) == GREEN
    assert sheet.getpixel((30, 74)) == BLUE
    assert sheet.getpixel((74, 74)) not in (RED, GREEN, BLUE, PAPER)
    assert sheet.getpixel((52, 30)) == PAPER
    assert sheet.getpixel((5, 5)) == PAPER


def test_labels_make_room_and_leave_ink(make_picture: Callable[..., bytes]) -> None:
    bare = contact_sheet([[make_picture(RED)] * 3], layout=BARE)
    full = contact_sheet(
        [[make_picture(RED)] * 3], row_labels=["beach"], column_labels=["1", "2", "3"], title="T", layout=BARE
    )
    assert full.width > bare.width
    assert full.height > bare.height
    left = full.crop((0, full.height - 50, full.width - 10 - 3 * 40 - 2 * 4, full.height - 10))
    assert left.convert("L").getextrema()[0] < 100  # the row's label
    head = full.crop((full.width - 138, full.height - 80, full.width, full.height - 51))
    assert head.convert("L").getextrema()[0] < 100  # the columns' labels


def test_a_long_picture_keeps_its_shape() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), RED).save(buffer, "PNG")
    sheet = contact_sheet([[buffer.getvalue()]], layout=BARE)
    assert sheet.getpixel((30, 30)) == RED
    assert sheet.getpixel((30, 14)) == PAPER


def test_no_pictures_no_sheet() -> None:
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([])


def test_words_wrap_within_the_width() -> None:
    font = ImageFont.load_default(16)
    lines = wrap("a seventeenth century painting of an octopus", font, 150)
    assert len(lines) > 1
    assert all(font.getlength(line) <= 150 for line in lines)
    assert " ".join(lines) == "a seventeenth century painting of an octopus"


# ------------------------------------------------------------------------------------------------ colours
def test_equal_colours_are_1_and_others_0(make_picture: Callable[..., bytes]) -> None:
    blue, red, grey = make_picture(BLUE, 64), make_picture(RED, 64), make_picture((90, 90, 90), 64)
    assert similarity([blue], [blue]) == pytest.approx(1.0)
    assert similarity([blue], [red]) == 0.0
    assert similarity([grey], [blue]) == 0.0
    assert similarity([blue, red], [blue]) == pytest.approx(0.5)


def test_a_slightly_different_hue_is_nearer_than_another(make_picture: Callable[..., bytes]) -> None:
    blue, bluish, green = (histogram(make_picture(c, 64)) for c in (BLUE, (20, 60, 220), GREEN))
    assert intersection(blue, bluish) > 0.5 > intersection(blue, green)
    assert sum(blue) == pytest.approx(1.0)


def test_the_rim_does_not_count(make_picture: Callable[..., bytes]) -> None:
    framed = Image.new("RGB", (100, 100), RED)
    framed.paste(BLUE, (14, 14, 86, 86))
    buffer = io.BytesIO()
    framed.save(buffer, "PNG")
    assert similarity([buffer.getvalue()], [make_picture(BLUE, 64)]) > 0.99


# ----------------------------------------------------------------------------------------------- the curve
def test_the_curve_is_svg_with_a_mark_a_checkpoint() -> None:
    svg = ElementTree.fromstring(curve.loss_curve([(step, 1 / step) for step in range(1, 50)], [25, 50]))
    assert [line.get("class") for line in svg.findall("line")].count("mark") == 2
    every, mean = svg.findall("polyline")
    assert len((every.get("points") or "").split()) == 49
    assert mean.get("class") == "mean"
    for point in (every.get("points") or "").split():
        x, y = map(float, point.split(","))
        assert 0 <= x <= curve.WIDTH
        assert 0 <= y <= curve.HEIGHT


@pytest.mark.parametrize("losses", [[], [0.5], [0.0, 0.0], [1e-7, 3e-7], [1234.0, 5.0]])
def test_the_curve_takes_any_losses(losses: list[float]) -> None:
    ElementTree.fromstring(curve.loss_curve([(float(step), loss) for step, loss in enumerate(losses, 1)]))


def test_the_running_mean_of_a_constant_is_the_constant() -> None:
    assert [loss for _, loss in curve.running_mean([(1, 0.5), (2, 0.5), (3, 0.5)])] == pytest.approx(
        [0.5] * 3
    )


# ----------------------------------------------------------------------------------------------- the report
def test_the_report_is_one_file_without_links(make_picture: Callable[..., bytes]) -> None:
    event = training_pb2.TrainingEvent
    shared = {"seq": 1, "training": "otto-k3f9", "create_time": None}
    progress = [event.Progress(step=step, loss=0.5) for step in range(1, 5)]
    checkpoint = event.CheckpointPublished(step=4, adapter="otto@4", size_bytes=4096)
    sample = event.Sample(step=4, prompt="a <b> & c", mime_type="image/png", data=make_picture())
    from_wire = [wire.decode(wire.record_of(m), m, **shared) for m in (*progress, checkpoint, sample)]
    page = report.render(
        report.Findings(
            prompt="a <sks> octopus",
            recipe={"rank": 8, "new_version": True},
            painting={"guidance_scale": 4.0},
            training=from_wire[:4],
            checkpoints=[from_wire[4]],
            samples=[from_wire[5]],
            sheet=make_picture(),
            seconds={"training": 75.0},
        )
    )
    assert "a &lt;sks&gt; octopus" in page
    assert "a &lt;b&gt; &amp; c" in page
    assert "1 min 15 s" in page
    assert "<svg" in page
    assert "http" not in page
    assert "<script" not in page


# ----------------------------------------------------------------------------------------------- its server
FAKE = """
import signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
print("a line for the log", file=sys.stderr, flush=True)
print({first!r}, flush=True)
print("more", flush=True)
signal.sigwait([signal.SIGTERM]) if {stay} else sys.exit(3)
"""


def _server(tmp_path: Path, first: str, *, stay: bool) -> LocalServer:
    server = LocalServer(tmp_path, tmp_path / "log", model="pocket")
    server.command = [sys.executable, "-c", FAKE.format(first=first, stay=stay)]
    return server


def test_the_demos_server_is_stopped_and_its_words_are_kept(tmp_path: Path) -> None:
    line = "atelier listening on 127.0.0.1:4321 (metrics on 127.0.0.1:1)"
    with _server(tmp_path, line, stay=True) as server:
        assert server.address == "127.0.0.1:4321"
    assert server.exit_code == 0
    assert set(server.last_lines()) == {line, "more", "a line for the log"}


def test_a_server_that_does_not_start_is_explained(tmp_path: Path) -> None:
    server = _server(tmp_path, "no such model", stay=False)
    with pytest.raises(ServerFailedError, match="no such model"), server:
        pass
    assert server.exit_code == 3
    assert "a line for the log" in server.last_lines()
