"""docs/training.md names every knob with its default, and no other."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from atelier.recipe import KINDS
from atelier_server.core import METHODS, Recipe
from atelier_server.rpc import remarks

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
KNOBS = PAGE.partition("## Every knob")[2].partition("\n## ")[0]


def test_every_knob_is_there_and_no_other() -> None:
    assert set(re.findall(r"`([a-z_0-9]+)`", KNOBS)) - {"validation_loss"} == set(KINDS)


@pytest.mark.parametrize("name", [f.name for f in fields(Recipe)])
def test_defaults_that_are_numbers_are_told(name: str) -> None:
    default = getattr(Recipe("", 0), name)
    told = re.search(rf"`{name}` \[([^\]:;,]*)", KNOBS)
    if isinstance(default, bool):
        assert told
        assert told[1].startswith("yes" if default else "no")
    elif told and re.fullmatch(r"[\d.e-]+", told[1]):
        assert float(told[1]) == default


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_there(method: str) -> None:
    assert f"| `{method}`" in PAGE


def test_every_warning_of_pictures_is_there() -> None:
    source = Path(remarks.__file__).read_text(encoding="utf-8")
    reasons = set(re.findall(r'"([A-Z]+_[A-Z_]+)"', source))
    assert len(reasons) == 5
    assert all(f"`{reason}`" in PAGE for reason in reasons)
