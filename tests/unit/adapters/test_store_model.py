"""The store against a model that a child could check: any order of operations, by two servers at once."""

from __future__ import annotations

import tempfile
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from atelier_server.adapters.labels import Expect
from atelier_server.adapters.store import AdapterStore
from atelier_server.core import AdapterRef, CheckpointId
from atelier_server.errors import AdapterExists, AdapterNotFound, DataLoss, TagMoved
from tests.unit.adapters.places import Place, adopt, create, keys, lose, publish, rot

NAMES = st.sampled_from(["otto", "anna", "acme/otto"])
STEPS = st.sampled_from([1, 2, 3])
TAGS = st.sampled_from(["best", "live"])
CONTENTS = st.sampled_from([b"red", b"green", b"blue"])
WHO = st.integers(0, 1)
STATE = b"{}"  # what `publish` writes beside the weights


@dataclass
class Version:
    """What should be true of one version."""

    steps: dict[int, bytes] = field(default_factory=dict)
    note: str = ""
    deleted: bool = False
    purged: bool = False


class StoreMachine(RuleBasedStateMachine):
    """`self.model` is the truth; the two handles are what is tested. `harmed` are contents that are gone."""

    url: ClassVar[str] = ""

    @initialize()
    def open(self) -> None:
        self.scratch = Path(tempfile.mkdtemp())
        place = Place(
            f"{self.url}{uuid.uuid4().hex}" if self.url else self.scratch / "adapters", self.scratch
        )
        # Files are freed as soon as nothing names them; only what is being published is young.
        self.stores = [place.open("one"), place.open("two")]
        self.model: dict[str, dict[int, Version]] = {}
        self.tags: dict[tuple[str, str], tuple[int, int]] = {}
        self.harmed: set[bytes] = set()

    # ------------------------------------------------------------------------------------------- the model
    def visible(self, name: str) -> dict[int, Version]:
        return {n: v for n, v in self.model.get(name, {}).items() if not v.deleted}

    def newest(self, name: str) -> int | None:
        return max((n for n, v in self.visible(name).items() if v.steps), default=None)

    def find(self, name: str, selector: str) -> tuple[int, int] | None:
        visible = self.visible(name)
        if (name, selector) in self.tags:
            version, step = self.tags[name, selector]
            return (version, step) if version in visible and step in visible[version].steps else None
        if selector in ("best", "live"):
            return None
        number = int(selector[1:]) if selector.startswith("v") else self.newest(name)
        if number not in visible or not visible[number].steps:
            return None
        if selector.isdigit():
            return (number, int(selector)) if int(selector) in visible[number].steps else None
        return number, max(visible[number].steps)

    # ------------------------------------------------------------------------------------------ operations
    @rule(who=WHO, name=NAMES, new_version=st.booleans())
    def create(self, who: int, name: str, new_version: bool) -> None:
        if self.visible(name) and not new_version:
            with pytest.raises(AdapterExists):
                create(self.stores[who], name)
            return
        versions = self.model.setdefault(name, {})
        number = create(self.stores[who], name, new_version=new_version).version
        assert number == max(versions, default=0) + 1
        versions[number] = Version()

    @rule(who=WHO, name=NAMES, content=CONTENTS, new_version=st.booleans())
    def adopt(self, who: int, name: str, content: bytes, new_version: bool) -> None:
        if self.newest(name) is not None and not new_version:
            with suppress(AdapterExists):
                record = adopt(self.stores[who], name, content)
                # Taken, unless this is what was damaged under the name: then it is healed.
                assert content in self.harmed
                assert self.visible(name)[record.id.version].steps[record.id.step] == content
        else:
            versions = self.model.setdefault(name, {})
            record = adopt(self.stores[who], name, content, new_version=new_version)
            assert record.id == CheckpointId(name, max(versions, default=0) + 1, 0)
            versions[record.id.version] = Version({0: content})
        self.harmed.discard(content)  # also a refused import has brought the content

    @rule(who=WHO, name=NAMES, version=st.integers(1, 3), step=STEPS, content=CONTENTS)
    def publish(self, who: int, name: str, version: int, step: int, content: bytes) -> None:
        found = self.visible(name).get(version)

        def call() -> object:
            return publish(self.stores[who], step, version=version, content=content, name=name)

        if found is None:
            with pytest.raises(AdapterNotFound):
                call()
            return
        if found.steps.get(step, content) != content:
            with pytest.raises(AdapterExists):
                call()
        else:
            call()
            found.steps[step] = content
        self.harmed -= {content, STATE}

    @rule(who=WHO, name=NAMES, version=st.none() | st.integers(1, 3))
    def delete(self, who: int, name: str, version: int | None) -> None:
        doomed = [v for n, v in self.visible(name).items() if version in (None, n)]
        if not doomed:
            with pytest.raises(AdapterNotFound):
                self.stores[who].delete(name, version)
            return
        self.stores[who].delete(name, version)
        for found in doomed:
            found.deleted = True

    @rule(who=WHO, name=NAMES, version=st.none() | st.integers(1, 3))
    def undelete(self, who: int, name: str, version: int | None) -> None:
        back = [
            v
            for n, v in self.model.get(name, {}).items()
            if v.deleted and not v.purged and version in (None, n)
        ]
        if not back:
            with pytest.raises(AdapterNotFound):
                self.stores[who].trash.undelete(name, version)
            return
        self.stores[who].trash.undelete(name, version)
        for found in back:
            found.deleted = False

    @rule(who=WHO, now=st.booleans())
    def collect(self, who: int, now: bool) -> None:
        store = self.stores[who]
        store._blobs._grace = 0.0
        done = store.trash.collect(0 if now else 3600)
        store._blobs._grace = 86400.0
        gone = {
            (name, n)
            for name, versions in self.model.items()
            for n, v in versions.items()
            if now and v.deleted and not v.purged
        }
        assert set(done.versions) == gone
        for name, number in gone:
            self.model[name][number].purged = True

    @rule(
        who=WHO, name=NAMES, tag=TAGS, step=STEPS, expected=st.sampled_from(["any", "none", "right", "wrong"])
    )
    def tag(self, who: int, name: str, tag: str, step: int, expected: str) -> None:
        found = self.find(name, str(step))
        if found is None:
            return
        target, was = CheckpointId(name, *found), self.tags.get((name, tag))
        expect: CheckpointId | Expect = Expect.ANYTHING
        fails = False
        if expected == "none":
            expect, fails = Expect.NOTHING, was is not None
        elif expected == "right" and was is not None:
            expect = CheckpointId(name, *was)
        elif expected == "wrong":
            expect, fails = CheckpointId(name, 99, 99), True
        if fails:
            with pytest.raises(TagMoved):
                self.stores[who].labels.tag(name, tag, target, expect)
            return
        told = self.stores[who].labels.tag(name, tag, target, expect)
        assert told == (CheckpointId(name, *was) if was else None)
        self.tags[name, tag] = found

    @rule(who=WHO, name=NAMES, tag=TAGS)
    def untag(self, who: int, name: str, tag: str) -> None:
        if (name, tag) not in self.tags:
            with pytest.raises(AdapterNotFound):
                self.stores[who].labels.tag(name, tag, None, Expect.ANYTHING)
            return
        self.stores[who].labels.tag(name, tag, None, Expect.ANYTHING)
        del self.tags[name, tag]

    @rule(who=WHO, name=NAMES, text=st.sampled_from(["", "a note", "another"]))
    def note(self, who: int, name: str, text: str) -> None:
        if (number := self.newest(name)) is not None:
            self.stores[who].labels.note(name, number, text)
            self.model[name][number].note = text

    @precondition(lambda self: self.newest("otto") is not None)
    @rule(who=WHO, how=st.sampled_from([rot, lose]))
    def harm(self, who: int, how: object) -> None:
        """A disk forgets or garbles one content; somebody reads it."""
        store = self.stores[who]
        record = store.find(AdapterRef("otto"))
        content = self.model["otto"][record.id.version].steps[record.id.step]
        for handle in self.stores:
            if handle._blobs._cache is not None:
                handle._blobs._cache.drop(record.sha256)
            handle._blobs._verified.clear()
        how(store, b"garbage", record.sha256) if how is rot else how(store, record.sha256)  # type: ignore[operator]
        with pytest.raises(DataLoss):
            store.file(record.id)
        self.harmed.add(content)

    # ------------------------------------------------------------------------------------------ invariants
    @invariant()
    def both_see_the_model(self) -> None:
        for store in self.stores:
            for deleted in (False, True):
                seen = {
                    (v.meta.name, v.meta.version): ({r.id.step for r in v.checkpoints}, v.note)
                    for v in store.versions(deleted=deleted)
                }
                assert seen == {
                    (name, n): (set(v.steps), v.note)
                    for name, versions in self.model.items()
                    for n, v in versions.items()
                    if v.deleted is deleted and not v.purged
                }

    @invariant()
    def references_and_contents_are_right(self) -> None:
        for name in self.model:
            for selector in ("", "0", "1", "2", "v1", "v2", "best", "live"):
                expected = self.find(name, selector)
                for store in self.stores:
                    self._check(store, AdapterRef(name, selector), expected)

    def _check(self, store: AdapterStore, ref: AdapterRef, expected: tuple[int, int] | None) -> None:
        if expected is None:
            with pytest.raises(AdapterNotFound):
                store.find(ref)
            return
        record = store.find(ref)
        assert (record.id.version, record.id.step) == expected
        content = self.model[ref.name][expected[0]].steps[expected[1]]
        if content in self.harmed:
            assert record.damaged
            with pytest.raises(DataLoss, match=str(record.id)):
                store.resolve(ref)
        else:
            assert not record.damaged
            assert store.fetch(store.resolve(ref)).read_bytes() == content

    def teardown(self) -> None:
        """Whatever has been done: when all is deleted and collected, only the notes of deletions are left."""
        for name in self.model:
            if self.visible(name):
                self.stores[0].delete(name)
        self.stores[1]._blobs._grace = 0.0
        self.stores[1].trash.collect(0)
        left = {key for key in keys(self.stores[0]) if "/deleted/" not in key and "/tags/" not in key}
        assert left == set()


class RemoteMachine(StoreMachine):
    """The same on the code for object stores, in fsspec's own memory."""

    url = "memory://store/"


@pytest.mark.parametrize("machine", [StoreMachine, RemoteMachine])
def test_a_sample(machine: type[StoreMachine]) -> None:
    _run(machine, examples=12, steps=20)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("machine", [StoreMachine, RemoteMachine])
def test_many(machine: type[StoreMachine]) -> None:
    _run(machine, examples=150, steps=40)


def _run(machine: type[StoreMachine], *, examples: int, steps: int) -> None:
    case = machine.TestCase()
    case.settings = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=examples < 100,
    )
    case.runTest()
