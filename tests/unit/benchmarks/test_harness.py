"""Pairs, ratios and targets; and that a benchmark runs at all."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.harness import RESULTS, interleave, row


def test_both_sides_take_turns_after_a_warm_up() -> None:
    calls: list[str] = []

    def measure(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    samples = interleave(lambda: measure("A"), lambda: measure("B"), 3)
    assert "".join(calls) == "AB" + "AB" + "BA" + "AB"
    assert len(samples["ours"]) == len(samples["peer"]) == 3


@pytest.mark.parametrize(
    ("target", "met"), [(">= 2", True), (">= 2.5", False), ("<= 2", True), ("<= 1", False), (None, None)]
)
def test_the_ratio_is_the_median_of_the_pairs(target: str | None, met: bool | None) -> None:
    samples = {"ours": [2.0, 4.0, 90.0], "peer": [1.0, 2.0, 3.0]}
    result = row("case", "images/s", samples, target, ratio=lambda ours, peer: ours / peer)
    assert (result.ratio, result.ours, result.peer, result.met) == (2.0, 4.0, 2.0, met)


def test_a_quick_run_prints_its_table_and_writes_nothing() -> None:
    before = written()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "swap", "--quick"],
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    assert "among residents" in done.stdout
    assert written() == before


def written() -> dict[str, int]:
    """The results that are kept, and when each was written."""
    return {file.name: file.stat().st_mtime_ns for file in RESULTS.glob("*.json")}
