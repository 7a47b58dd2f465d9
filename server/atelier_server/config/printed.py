"""Settings as a TOML file: what `--print-config` shows, and `--config` reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic import SecretStr

from atelier_server.config.reading import SETTINGS, Given, Key
from atelier_server.config.settings import Settings

_MASK = "********"
_PASSWORD = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def as_toml(settings: Settings, given: Mapping[Key, Given]) -> str:
    """Every setting, with its source; what is not set is a comment. Secrets are masked."""
    lines: list[str] = []
    table: Key = ()
    for setting in SETTINGS:
        if setting.key[:-1] != table:
            table = setting.key[:-1]
            lines += ["", f"[{'.'.join(table)}]"]
        value: Any = settings
        for part in setting.key:
            value = getattr(value, part)
        source = f"  # {given[setting.key].source}" if setting.key in given else ""
        name = setting.key[-1]
        lines.append(f"# {name} is not set" if value is None else f"{name} = {_toml(value)}{source}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple | list):
        return f"[{', '.join(_toml(item) for item in value)}]"
    text = _MASK if isinstance(value, SecretStr) else _PASSWORD.sub(_MASK, str(value))
    # JSON's escapes are TOML's.
    return json.dumps(text, ensure_ascii=False)
