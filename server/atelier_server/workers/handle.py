"""The front's handle on one worker: start it, send it commands, read its events, notice its end.

Knows processes and the wire; knows nothing of what the commands mean.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Protocol

from atelier_server.messages import Command, Event, WorkerLost, WorkerSettings
from atelier_server.workers import wire

_log = logging.getLogger(__name__)
_READ_BYTES = 4 * 2**20
DEFAULT_ARGV = (sys.executable, "-m", "atelier_server.workers.process")


class WorkerHandle(Protocol):
    """One worker at a time; after `WorkerLost` it may be started again."""

    @property
    def pid(self) -> int | None:
        """The operating system's number of the process; None while there is none."""

    async def start(self) -> None:
        """Starts the worker and tells it its settings. It is ready when `events` says so."""

    def send(self, command: Command) -> None:
        """Hands a command over without blocking. Commands to a worker that has gone are dropped."""

    def events(self) -> AsyncIterator[Event]:
        """What the worker says, in order; the last event is always `WorkerLost`."""

    async def stop(self) -> None:
        """Ends the worker and waits until it has gone. Idempotent."""

    def kill(self) -> None:
        """Ends the worker at once."""


class LocalWorker:
    """A spawned process on this machine, connected by an unnamed socket pair.

    `argv` starts the process; the number of its end of the socket is appended. The process ends itself
    when the socket closes, so it never outlives this one.
    """

    def __init__(self, settings: WorkerSettings, argv: Sequence[str] = DEFAULT_ARGV) -> None:
        self._settings = settings
        self._argv = tuple(argv)
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def start(self) -> None:
        ours, theirs = socket.socketpair()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._argv,
                str(theirs.fileno()),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sys.stderr.fileno() if _has_descriptor(sys.stderr) else asyncio.subprocess.DEVNULL,
                env=self._environment(),
                # Ctrl-C in a terminal reaches the whole session: the front alone decides how to drain.
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._reader, self._writer = await asyncio.open_connection(sock=ours, limit=_READ_BYTES)
        self._writer.write(wire.frame(self._settings))

    def send(self, command: Command) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(wire.frame(command))

    async def events(self) -> AsyncIterator[Event]:
        if self._reader is None:
            raise RuntimeError("the worker has not been started")
        while True:
            try:
                event: Event = await wire.read_async(self._reader)
            except EOFError:
                break
            except (pickle.UnpicklingError, AttributeError, ImportError):
                _log.exception("the worker said something unreadable; it is ended")
                break
            yield event
        yield WorkerLost(await self._reap())

    async def stop(self) -> None:
        if self._process is not None:
            await self._reap()

    def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()

    async def _reap(self) -> int | None:
        """Makes sure that the process is gone and its socket closed; returns its exit code."""
        self._close()
        process = self._process
        if process is None:
            return None
        try:
            # It ends itself when its socket closes; one that hangs in a kernel is not waited for.
            async with asyncio.timeout(2.0):
                await process.wait()
        except TimeoutError:
            self.kill()
            await process.wait()
        self._process = None
        return process.returncode

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None

    def _environment(self) -> dict[str, str]:
        # Passive waiting: with spinning threads a busy neighbour makes a forward 60 times slower.
        changes = {"OMP_WAIT_POLICY": "PASSIVE"}
        if self._settings.threads > 0:
            changes["OMP_NUM_THREADS"] = str(self._settings.threads)
        # Bars and hints of the libraries do not belong into a server's log; who wants them says so.
        # Few arenas: memory that one thread has freed is there for the others, and a long run stays flat.
        defaults = {"MALLOC_ARENA_MAX": "2"}
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
        return {**defaults, **quiet, **os.environ, **changes}


def _has_descriptor(stream: object) -> bool:
    try:
        return stream.fileno() >= 0  # type: ignore[attr-defined,no-any-return]
    except (AttributeError, OSError, ValueError):
        return False
