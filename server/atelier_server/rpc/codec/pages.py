"""Page sizes and page tokens. A token is opaque to clients and belongs to one method."""

from __future__ import annotations

import base64
import json
from typing import Any

from atelier_server.rpc.codec.checks import Checks

_DEFAULT = 100
_MOST = 1000
_LARGEST = 2**63 - 1  # what a database counts to


def page_size(checks: Checks, value: int) -> int:
    """0 means 100; more than 1000 is taken as 1000; negative is refused."""
    if value < 0:
        checks.refuse("page_size", f"{value} is negative; give 1 to {_MOST}, or 0 for {_DEFAULT}")
    return min(value, _MOST) or _DEFAULT


def page_token(method: str, key: list[Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps([method, *key]).encode()).decode()


def page_key(checks: Checks, method: str, token: str, types: tuple[type, ...]) -> list[Any] | None:
    """What `page_token` was given; None for the first page or a token that is refused."""
    if not token:
        return None
    try:
        found, *key = json.loads(base64.urlsafe_b64decode(token.encode()))
        right = found == method and [type(item) for item in key] == list(types)
        if right and all(abs(item) <= _LARGEST for item in key if isinstance(item, int)):
            return list(key)
    except (ValueError, TypeError, RecursionError):
        pass
    checks.refuse("page_token", "was not given by this method")
    return None
