"""A receipt has everything that decides, under the contract's names."""

from __future__ import annotations

import json
from dataclasses import fields

from atelier.v1 import generation_pb2
from atelier_server.core import Mode
from atelier_server.receipt import AdapterReceipt, Receipt, receipt
from tests.contract.fake_worker import BASE
from tests.fakes import generation, use


def test_its_fields_are_those_of_the_contract() -> None:
    told_by_the_front = {"create_time"}
    names = set(generation_pb2.Receipt.DESCRIPTOR.fields_by_name)
    assert {field.name for field in fields(Receipt)} == names - told_by_the_front
    adapter = set(generation_pb2.Receipt.Adapter.DESCRIPTOR.fields_by_name)
    assert {field.name for field in fields(AdapterReceipt)} == adapter


def test_a_fast_picture_names_the_bucket_it_was_painted_in() -> None:
    job = generation("g", adapters=(use("otto", 750, weight=0.5),))
    made = receipt(job, BASE, seed=4, num_images=1, buckets=[2, 4, 2])
    assert (made.reproducibility, made.batch_bucket, made.seed) == (Mode.FAST, 4, 4)
    assert made.batch_buckets == (2, 4, 2)
    embedded = json.loads(json.dumps(made.embedded()))
    assert embedded["adapters"] == [
        {"name": "otto", "version": 1, "step": 750, "weight": 0.5, "sha256": "", "weights": []}
    ]
    assert (embedded["reproducibility"], embedded["versions"]["torch"]) == ("fast", "none")


def test_no_negative_prompt_is_not_an_empty_one() -> None:
    def told(negative: str | None) -> tuple[str, bool]:
        job = generation("g", negative_prompt=negative)
        made = receipt(job, BASE, seed=4, num_images=1, buckets=[4])
        return made.negative_prompt, made.empty_negative_prompt

    assert [told(text) for text in (None, "", "blue")] == [("", False), ("", True), ("blue", False)]


def test_a_strict_one_names_its_own() -> None:
    job = generation("g", mode=Mode.STRICT, bucket=8)
    assert receipt(job, BASE, seed=4, num_images=1, buckets=[8, 8]).batch_buckets == ()


def test_an_adapter_is_named_as_its_tenant_names_it() -> None:
    made = receipt(generation("g", adapters=(use("red/otto", 750),)), BASE, seed=4, num_images=1, buckets=[4])
    assert made.adapters[0].name == "otto"
