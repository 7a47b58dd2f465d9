"""The data directory: locked, of a known version, and refused clearly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from atelier_server.data_directory import VERSION, DataDirectory
from atelier_server.errors import StartError


def test_one_server_at_a_time(tmp_path: Path) -> None:
    first = DataDirectory(tmp_path / "data")
    with pytest.raises(StartError, match="another server is using the data directory"):
        DataDirectory(tmp_path / "data")
    first.close()
    DataDirectory(tmp_path / "data").close()


def test_the_version_is_written_down(tmp_path: Path) -> None:
    DataDirectory(tmp_path).close()
    assert json.loads((tmp_path / "version.json").read_text()) == {"version": VERSION}


def test_a_later_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "version.json").write_text(json.dumps({"version": VERSION + 1}))
    with pytest.raises(StartError, match=f"has version {VERSION + 1}, written by a later server"):
        DataDirectory(tmp_path)
    assert json.loads((tmp_path / "version.json").read_text()) == {"version": VERSION + 1}


@pytest.mark.parametrize("content", ["", "[]", '{"version": "new"}', "{}"])
def test_an_unreadable_version_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "version.json").write_text(content)
    with pytest.raises(StartError, match=r"version\.json cannot be read"):
        DataDirectory(tmp_path)


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartError, match="cannot be written: Not a directory"):
        DataDirectory(tmp_path / "file" / "data")
