"""References as users write them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atelier_server.adapters.reference import parse_reference
from atelier_server.core import ADAPTER_NAME, AdapterRef

letters = "abcdefghijklmnopqrstuvwxyz"
names = st.builds(
    "".join,
    st.tuples(
        st.sampled_from(letters),
        st.text(letters + "0123456789-", max_size=61),
        st.sampled_from(letters + "0123456789"),
    ),
)
selectors = st.one_of(
    st.just(""),
    st.integers(0, 999_999_999).map(str),
    st.integers(1, 999).map(lambda n: f"v{n}"),
    st.builds("v{}@{}".format, st.integers(1, 999), st.integers(0, 999_999_999)),
)
weights = st.integers(-99_999, 99_999).map(lambda n: n / 1000)


@settings(deadline=None)
@given(names, selectors, weights)
def test_what_is_shown_can_be_read_again(name: str, selector: str, weight: float) -> None:
    reference = AdapterRef(name, selector, weight)
    assert parse_reference(str(reference)) == reference


@settings(deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_a_safe_reference_or_a_value_error(text: str) -> None:
    try:
        reference = parse_reference(text)
    except ValueError:
        return
    assert ADAPTER_NAME.fullmatch(reference.name)
    assert math.isfinite(reference.weight)
    assert "/" not in reference.selector
    assert "." not in reference.selector


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("otto", AdapterRef("otto")),
        ("otto@750", AdapterRef("otto", "750")),
        ("otto@0", AdapterRef("otto", "0")),
        ("otto@v2:0.8", AdapterRef("otto", "v2", 0.8)),
        ("otto@v2@750:0.8", AdapterRef("otto", "v2@750", 0.8)),
        ("otto:-1", AdapterRef("otto", "", -1.0)),
        ("o-2:1e-3", AdapterRef("o-2", "", 0.001)),
        ("otto:.5", AdapterRef("otto", "", 0.5)),
    ],
)
def test_parts(text: str, expected: AdapterRef) -> None:
    assert parse_reference(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", "Otto", "../x", "otto-", "1otto", "o" * 64, "otto\n", "otto/x", "otto\0"),
        *("otto@", "otto@-1", "otto@007", "otto@v2/..", "otto@1234567890", "otto@\u0664"),
        *("otto@v2@", "otto@v0@1", "otto@v2@07", "otto@best@7", "otto@7@v2", "otto@v2@7@7", "otto@v2@v3"),
        *("otto:", "otto:nan", "otto:inf", "otto:1e999", "otto:1_0", "otto: 1", "otto:1:2", "otto:\u0664"),
    ],
)
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_reference(text)


def test_a_huge_reference_makes_a_short_message() -> None:
    for text in ("x" * 100_000, "otto@" + "x" * 100_000, "otto:" + "9" * 100_000):
        with pytest.raises(ValueError) as caught:
            parse_reference(text)
        assert len(str(caught.value)) < 300
