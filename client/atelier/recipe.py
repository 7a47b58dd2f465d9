"""Recipe files: TOML whose keys are the fields of a training, as flags and keywords have them.

Keys stand at the top level or in a table `[recipe]`. Everything that is wrong in a file is told at once.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

from atelier.fields import RecipeFields

# A file, or its content.
RecipeSource: TypeAlias = str | Path | Mapping[str, Any]

_TABLE = "recipe"
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


class RecipeError(ValueError):
    """A recipe that cannot be used. `problems`: one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


def _kinds() -> dict[str, Any]:
    hints = get_type_hints(RecipeFields)
    return {"name": str, "instance_prompt": str, **hints}


KINDS = _kinds()
"""The type of every key: name, instance_prompt and the fields of `RecipeFields`."""


def load(source: RecipeSource | None) -> dict[str, Any]:
    """The values of a recipe by field. OSError, RecipeError with every unknown key and wrong type."""
    if source is None:
        return {}
    if isinstance(source, Mapping):
        return _checked(source, "the recipe", "")
    path = Path(source)
    text = path.read_text(encoding="utf-8")
    try:
        content = tomllib.loads(text)
    except ValueError as error:
        raise RecipeError([f"{path}: not TOML: {error}"]) from None
    table = content.pop(_TABLE, {})
    if not isinstance(table, dict):
        table = {_TABLE: table}
    # A key in both is a mistake as much as an unknown one.
    twice = [f"{path}: {name} stands both above and in [{_TABLE}]" for name in content.keys() & table.keys()]
    if twice:
        raise RecipeError(sorted(twice))
    return _checked({**content, **table}, str(path), text)


def dump(values: Mapping[str, Any]) -> str:
    """The file of these values, in the order of the contract; empty ones are left out."""
    ordered = [name for name in KINDS if name in values and values[name] not in (None, "", (), [])]
    return "".join(f"{name} = {_toml(KINDS[name], values[name])}\n" for name in ordered)


def _checked(content: Mapping[str, Any], where: str, text: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in content.items():
        name, place = key.replace("-", "_"), f"{where}{_line(text, key)}"
        if name not in KINDS:
            problems.append(f"{place}: there is no field {key!r}{_nearest(name)}")
        elif wrong := _wrong(KINDS[name], value):
            problems.append(f"{place}: {key} = {_shown(value)} is not {wrong}")
        else:
            values[name] = _as(KINDS[name], value)
    if problems:
        raise RecipeError(problems)
    return values


def _as(kind: Any, value: Any) -> Any:
    """As keywords have it."""
    if kind is float:
        return float(value)
    if get_origin(kind) in (None, Literal):
        return value
    return [value] if isinstance(value, str) else list(value)


def _wrong(kind: Any, value: Any) -> str:
    """What it should be; "" if it is."""
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        return "" if value in choices else f"one of {', '.join(choices)}"
    if get_origin(kind) is not None:  # a sequence of words
        several = [value] if isinstance(value, str) else value
        right = isinstance(several, list | tuple) and all(isinstance(item, str) for item in several)
        return "" if right else "a list of strings"
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return ""
    return "" if type(value) is kind else _WORDS[kind]


def _line(text: str, key: str) -> str:
    """The line of a file that sets a key, as far as it can be told."""
    pattern = re.compile(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=|\s*\[+{re.escape(key)}\b")
    found = [number for number, line in enumerate(text.splitlines(), 1) if pattern.match(line)]
    return f", line {found[0]}" if found else ""


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name, KINDS, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _shown(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."


def _toml(kind: Any, value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if kind is float:
        return repr(float(value))
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        # JSON's escapes are TOML's, but that TOML wants one for DEL too.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return f"[{', '.join(_toml(str, item) for item in value)}]"
