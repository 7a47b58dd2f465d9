"""Tags, notes and thumbnails, in a folder and in an S3 bucket."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from atelier_server.adapters.labels import TAG, Expect
from atelier_server.adapters.store import AdapterStore
from atelier_server.core import AdapterRef, CheckpointId
from atelier_server.errors import AdapterNotFound, TagMoved
from tests.unit.adapters.places import Place, adopt, create, publish

FIRST, SECOND, THIRD = CheckpointId("otto", 1, 100), CheckpointId("otto", 1, 200), CheckpointId("otto", 2, 0)


@pytest.fixture
def otto(store: AdapterStore) -> AdapterStore:
    create(store)
    publish(store, 100)
    publish(store, 200, content=b"later")
    return store


def test_a_tag_is_set_moved_and_removed(place: Place, otto: AdapterStore) -> None:
    other = place.open("two")
    assert otto.labels.tag("otto", "best", FIRST, Expect.ANYTHING) is None
    assert other.resolve(AdapterRef("otto", "best")).checkpoint == FIRST
    assert other.labels.tag("otto", "best", SECOND, FIRST) == FIRST
    assert otto.resolve(AdapterRef("otto", "best")).checkpoint == SECOND
    assert otto.labels.tag("otto", "best", SECOND, Expect.ANYTHING) == SECOND  # it is there already
    otto.labels.tag("otto", "production", FIRST, Expect.NOTHING)
    (version,) = other.versions()
    assert version.tags == ("v1", "best", "production")
    assert [record.tags for record in version.checkpoints] == [("production",), ("best",)]
    assert other.labels.tag("otto", "best", None, Expect.ANYTHING) == SECOND
    with pytest.raises(AdapterNotFound):
        otto.resolve(AdapterRef("otto", "best"))
    with pytest.raises(AdapterNotFound):
        otto.labels.tag("otto", "best", None, Expect.ANYTHING)
    otto.labels.tag("otto", "best", FIRST, Expect.NOTHING)
    assert otto.versions()[0].tags == ("v1", "best", "production")


def test_a_tag_keeps_to_its_version(otto: AdapterStore) -> None:
    otto.labels.tag("otto", "production", SECOND, Expect.ANYTHING)
    adopt(otto, content=b"newer", new_version=True)
    assert otto.resolve(AdapterRef("otto")).checkpoint == THIRD
    assert otto.resolve(AdapterRef("otto", "production")).checkpoint == SECOND
    otto.labels.tag("otto", "production", THIRD, SECOND)
    otto.delete("otto", 2)
    with pytest.raises(AdapterNotFound, match="otto@production"):
        otto.resolve(AdapterRef("otto", "production"))
    assert otto.resolve(AdapterRef("otto")).checkpoint == SECOND


@pytest.mark.parametrize("expected", [Expect.NOTHING, SECOND, CheckpointId("otto", 9, 9)])
def test_a_tag_that_is_elsewhere_is_not_moved(otto: AdapterStore, expected: CheckpointId | Expect) -> None:
    otto.labels.tag("otto", "best", FIRST, Expect.ANYTHING)
    for target in (SECOND, None):
        with pytest.raises(TagMoved, match="v1@100"):
            otto.labels.tag("otto", "best", target, expected)
    assert otto.resolve(AdapterRef("otto", "best")).checkpoint == FIRST


def test_of_many_moves_at_once_one_happens(place: Place, otto: AdapterStore) -> None:
    otto.labels.tag("otto", "best", FIRST, Expect.ANYTHING)

    def move(number: int) -> bool:
        try:
            place.open(f"mover-{number}").labels.tag("otto", "best", SECOND, FIRST)
        except TagMoved:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        moved = list(pool.map(move, range(4)))
    assert moved.count(True) == 1
    assert otto.resolve(AdapterRef("otto", "best")).checkpoint == SECOND


@pytest.mark.parametrize("tag", ["best", "b", "my-tag2", "v", "vim", "v2-final", "a" * 32])
def test_a_tag(tag: str) -> None:
    assert TAG.fullmatch(tag)


@pytest.mark.parametrize("tag", ["", "v1", "v0", "v12", "7", "750", "-a", "a-", "A", "a_b", "a/b", "a" * 33])
def test_no_tag(otto: AdapterStore, tag: str) -> None:
    assert not TAG.fullmatch(tag)
    with pytest.raises(ValueError, match="is no tag"):
        otto.labels.tag("otto", tag, FIRST, Expect.ANYTHING)


def test_notes_and_thumbnails(place: Place, otto: AdapterStore) -> None:
    other = place.open("two")
    otto.labels.note("otto", 1, "learned on a rainy day")
    otto.labels.set_thumbnail(FIRST, b"early")
    otto.labels.set_thumbnail(SECOND, b"late")
    otto.labels.set_thumbnail(SECOND, b"late once more")
    (version,) = other.versions()
    assert version.note == "learned on a rainy day"
    assert other.labels.thumbnails([version.thumbnail, "", "names/gone"]) == {version.thumbnail: b"late"}
    other.labels.note("otto", 1, "")
    assert otto.versions()[0].note == ""
