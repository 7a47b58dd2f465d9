"""Phases of a job as spans, for whoever traces the call that it comes from."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic, time

from atelier_server.messages import Event, Span
from atelier_server.origin import Origin


def tell(
    emit: Callable[[Event], None],
    origin: Origin,
    name: str,
    began: float,
    ended: float,
    **attributes: str | int | float,
) -> None:
    """Emits a span from `began` to `ended` (monotonic seconds); nothing where nobody traces."""
    if origin.traced:
        since_1970 = time() - monotonic()
        start, end = (round((since_1970 + moment) * 1e9) for moment in (began, ended))
        emit(Span(name, origin, start, end, tuple(attributes.items())))
