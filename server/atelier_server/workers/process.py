"""The worker's entry: `python -m atelier_server.workers.process FD`.

Wires base, bank, runner and loop together and connects them to the front over the socket FD. The process
ends itself when the front's end of the socket closes.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import BinaryIO

from atelier_server import logs
from atelier_server.core import CheckpointId
from atelier_server.engine.loop import Loop, Message
from atelier_server.engine.samples import SampleDefaults
from atelier_server.messages import (
    AdapterLoaded,
    AdaptersUnloaded,
    Command,
    Event,
    GenerationCompleted,
    Heartbeat,
    Sample,
    Span,
    WorkerFailed,
    WorkerReady,
    WorkerSettings,
)
from atelier_server.workers import wire
from atelier_server.workers.runner import TorchRunner

_log = logging.getLogger(__name__)
_HEARTBEAT_SECONDS = 1.0
_ENDS = (GenerationCompleted, AdapterLoaded, AdaptersUnloaded)


class Outbox:
    """Events to the front, written by a thread of their own: the device never waits for a reader.

    Observations for metrics wait for the next event and travel with it: nobody is in a hurry for them, and
    waking two processes for each costs a small model's step several percent.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._events: deque[Event] = deque()
        self._changed = threading.Condition()
        self._urgent = False
        self._closed = False
        self._thread = threading.Thread(target=self._write, name="outbox", daemon=True)
        self._thread.start()

    def put(self, event: Event) -> None:
        with self._changed:
            self._events.append(event)
            if not isinstance(event, Sample | Span):
                self._urgent = True
                self._changed.notify()

    def close(self) -> None:
        """Waits until everything is written."""
        with self._changed:
            self._urgent = self._closed = True
            self._changed.notify()
        self._thread.join()

    def _write(self) -> None:
        while not self._closed or self._events:
            with self._changed:
                self._changed.wait_for(lambda: self._urgent)
                self._urgent = self._closed
                frames = b"".join(wire.frame(event) for event in self._events)
                self._events.clear()
            try:
                self._connection.sendall(frames)
            except OSError:
                return  # the front has gone; the reader ends the process


def _read(stream: BinaryIO, deliver: Callable[[Command], None]) -> None:
    """Hands commands over. Without a front there is nobody to work for: the process ends at once."""
    try:
        while True:
            deliver(wire.read(stream))
    except EOFError:
        _log.warning("the front has gone; the worker ends")
        os._exit(0)


class Pulse:
    """Heartbeats: once a second, and before an event that ends what slots have changed for.

    So whoever has read that event finds the slots of now in a list.
    """

    def __init__(self, loop: Loop, runner: TorchRunner, outbox: Outbox) -> None:
        self._loop = loop
        self._runner = runner
        self._outbox = outbox
        self._told: tuple[CheckpointId, ...] = ()
        self._stopped = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()
        self.beat()

    def before(self, event: Event) -> None:
        """To be called with each event that is about to be sent."""
        if isinstance(event, _ENDS) and self._loop.residency.resident != self._told:
            self.beat()

    def beat(self) -> None:
        heartbeat = _heartbeat(self._loop, self._runner)
        self._told = heartbeat.resident
        self._outbox.put(heartbeat)

    def _run(self) -> None:
        while not self._stopped.wait(_HEARTBEAT_SECONDS):
            self.beat()


def _heartbeat(loop: Loop, runner: TorchRunner) -> Heartbeat:
    memory = runner.memory()
    tasks = loop.scheduler.tasks
    return Heartbeat(
        queued_generations=sum(1 for _ in loop.scheduler.waiting_jobs()),
        running_images=sum(1 for task in tasks if task.started),
        running_trainings=len(loop.trainings.live),
        resident=loop.residency.resident,
        turns=loop.turns,
        idle=loop.idle,
        host_adapters=len(runner.host),
        host_contents=runner.host.contents(),
        memory_allocated_bytes=memory.allocated,
        memory_reserved_bytes=memory.reserved,
        memory_peak_bytes=memory.peak,
        component_bytes=memory.components,
    )


def serve(connection: socket.socket) -> int:
    """Runs one worker until it is drained. Returns the exit code."""
    stream = connection.makefile("rb")
    settings: WorkerSettings = wire.read(stream)
    logs.configure(settings.log_format, settings.log_level, "worker")
    outbox = Outbox(connection)
    inbox: SimpleQueue[Message] = SimpleQueue()
    loop: Loop | None = None

    def deliver(command: Command) -> None:
        (loop or inbox).put(command)

    threading.Thread(target=_read, args=(stream, deliver), name="inbox", daemon=True).start()
    try:
        runner = TorchRunner(settings)
        info, costs = runner.info, runner.measure()
    except Exception as error:
        _log.exception("the worker cannot start")
        outbox.put(WorkerFailed("MODEL_UNUSABLE", f"model {settings.model!r}: {error}"))
        outbox.close()
        return 1

    def emit(event: Event) -> None:
        pulse.before(event)
        outbox.put(event)

    loop = Loop(
        runner=runner,
        inbox=inbox,
        emit=emit,
        slots=settings.slots,
        row_limit=runner.row_limit,
        training_share=settings.training_share,
        sample_defaults=SampleDefaults(info.native_width, info.native_height, info.default_scheduler),
    )
    pulse = Pulse(loop, runner, outbox)
    outbox.put(WorkerReady(info, settings.slots, costs))
    pulse.beat()
    pulse.start()
    loop.run()
    pulse.stop()
    outbox.close()
    return 0


def main() -> None:
    sys.exit(serve(socket.socket(fileno=int(sys.argv[1]))))


if __name__ == "__main__":
    main()
