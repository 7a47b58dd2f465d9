"""`make tools` where there is no apt: what is on the PATH is taken, and what is not is named."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("promtool", "prometheus")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A folder to be the whole PATH: what the script itself needs, and no apt."""
    folder = tmp_path / "path"
    folder.mkdir()
    for name in ("bash", "dirname", "mkdir", "ln"):
        found = shutil.which(name)
        assert found
        (folder / name).symlink_to(found)
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "tools", tmp_path / ".ci" / "tools")
    return folder


def _run(path: Path) -> subprocess.CompletedProcess[str]:
    script = path.parent / ".ci" / "tools"
    environment = {**os.environ, "PATH": str(path)}
    return subprocess.run([script], env=environment, capture_output=True, text=True, check=False)


def test_a_missing_tool_is_named(path: Path) -> None:
    done = _run(path)
    assert done.returncode == 1
    assert "promtool is missing" in done.stderr
    assert "install Prometheus" in done.stderr


def test_tools_on_the_path_are_taken(path: Path) -> None:
    for name in TOOLS:
        (path / name).write_text(f"#!/bin/sh\necho {name}\n")
        (path / name).chmod(0o755)
    assert [_run(path).returncode for _ in range(2)] == [0, 0]
    for name in TOOLS:
        assert (path.parent / "tools" / "bin" / name).resolve() == path / name
