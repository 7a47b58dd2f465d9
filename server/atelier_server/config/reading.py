"""Settings from flags, ATELIER_* variables and a TOML file, in this order of precedence.

Everything that is wrong in any of them is told at once. The only place that looks at the environment.
"""

from __future__ import annotations

import argparse
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from atelier_server.config.settings import Settings

Key = tuple[str, ...]
_PREFIXES = {"limits": "LIMIT", "quotas": "QUOTA"}
# Variables of the client: they may be set where a server runs.
_CLIENTS = {
    f"ATELIER_{name}" for name in ("SERVER", "TOKEN", "TOKEN_FILE", "TLS", "TLS_CA", "TLS_CERT", "TLS_KEY")
}
# Kubernetes tells every pod of a Service named atelier.
_SERVICE_LINK = re.compile(r"ATELIER_(\w+_)?(SERVICE_HOST|SERVICE_PORT\w*|PORT(_\d+_(TCP|UDP)\w*)?)")
_MISSING = object()


class BadSettings(Exception):
    """`problems`: one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of Settings, or of a table within it, under its three names."""

    key: Key
    field: FieldInfo

    @property
    def flag(self) -> str:
        return "--" + ".".join(self.key).replace("_", "-")

    @property
    def variable(self) -> str:
        head = [_PREFIXES.get(self.key[0], self.key[0]), *self.key[1:]]
        return "_".join(["ATELIER", *head]).upper()

    @property
    def is_switch(self) -> bool:
        return self.field.annotation is bool

    @property
    def is_repeated(self) -> bool:
        return get_origin(self.field.annotation) is tuple


@dataclass(frozen=True, slots=True)
class Given:
    """A value as it was given, and where."""

    value: Any
    source: str


def _settings(model: type[BaseModel], above: Key = ()) -> list[Setting]:
    found: list[Setting] = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += _settings(kind, (*above, name))
        else:
            found.append(Setting((*above, name), field))
    return found


SETTINGS = tuple(_settings(Settings))


def read(arguments: Sequence[str], environ: Mapping[str, str]) -> tuple[Settings, dict[Key, Given]]:
    """The settings, and where each that was given came from. Raises BadSettings; exits for --help."""
    problems: list[str] = []
    flags, file = _flags(arguments, problems)
    variables = _variables(environ, problems)
    path = file or environ.get("ATELIER_CONFIG")
    given = {**(_file(Path(path), problems) if path else {}), **variables, **flags}
    settings = _validated(given, problems)
    if problems or settings is None:
        raise BadSettings(problems)
    return settings, given


def wants_print(arguments: Sequence[str]) -> bool:
    return "--print-config" in arguments


# ----------------------------------------------------------------------------------------------- sources
def _flags(arguments: Sequence[str], problems: list[str]) -> tuple[dict[Key, Given], str | None]:
    known, rest = _parser().parse_known_args(list(arguments))
    names = [setting.flag for setting in SETTINGS] + ["--config", "--print-config"]
    after_unknown = False
    for word in rest:
        if word.startswith("-"):
            problems.append(
                f"{word.partition('=')[0]}: there is no such flag{_nearest(word.partition('=')[0], names)}"
            )
            after_unknown = "=" not in word
        elif not after_unknown:
            problems.append(f"{word[:100]!r}: belongs to no flag")
        else:
            after_unknown = False
    found: dict[Key, Given] = {}
    for setting in SETTINGS:
        value = getattr(known, ".".join(setting.key))
        if value is _MISSING or (isinstance(value, list) and _MISSING in value):
            problems.append(f"{setting.flag}: needs a value")
        elif value is not None:
            found[setting.key] = Given(value, setting.flag)
    if known.config is _MISSING:
        problems.append("--config: needs a file")
    return found, known.config if isinstance(known.config, str) else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="atelier serve",
        usage="atelier serve [FLAG VALUE]...",
        allow_abbrev=False,
        description="Run a server. Every flag is also a variable and a key of the file, by the names shown.",
    )
    parser.add_argument(
        "--config", nargs="?", const=_MISSING, metavar="FILE", help="settings, TOML (ATELIER_CONFIG)"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="show all settings as such a file, and end"
    )
    groups = {name: parser.add_argument_group(name) for name in _PREFIXES}
    for setting in SETTINGS:
        group = groups.get(setting.key[0], parser)
        shape: dict[str, Any] = (
            {"action": argparse.BooleanOptionalAction}
            if setting.is_switch
            else {
                "action": "append" if setting.is_repeated else "store",
                "nargs": "?",
                "const": _MISSING,
                "metavar": setting.key[-1].rpartition("_")[2].upper(),
            }
        )
        group.add_argument(
            setting.flag, dest=".".join(setting.key), default=None, help=_help(setting), **shape
        )
    return parser


def _help(setting: Setting) -> str:
    default = setting.field.get_default(call_default_factory=True)
    words = [setting.field.description or "", f"[{setting.variable}]"]
    if default not in (None, ()) and not setting.is_switch:
        words.append(f"(default {default})")
    return " ".join(word for word in words if word).replace("%", "%%")


def _variables(environ: Mapping[str, str], problems: list[str]) -> dict[Key, Given]:
    by_name = {setting.variable: setting for setting in SETTINGS}
    found: dict[Key, Given] = {}
    for name, value in environ.items():
        if not name.startswith("ATELIER_") or not value:
            continue
        if name == "ATELIER_PORT" and value.startswith("tcp://"):
            problems.append(
                f"{name}: {value[:100]!r} comes from a Kubernetes Service named atelier; "
                "set enableServiceLinks: false on the pod"
            )
        elif (setting := by_name.get(name)) is not None:
            found[setting.key] = Given(value, name)
        elif name not in _CLIENTS and name != "ATELIER_CONFIG" and not _SERVICE_LINK.fullmatch(name):
            problems.append(f"{name}: there is no such variable{_nearest(name, by_name)}")
    return found


def _file(path: Path, problems: list[str]) -> dict[Key, Given]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(f"--config: {path} cannot be read: {error.strerror}")
        return {}
    except ValueError as error:
        problems.append(f"--config: {path} is not TOML: {error}")
        return {}
    keys = {".".join(setting.key): setting.key for setting in SETTINGS}
    found: dict[Key, Given] = {}
    for name, value in _leaves(content):
        if name in keys:
            found[keys[name]] = Given(value, f"{name} in {path}")
        else:
            problems.append(f"{name} in {path}: there is no such key{_nearest(name, keys)}")
    return found


def _leaves(table: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in table.items():
        path = above + name.replace("-", "_")
        found += _leaves(value, f"{path}.") if isinstance(value, dict) else [(path, value)]
    return found


def _nearest(name: str, names: Any) -> str:
    close = get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


# ---------------------------------------------------------------------------------------------- together
def _validated(given: Mapping[Key, Given], problems: list[str]) -> Settings | None:
    """Adds one problem a bad value, and those of the settings that do not fit together."""
    left = dict(given)
    while True:
        try:
            return Settings.model_validate(_nested(left))
        except ValidationError as error:
            items = error.errors(include_url=False)
            problems += [line for item in items for line in _problem(item, left).splitlines()]
            bad = {tuple(str(part) for part in item["loc"]) for item in items} & left.keys()
            if not bad:
                return None
            # Once more without the bad ones: the others may not fit together either.
            for key in bad:
                del left[key]


def _nested(given: Mapping[Key, Given]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, item in given.items():
        table = values
        for part in key[:-1]:
            table = table.setdefault(part, {})
        table[key[-1]] = item.value
    return values


def _problem(item: Any, given: Mapping[Key, Given]) -> str:
    """A line a problem: the setting under its names, what is wrong, what was given."""
    key = tuple(str(part) for part in item["loc"])
    text = str(item["msg"]).removeprefix("Value error, ")
    if key not in given:
        return text
    setting = next(setting for setting in SETTINGS if setting.key == key)
    source = "" if given[key].source in (setting.flag, setting.variable) else f" from {given[key].source}"
    return f"{setting.flag} ({setting.variable}): {text}; got {repr(item['input'])[:100]}{source}"
