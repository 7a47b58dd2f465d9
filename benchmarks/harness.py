"""Interleaved pairs, their ratio, and the file that keeps the raw figures."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import operator
import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "grpcio", "numpy")
_DIRECTIONS = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True, slots=True)
class Row:
    """One case. `samples` are raw measurements in `unit`; `ratio` is the median over the pairs.

    `target` carries its direction (">= 3"), None for a control.
    """

    case: str
    ours: float
    peer: float
    unit: str
    ratio: float
    target: str | None
    met: bool | None
    samples: dict[str, list[float]] = field(default_factory=dict)


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call, with the garbage of what came before collected first."""
    gc.collect()
    before = perf_counter()
    work()
    return perf_counter() - before


def interleave(ours: Callable[[], float], peer: Callable[[], float], pairs: int) -> dict[str, list[float]]:
    """Measures A B B A A B ...: after one uncounted warm-up of each, so that drift hits both alike."""
    ours()
    peer()
    return take_turns(ours, peer, pairs)


def take_turns(ours: Callable[[], float], peer: Callable[[], float], pairs: int) -> dict[str, list[float]]:
    """As `interleave`, of sides that are warm already."""
    samples: dict[str, list[float]] = {"ours": [], "peer": []}
    for pair in range(pairs):
        order = [("ours", ours), ("peer", peer)]
        for name, measure in order if pair % 2 == 0 else reversed(order):
            samples[name].append(measure())
    return samples


def row(
    case: str,
    unit: str,
    samples: dict[str, list[float]],
    target: str | None,
    *,
    ratio: Callable[[float, float], float],
) -> Row:
    """A result: `ratio(ours, peer)` a pair, its median against the target."""
    median = statistics.median(ratio(a, b) for a, b in zip(samples["ours"], samples["peer"], strict=True))
    return Row(
        case=case,
        ours=statistics.median(samples["ours"]),
        peer=statistics.median(samples["peer"]),
        unit=unit,
        ratio=median,
        target=target,
        met=None if target is None else meets(median, target),
        samples=samples,
    )


def meets(value: float, target: str) -> bool:
    direction, bound = target.split()
    return bool(_DIRECTIONS[direction](value, float(bound)))


def report(name: str, rows: list[Row], *, keep: bool, folder: Path = RESULTS) -> None:
    """Prints a table; `keep` writes it with the raw figures under benchmarks/results, or `folder`."""
    table = Table(title=name)
    for column in ("case", "ours", "peer", "unit", "ratio", "target", "met"):
        table.add_column(column)
    for r in rows:
        met = "" if r.met is None else "yes" if r.met else "NO"
        table.add_row(
            r.case, f"{r.ours:.4g}", f"{r.peer:.4g}", r.unit, f"{r.ratio:.2f}", r.target or "control", met
        )
    Console().print(table)
    if keep:
        write(name, rows, folder)


def write(name: str, rows: list[Row], folder: Path = RESULTS) -> None:
    """The rows so far with the raw figures, as NAME.json."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "rows": [asdict(r) for r in rows],
        "machine": _machine(),
        "versions": {p: importlib.metadata.version(p) for p in _PACKAGES},
        "date": datetime.now(UTC).date().isoformat(),
    }
    (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def _machine() -> dict[str, object]:
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    machine = {"cpu": model, "cores": os.cpu_count(), "pinned_to": sorted(os.sched_getaffinity(0))}
    return machine | {"threads": torch.get_num_threads()} | _gpu()


def _gpu() -> dict[str, object]:
    """Its name, memory, CUDA and driver; nothing where there is none."""
    if not torch.cuda.is_available():
        return {}
    driver = Path("/proc/driver/nvidia/version")
    return {
        "gpu": torch.cuda.get_device_name(),
        "gpu_bytes": torch.cuda.get_device_properties(0).total_memory,
        "cuda": torch.version.cuda,
        "driver": driver.read_text().splitlines()[0] if driver.exists() else "unknown",
    }
