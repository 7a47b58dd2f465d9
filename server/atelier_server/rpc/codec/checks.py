"""Collects everything that is wrong with a request, so that it can be said at once."""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TypeVar

from atelier_server.adapters.reference import parse_reference
from atelier_server.core import ADAPTER_NAME, AdapterRef
from atelier_server.errors import InvalidRequest, Violation
from atelier_server.rpc import caller

_SHOWN = 80
_LONGEST_WORD = 64
Word = TypeVar("Word", str, int)


class Checks:
    """Each method returns the value if it is right, else notes a violation and returns it all the same.

    Names, references and request ids come back as they are inside: with the caller's scope.
    """

    def __init__(self) -> None:
        self.violations: list[Violation] = []
        self._scope = caller.scope()

    def refuse(self, field: str, description: str) -> None:
        self.violations.append(Violation(field, description))

    def done(self) -> None:
        """Raises InvalidRequest with every violation, if there are any."""
        if self.violations:
            raise InvalidRequest.of(self.violations)

    def integer(self, field: str, value: int, low: int, high: int) -> int:
        if not low <= value <= high:
            self.refuse(field, f"{value} is not between {low} and {high}")
        return value

    def number(
        self, field: str, value: float, low: float, high: float = math.inf, *, open_low: bool = False
    ) -> float:
        """Finite and in low..high, or in (low, high] if `open_low`."""
        too_low = value <= low if open_low else value < low
        if not math.isfinite(value) or too_low or value > high:
            bound = "above" if open_low else "at least"
            upper = f" and at most {high:g}" if math.isfinite(high) else ""
            self.refuse(field, f"{value} is not a finite number {bound} {low:g}{upper}")
        return value

    def between(self, field: str, value: float) -> float:
        """In (0, 1)."""
        if not 0.0 < value < 1.0:
            self.refuse(field, f"{value} is not above 0 and below 1")
        return value

    def half_open(self, field: str, value: float) -> float:
        """In [0, 1)."""
        if not 0.0 <= value < 1.0:
            self.refuse(field, f"{value} is not at least 0 and below 1")
        return value

    def count(self, field: str, values: Collection[str], most: int, what: str) -> None:
        if len(values) > most:
            self.refuse(field, f"{len(values)} {what} are more than {most}")

    def distinct(self, field: str, values: Sequence[str]) -> None:
        if twice := next((value for i, value in enumerate(values) if value in values[:i]), None):
            self.refuse(field, f"{shown(twice)} comes more than once")

    def word(self, field: str, value: str) -> str:
        """What can stand in a prompt as one word."""
        if not value or len(value) > _LONGEST_WORD or any(c.isspace() or not c.isprintable() for c in value):
            self.refuse(field, f"{shown(value)} is not one word of 1 to {_LONGEST_WORD} characters")
        return value

    def size(self, field: str, value: int, high: int) -> int:
        if value % 8 or not 8 <= value <= high:
            self.refuse(field, f"{value} is not a multiple of 8 between 8 and {high}")
        return value

    def choice(self, field: str, value: Word, allowed: Collection[Word]) -> Word:
        if value not in allowed:
            self.refuse(field, f"{shown(value)} is none of {', '.join(map(str, allowed))}")
        return value

    def text(self, field: str, value: str, longest: int, *, empty: bool = True) -> str:
        if len(value) > longest:
            self.refuse(field, f"{len(value)} characters are more than {longest}")
        elif not empty and not value.strip():
            self.refuse(field, "must not be empty")
        return value

    def name(self, field: str, value: str) -> str:
        if not ADAPTER_NAME.fullmatch(value):
            self.refuse(field, f"{shown(value)} does not match {ADAPTER_NAME.pattern}")
        return self._scope.enter(value)

    def request_id(self, field: str, value: str) -> str:
        """Empty, or a UUID in its canonical form."""
        if not value:
            return value
        if re.fullmatch(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", value):
            return self._scope.enter(str(uuid.UUID(value)))
        self.refuse(field, f"{shown(value)} is not a UUID such as {uuid.UUID(int=0)}")
        return value

    def reference(self, field: str, value: str, *, weight: bool = False) -> AdapterRef | None:
        """NAME[@STEP|@TAG], with `weight` also [:WEIGHT]; None if it is wrong."""
        try:
            ref = parse_reference(value)
        except ValueError as error:
            self.refuse(field, str(error))
            return None
        if not weight and ":" in value:
            self.refuse(
                field, f"{shown(value)} has a weight, which means nothing here; give NAME[@STEP|@TAG]"
            )
        if not math.isfinite(ref.weight):
            self.refuse(field, f"{shown(value)} has a weight that is not finite")
        return replace(ref, name=self._scope.enter(ref.name))


def shown(value: str | int) -> str:
    """A value in a message, short whatever the user sent."""
    if not isinstance(value, str):
        return str(value)
    return repr(value if len(value) <= _SHOWN else value[: _SHOWN - 3] + "...")
