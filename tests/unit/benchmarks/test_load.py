"""The parts of the load run that judge, and that a run against a real server and a real Prometheus works."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter

import pytest

from benchmarks.load import drift, quantile
from benchmarks.panels import filled, legend, panels
from benchmarks.picture import scale
from benchmarks.visitors import EXPECTED, SHARES, kinds, wish


def test_drift_is_the_growth_over_the_second_half() -> None:
    flat = [(float(t), 100) for t in range(100)]
    assert drift(flat) == 0
    warming = [(float(t), min(t, 50)) for t in range(100)]
    assert drift(warming) == pytest.approx(0)
    leaking = [(float(t), 1000 + t) for t in range(101)]
    assert drift(leaking) == pytest.approx(50 / 1075)
    assert drift([(t, 2 * size - t) for t, size in flat]) < 0


def test_a_quantile_is_a_value_that_was_seen() -> None:
    values = [float(i) for i in range(1000)]
    assert quantile(values, 0.99) == 990.0
    assert quantile([5.0], 0.99) == 5.0


def test_visitors_come_in_their_shares() -> None:
    listed = kinds(200, random.Random(0))
    assert len(listed) == 200
    assert Counter(listed) == {kind: 2 * share for kind, share in SHARES.items()}
    assert set(kinds(10, random.Random(0))) == set(SHARES) == set(EXPECTED)


def test_wishes_are_reproducible_and_differ() -> None:
    first, second = (
        [wish(chance, ["a", "b", "c"], 10) for _ in range(50)] for chance in map(random.Random, (1, 1))
    )
    assert first == second
    assert len({w.SerializeToString() for w in first}) == 50
    assert {len(w.adapters) for w in first} == {1, 2}


def test_queries_are_asked_as_grafana_fills_them_in() -> None:
    asked = [filled(target.expr, interval="15s") for panel in panels() for target in panel.targets]
    assert not [expr for expr in asked if "$" in expr]
    assert any("[15s]" in expr for expr in asked)
    assert legend("{{kind}} of {{other}}", {"kind": "train"}) == "train of {{other}}"


@pytest.mark.parametrize(
    ("top", "unit", "expected"),
    [
        (2**20, "bytes", (2**20, " MiB")),
        (2**31, "bytes", (2**30, " GiB")),
        (0.5, "percentunit", (0.01, "%")),
        (0.02, "s", (1e-3, " ms")),
        (3, "s", (1.0, " s")),
        (2, "ops", (1.0, "")),
    ],
)
def test_values_are_shown_in_their_unit(top: float, unit: str, expected: tuple[float, str]) -> None:
    assert scale(top, unit) == expected


@pytest.mark.process
def test_a_quick_load_run_holds_all_that_is_asserted() -> None:
    command = [sys.executable, "-m", "benchmarks", "load", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "killed: killed" in done.stdout
    assert "stops reading" in done.stdout
