"""Two server processes side by side: ours, and the one of diffusers that one writes first."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from atelier import Client
from benchmarks.serving import serving


@contextmanager
def ours(model: Path | str, data_dir: Path, adapters: Sequence[Path] = ()) -> Iterator[str]:
    """A server on one thread with these adapter files imported, each by its stem; its address."""
    with serving(data_dir, "--metrics-port", "-1", model=model) as server:
        with Client(server.address) as client:
            for file in adapters:
                client.import_adapter(file, file.stem)
                client.load_adapter(file.stem)
        yield server.address


@contextmanager
def diffusers(model: Path, adapters: Sequence[Path]) -> Iterator[str]:
    """The peer with the same base and adapters; its address."""
    command = [sys.executable, "-m", "benchmarks.diffusers_server", str(model), *map(str, adapters)]
    with _running(command) as process:
        yield f"127.0.0.1:{int(_first_line(process))}"


@contextmanager
def _running(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def _first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()
