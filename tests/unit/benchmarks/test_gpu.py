"""The benchmark for a GPU: skipped in so many words where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import gpu, harness


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_fails_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert gpu.main(["--out", str(tmp_path)]) == 0
    assert "skipped" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_rows_are_written_as_far_as_they_are(tmp_path: Path) -> None:
    row = harness.row("case", "s", {"ours": [1.0], "peer": [2.0]}, None, ratio=lambda a, b: a / b)
    harness.write("some", [row], tmp_path / "new")
    text = (tmp_path / "new" / "some.json").read_text()
    assert '"case": "case"' in text
    assert '"threads"' in text
