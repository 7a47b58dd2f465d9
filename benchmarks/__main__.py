"""`python -m benchmarks NAME [--quick]`: prints a table and writes benchmarks/results/NAME.json.

`gpu` writes benchmarks/results/gpu/FAMILY.json; `python -m benchmarks gpu --help` tells what else it takes.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys

NAMES = (
    "mixed_adapters",
    "mixed_forward",
    "swap",
    "service_overhead",
    "composition_tax",
    "poisson",
    "strict",
    "control_call",
    "training_many",
    "serve_and_train",
    "load",
)
# Processes of their own, with all cores; they skip themselves where there is no GPU.
GPU_NAMES = ("gpu",)


def main() -> int:
    if sys.argv[1:2] and sys.argv[1] in GPU_NAMES:
        return int(importlib.import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:]))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=(*NAMES, *GPU_NAMES, "all"))
    parser.add_argument("--quick", action="store_true", help="a smoke run: no targets, nothing is written")
    arguments = parser.parse_args()
    missed = False
    if arguments.name == "all":  # first: what comes after is pinned to one core
        commands = [[sys.executable, "-m", "benchmarks", name] for name in GPU_NAMES]
        missed = any(subprocess.run(command, check=False).returncode for command in commands)
    # Before torch is imported: one thread on one core for both sides, and no spinning.
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    harness = importlib.import_module("benchmarks.harness")
    for name in NAMES if arguments.name == "all" else (arguments.name,):
        os.sched_setaffinity(0, {core})
        rows = importlib.import_module(f"benchmarks.{name}").run(quick=arguments.quick)
        harness.report(name, rows, keep=not arguments.quick)
        missed |= any(row.met is False for row in rows)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
