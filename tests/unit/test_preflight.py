"""What is wrong before the start is told all at once."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from atelier_server.config import Settings
from atelier_server.errors import StartError
from atelier_server.preflight import check


def test_ports_in_use_and_a_bad_directory_are_told_together(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        port, metrics_port = first.getsockname()[1], second.getsockname()[1]
        with pytest.raises(StartError) as caught:
            check(Settings(port=port, metrics_port=metrics_port, data_dir=tmp_path / "file"))
    assert len(caught.value.problems) == 3
    for problem, part in zip(caught.value.problems, ("--data-dir", "--port", "--metrics-port"), strict=True):
        assert problem.startswith(part)


def test_a_good_start_leaves_nothing_taken(tmp_path: Path) -> None:
    settings = Settings(port=0, metrics_port=-1, data_dir=tmp_path / "data")
    check(settings)
    check(settings)


def test_an_address_that_is_not_ours_is_told(tmp_path: Path) -> None:
    settings = Settings(host="192.0.2.1", insecure=True, port=1, metrics_port=-1, data_dir=tmp_path)
    with pytest.raises(StartError, match=r"--port: cannot listen on 192\.0\.2\.1:1"):
        check(settings)
