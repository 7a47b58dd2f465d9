"""A server of one's own for the time of a demo: started, waited for, stopped."""

from __future__ import annotations

import importlib.util
import queue
import re
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import typer

from atelier.cli import output
from atelier.client import Client
from atelier.errors import AtelierError

READY_SECONDS = 300.0
STOP_SECONDS = 60.0
LOG_LINES = 20
POLL_SECONDS = 0.2
LISTENING = re.compile(r"atelier listening on (\S+)")
NEEDED = ("torch", "diffusers", "pydantic", "sqlalchemy", "grpc_health", "atelier_server")


def need_server() -> None:
    """Exit code 1 and what to install, where the client was installed alone."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        output.say(f"error: the server needs {', '.join(missing)}")
        output.say("install it with: pip install 'atelier[server]'")
        raise typer.Exit(1)


class ServerFailedError(AtelierError):
    """The server that was started here is gone or never came up."""


class LocalServer:
    """`python -m atelier_server` on free ports, as a context manager; `address` is HOST:PORT once it listens.

    Everything the server says goes to the file `log`. Leaving the context stops it, whatever has happened.
    """

    def __init__(self, data_dir: Path, log: Path, *, model: str) -> None:
        arguments = ("--port", "0", "--metrics-port", "0", "--model", model, "--data-dir", str(data_dir))
        self.command = [sys.executable, "-m", "atelier_server", *arguments]
        self._log_path = log
        self.address = ""
        self.exit_code: int | None = None

    def __enter__(self) -> Self:
        self._log = self._log_path.open("a", encoding="utf-8")
        self._process = subprocess.Popen(
            self.command, stdout=subprocess.PIPE, stderr=self._log, stdin=subprocess.DEVNULL, text=True
        )
        assert self._process.stdout is not None
        first: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._drain, args=(self._process.stdout, first), daemon=True)
        self._reader.start()
        try:
            self.address = self._listening(first)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def wait_ready(self, client: Client) -> None:
        """Until the worker takes work; ServerFailedError if it never does."""
        deadline = time.monotonic() + READY_SECONDS
        while True:
            info = client.server_info()
            if info.ready:
                return
            self._check_alive()
            if time.monotonic() > deadline:
                raise ServerFailedError(f"not ready after {READY_SECONDS:g} s: {info.message}")
            time.sleep(POLL_SECONDS)

    def last_lines(self) -> list[str]:
        """The end of the log."""
        with self._log_path.open(encoding="utf-8", errors="replace") as file:
            return [line.rstrip() for line in deque(file, LOG_LINES)]

    def _listening(self, first: queue.Queue[str]) -> str:
        """The address in the first line of stdout; an empty line means that stdout was closed."""
        try:
            line = first.get(timeout=READY_SECONDS)
        except queue.Empty:
            raise ServerFailedError(f"did not listen within {READY_SECONDS:g} s") from None
        found = LISTENING.match(line)
        if found is None:
            raise ServerFailedError(f"did not start: {line.strip() or 'it ended at once'}")
        return found[1]

    def _drain(self, stdout: IO[str], first: queue.Queue[str]) -> None:
        line = stdout.readline()
        first.put(line)
        while line:
            self._log.write(line)
            self._log.flush()
            line = stdout.readline()

    def _check_alive(self) -> None:
        if self._process.poll() is not None:
            raise ServerFailedError(f"ended with exit code {self._process.returncode}")

    def _stop(self) -> None:
        """SIGTERM and patience, then SIGKILL."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()
        self.exit_code = self._process.returncode
