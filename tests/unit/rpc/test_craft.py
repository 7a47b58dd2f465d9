"""Requests to merge, extract and compare: all violations at once, weights added, no strangers' paths."""

from __future__ import annotations

import pytest

from atelier.v1 import adapter_pb2 as pb
from atelier_server.access.tenants import Tenant
from atelier_server.config import Limits
from atelier_server.errors import InvalidRequest
from atelier_server.report import AdapterComparison, BlockComparison, ModuleComparison
from atelier_server.rpc.codec.craft import decode_diff, decode_extract, decode_merge, encode_diff
from tests.fakes import use

LIMITS = Limits()


def fields(error: InvalidRequest) -> list[str]:
    return [violation.field for violation in error.violations]


def test_a_merge_names_each_checkpoint_once_with_its_whole_weight() -> None:
    request = pb.MergeAdaptersRequest(adapters=["a:0.5", "b@7", "a:0.25", "a@v1:2"], name="c", rank=4)
    refs, target, rank = decode_merge(request, LIMITS)
    assert [(ref.name, ref.selector, ref.weight) for ref in refs] == [
        ("a", "", 0.75),
        ("b", "7", 1.0),
        ("a", "v1", 2.0),
    ]
    assert (target.name, target.new_version, rank) == ("c", False, 4)
    assert decode_merge(pb.MergeAdaptersRequest(adapters=["a"], name="c"), LIMITS)[2] is None


def test_all_that_is_wrong_with_a_merge_is_told() -> None:
    request = pb.MergeAdaptersRequest(adapters=["A", "b:x"], name="C", rank=0, trigger="x" * 10**6)
    with pytest.raises(InvalidRequest) as refusal:
        decode_merge(request, LIMITS)
    assert fields(refusal.value) == ["adapters[0]", "adapters[1]", "rank", "trigger", "name"]
    for adapters in ([], ["a"] * 33):
        with pytest.raises(InvalidRequest, match="not between 1 and 32"):
            decode_merge(pb.MergeAdaptersRequest(adapters=adapters, name="c"), LIMITS)
    with pytest.raises(InvalidRequest, match=f"{LIMITS.max_lora_rank + 1} is not between"):
        decode_merge(pb.MergeAdaptersRequest(adapters=["a"], name="c", rank=LIMITS.max_lora_rank + 1), LIMITS)


def test_all_that_is_wrong_with_an_extraction_is_told() -> None:
    with pytest.raises(InvalidRequest) as refusal:
        decode_extract(pb.ExtractAdapterRequest(base="x" * 10**4), LIMITS, Tenant())
    assert fields(refusal.value) == ["rank", "tuned", "base", "name"]


@pytest.mark.parametrize(
    "path",
    [
        *("/models/tuned", "./tuned", "~/tuned", "../x", "tuned.safetensors"),
        *("models", "models/../../etc", "models/sd/tuned", "owner/tuned.safetensors", "owner/name\n"),
    ],
)
def test_only_a_server_with_one_tenant_reads_its_own_files(path: str) -> None:
    request = pb.ExtractAdapterRequest(tuned=path, name="c", rank=4)
    assert decode_extract(request, LIMITS, Tenant()).name == "c"
    with pytest.raises(InvalidRequest, match=r"tuned: .* is no hub id"):
        decode_extract(request, LIMITS, Tenant("red"))
    for public in ("owner/name", "pocket"):
        request = pb.ExtractAdapterRequest(tuned=public, name="c", rank=4)
        assert decode_extract(request, LIMITS, Tenant("red")).name == "c"
    request = pb.ExtractAdapterRequest(tuned="owner/name", base=path, name="c", rank=4)
    with pytest.raises(InvalidRequest, match=r"base: .* is no hub id"):
        decode_extract(request, LIMITS, Tenant("red"))


def test_a_comparison_has_two_references_without_weights() -> None:
    a, b = decode_diff(pb.DiffAdaptersRequest(a="a@7", b="b"))
    assert (a.name, a.selector, b.name) == ("a", "7", "b")
    with pytest.raises(InvalidRequest) as refusal:
        decode_diff(pb.DiffAdaptersRequest(a="a:0.5", b=""))
    assert fields(refusal.value) == ["a", "b"]


def test_a_comparison_comes_back_whole() -> None:
    block = BlockComparison("unet.mid_block", 1.0, 2.0, 3.0, None)
    comparison = AdapterComparison(
        ("x",), ("y", "z"), 5, (ModuleComparison("m", "lora", 4, 2.0, "full", 0, 0.0),), (block,), block
    )
    message = encode_diff(use("a"), use("b"), comparison)
    assert (message.a, message.b, message.common) == ("a@v1@100", "b@v1@100", 5)
    assert (list(message.only_a), list(message.only_b)) == (["x"], ["y", "z"])
    assert (message.differing[0].rank_a, message.differing[0].kind_b) == (4, "full")
    assert (message.whole.norm_b, message.whole.HasField("cosine")) == (2.0, False)
