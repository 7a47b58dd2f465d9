"""What a name of a tenant's is inside the server, and what of it can be seen outside."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atelier_server.access.tenants import TENANT_NAME, Scope, Tenant

NAMES = st.from_regex(TENANT_NAME, fullmatch=True)


def test_the_default_tenant_has_no_scope() -> None:
    assert Tenant().scope == Scope("")
    assert Tenant("red").scope == Scope("red")


@given(NAMES, NAMES)
def test_what_enters_is_owned_and_leaves_as_it_came(tenant: str, name: str) -> None:
    scope = Scope(tenant)
    inside = scope.enter(name)
    assert scope.owns(inside)
    assert scope.leave(f"{inside}@750") == f"{name}@750"
    assert not Scope("").owns(inside)
    assert Scope("").owns(name)
    assert not scope.owns(name)


@given(NAMES, NAMES, NAMES)
def test_no_tenant_owns_what_is_anothers(one: str, other: str, name: str) -> None:
    assert Scope(one).owns(Scope(other).enter(name)) == (one == other)


@pytest.mark.parametrize(
    ("inside", "outside"),
    [
        ("there is no adapter 'red/otto'", "there is no adapter 'otto'"),
        ("red/otto@1 and red/bolt", "otto@1 and bolt"),
        ("infrared/otto", "infrared/otto"),
        ("blue/red/otto", "blue/red/otto"),
        ("red", "red"),
    ],
)
def test_a_message_is_read_without_the_scope(inside: str, outside: str) -> None:
    assert Scope("red").leave(inside) == outside
    assert Scope("").leave(inside) == inside


def test_nothing_stays_nothing() -> None:
    assert Scope("red").enter("") == ""
