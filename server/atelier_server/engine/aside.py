"""Calls that need files and hardly any device: they run beside the loop, on threads of their own.

What such a call has to try on the device it hands to the loop, which does it between two steps.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass

from atelier_server.engine.runner import Runner
from atelier_server.errors import Cancelled, ServerDraining
from atelier_server.messages import (
    AdapterExported,
    AdapterImported,
    AdapterMade,
    AdaptersDiffed,
    CallFailed,
    CallProgress,
    DiffAdapters,
    Event,
    ExportAdapter,
    ExtractAdapter,
    ImportAdapter,
    MergeAdapters,
)

AsideCommand = ImportAdapter | ExportAdapter | MergeAdapters | ExtractAdapter | DiffAdapters


@dataclass(frozen=True, slots=True, eq=False)
class DeviceWork:
    """From another thread: something to do between two steps."""

    measure: Callable[[], float | None]
    done: Future[float | None]

    def run(self) -> None:
        if self.done.set_running_or_notify_cancel():
            try:
                self.done.set_result(self.measure())
            except Exception as error:
                self.done.set_exception(error)

    def refuse(self) -> None:
        """The loop has ended."""
        if self.done.set_running_or_notify_cancel():
            self.done.set_exception(_ending())


class Aside:
    """`ask` hands work to the loop, `failure` says what an error tells the front.

    Made by the thread that runs the loop.
    """

    def __init__(
        self,
        *,
        runner: Runner,
        send: Callable[[Event], None],
        ask: Callable[[DeviceWork], None],
        failure: Callable[[str, Exception], CallFailed],
        executor: Executor | None = None,
    ) -> None:
        self._runner = runner
        self._send = send
        self._ask = ask
        self._failure = failure
        self._executor = executor or ThreadPoolExecutor(max_workers=1, thread_name_prefix="aside")
        # Minutes of work: imports do not wait for it.
        self._long = executor or ThreadPoolExecutor(max_workers=1, thread_name_prefix="extraction")
        self._waited_for: set[str] = set()
        self._loop = threading.get_ident()
        self._ended = threading.Event()

    def submit(self, command: AsideCommand) -> None:
        """Begins a call, or lets it wait for its turn. From any thread."""
        executor = self._executor
        if isinstance(command, ExtractAdapter):
            self._waited_for.add(command.call_id)
            executor = self._long
        try:
            executor.submit(self._call, command)
        except RuntimeError:  # it has been shut down
            self._send(self._failure(command.call_id, _ending()))

    def abandon(self, call_id: str) -> None:
        """Nobody waits for this call any more."""
        self._waited_for.discard(call_id)

    def end(self) -> None:
        """The loop takes no more work. What it has not taken yet, it has to `refuse`."""
        self._ended.set()

    def finish(self) -> None:
        """Waits until what has begun is answered; what waits for its turn is refused."""
        for executor in (self._executor, self._long):
            executor.shutdown()

    def _call(self, command: AsideCommand) -> None:
        try:
            if self._ended.is_set():
                raise _ending()
            self._send(self._answer(command))
        except Exception as error:
            self._send(self._failure(command.call_id, error))

    def _answer(self, command: AsideCommand) -> Event:
        match command:
            case ImportAdapter(call_id=call_id):
                checkpoint, report = self._runner.import_adapter(
                    command.path, command.name, command.new_version, command.terms, self._on_device
                )
                return AdapterImported(call_id, checkpoint, report)
            case ExportAdapter(call_id=call_id, use=use, layout=layout, path=path):
                size, sha256 = self._runner.export_adapter(use, layout, path)
                return AdapterExported(call_id, path, size, sha256)
            case MergeAdapters(call_id=call_id):
                made = self._runner.merge_adapters(command.uses, command.rank, command.target)
                return AdapterMade(call_id, *made)
            case ExtractAdapter():
                return self._extract(command)
            case DiffAdapters(call_id=call_id, a=a, b=b):
                return AdaptersDiffed(call_id, self._runner.diff_adapters(a, b))

    def _extract(self, command: ExtractAdapter) -> AdapterMade:
        def progress(done: int, total: int) -> None:
            if self._ended.is_set():
                raise _ending()
            if command.call_id not in self._waited_for:
                raise Cancelled("nobody waits for this extraction any more")
            self._send(CallProgress(command.call_id, done, total))

        try:
            made = self._runner.extract_adapter(
                command.tuned, command.base, command.rank, command.target, progress, public=command.public
            )
        finally:
            self._waited_for.discard(command.call_id)
        return AdapterMade(command.call_id, *made)

    def _on_device(self, measure: Callable[[], float | None]) -> float | None:
        if threading.get_ident() == self._loop:
            return measure()
        work = DeviceWork(measure, Future())
        self._ask(work)
        # The loop may have ended without having seen it.
        if self._ended.is_set() and work.done.cancel():
            raise _ending()
        return work.done.result()


def _ending() -> ServerDraining:
    return ServerDraining("the worker ends; the next one can do it")
