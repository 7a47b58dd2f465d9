"""Valid files, damaged at random: each is refused with its cause, or taken with every tensor accounted for.

What no reader can see, other numbers in the data, is a valid file with other weights.
"""

from __future__ import annotations

import json
import math
import pickle
import random
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from atelier_server.adapters.canonical import CanonicalAdapter, DenseModule, LoraModule, tensors_of
from atelier_server.adapters.exporter import write_adapter
from atelier_server.adapters.importer import Base, import_file
from atelier_server.errors import AdapterMismatch, UnsupportedFormat
from atelier_server.report import ImportTerms
from tests.unit.adapters.small import SD1, SDXL

SAMPLE, ALL = 300, 10_000
MOST_MEMORY_KB = 300 * 1024
DTYPES = ("F16", "I32", "F64", "BOOL", "F8_E4M3", "X", "")
TOLD = (
    "",
    "{",
    "[" * 50_000,
    '{"r": []}',
    '{"unet.alpha_pattern": 3}',
    '{"lora_alpha": 1e999}',
    "x" * 100_000,
)
SHOWN = 300  # characters of a message that names its cause


class Damaged:
    """A safetensors file taken apart: a header that need not be true, and data."""

    def __init__(self, content: bytes) -> None:
        (size,) = struct.unpack("<Q", content[:8])
        self.header: dict[str, Any] = json.loads(content[8 : 8 + size])
        self.data = bytearray(content[8 + size :])

    @property
    def keys(self) -> list[str]:
        return sorted(key for key in self.header if key != "__metadata__")

    def bytes(self) -> bytes:
        text = json.dumps(self.header).encode()
        return struct.pack("<Q", len(text)) + text + bytes(self.data)


Mutation = Callable[[bytes, random.Random], bytes]


def truncated(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def lengthened(content: bytes, chance: random.Random) -> bytes:
    return content + chance.randbytes(chance.randrange(1, 64))


def flipped(content: bytes, chance: random.Random) -> bytes:
    """A few bytes anywhere in the first part of the file, which is mostly header."""
    damaged = bytearray(content)
    for _ in range(chance.randrange(1, 4)):
        damaged[chance.randrange(min(len(damaged), 4000))] = chance.randrange(256)
    return bytes(damaged)


def huge_header(content: bytes, chance: random.Random) -> bytes:
    return struct.pack("<Q", chance.choice([2**24 + 1, 2**32, 2**63, 2**64 - 1])) + content[8:]


def pickled(content: bytes, chance: random.Random) -> bytes:
    return pickle.dumps({"weight": content[:100]}, protocol=chance.choice([2, 3, 4, 5]))


def renamed(content: bytes, chance: random.Random) -> bytes:
    """A letter of a key is another, or the key is another's."""
    file = Damaged(content)
    key = chance.choice(file.keys)
    place = chance.randrange(len(key))
    other = key[:place] + chance.choice("abx_.0/\\\u00e9 ") + key[place + 1 :]
    others = [name for name in file.keys if name != key]
    file.header[chance.choice([other, *others[:1]])] = file.header.pop(key)
    return file.bytes()


def reordered(content: bytes, chance: random.Random) -> bytes:
    file = Damaged(content)
    items = list(file.header.items())
    chance.shuffle(items)
    file.header = dict(items)
    return file.bytes()


def reshaped(content: bytes, chance: random.Random) -> bytes:
    """Another shape, with as many values or not."""
    file = Damaged(content)
    entry = file.header[chance.choice(file.keys)]
    shape: list[int] = list(entry["shape"])
    match chance.randrange(5):
        case 0:
            chance.shuffle(shape)
        case 1:
            shape = [math.prod(shape)]
        case 2:
            shape.insert(chance.randrange(len(shape) + 1), chance.choice([0, 1, 2, -1, 2**40]))
        case 3 if shape:
            shape[chance.randrange(len(shape))] = chance.choice([0, 1, 3, 2**62, -3])
        case _:
            shape = shape[::-1]
    entry["shape"] = shape
    return file.bytes()


def overlapping(content: bytes, chance: random.Random) -> bytes:
    file = Damaged(content)
    one, two = chance.choice(file.keys), chance.choice(file.keys)
    offsets = list(file.header[two]["data_offsets"])
    offsets[chance.randrange(2)] += chance.choice([-4, 0, 4, 2**40])
    file.header[one]["data_offsets"] = offsets
    return file.bytes()


def another_dtype(content: bytes, chance: random.Random) -> bytes:
    file = Damaged(content)
    file.header[chance.choice(file.keys)]["dtype"] = chance.choice(
        ["F16", "I32", "F64", "BOOL", "F8_E4M3", "X", ""]
    )
    return file.bytes()


def not_finite(content: bytes, chance: random.Random) -> bytes:
    file = Damaged(content)
    key = chance.choice([key for key in file.keys if file.header[key]["dtype"] == "F32"])
    begin, end = file.header[key]["data_offsets"]
    place = begin + 4 * chance.randrange((end - begin) // 4)
    file.data[place : place + 4] = struct.pack("<f", chance.choice([math.nan, math.inf, -math.inf]))
    return file.bytes()


def another_header(content: bytes, chance: random.Random) -> bytes:
    """What the header tells in words is anything at all."""
    file = Damaged(content)
    metadata = file.header.setdefault("__metadata__", {})
    key = chance.choice([*metadata, "lora_adapter_metadata", "software", "modelspec.trigger_phrase", "name"])
    metadata[key] = chance.choice(TOLD)
    return file.bytes()


def dropped(content: bytes, chance: random.Random) -> bytes:
    file = Damaged(content)
    del file.header[chance.choice(file.keys)]
    return file.bytes()


def not_an_object(content: bytes, chance: random.Random) -> bytes:
    file = Damaged(content)
    file.header[chance.choice(file.keys)] = chance.choice([None, [], {}, 3, {"dtype": "F32"}])
    return file.bytes()


MUTATIONS: tuple[Mutation, ...] = (
    truncated,
    lengthened,
    flipped,
    huge_header,
    pickled,
    renamed,
    reordered,
    reshaped,
    overlapping,
    another_dtype,
    not_finite,
    another_header,
    dropped,
    not_an_object,
)
REFUSED = {truncated, lengthened, huge_header, pickled, not_finite, dropped, not_an_object}


def corpus(folder: Path) -> list[tuple[Base, bytes]]:
    """Files of every layout, with all that they can hold."""
    generator = torch.Generator().manual_seed(0)
    files = []
    for base in (SD1, SDXL):
        low_rank, dense = {}, {}
        for number, (name, shape) in enumerate(sorted(base.shapes.items())):
            out, *features = shape
            if len(shape) == 1:
                dense[name] = DenseModule(torch.randn(out, generator=generator))
                continue
            rank = 1 + number % 3
            A = torch.randn(rank, *features, generator=generator)
            B = torch.randn(out, rank, *(1 for _ in features[1:]), generator=generator)
            low_rank[name] = LoraModule(A, B, 1.5 + number)
        tokens = {
            "<sks>": {name: torch.randn(2, width, generator=generator) for name, width in base.widths.items()}
        }
        plain = CanonicalAdapter(low_rank, tokens, ("sks",), {"ss_epoch": "3"}, base.family)
        full = CanonicalAdapter(low_rank | dense, tokens, (), {}, base.family)
        for adapter, layout in (
            (plain, "diffusers"),
            (plain, "peft"),
            (full, "kohya"),
            (plain, "textual-inversion"),
        ):
            write_adapter(adapter, folder / "x", layout, None, base.names)  # type: ignore[arg-type]
            files.append((base, (folder / "x").read_bytes()))
    return files


def assert_complete(path: Path, base: Base) -> None:
    """Every value of the file is somewhere in the adapter, in the shape that the base has for it."""
    adapter, report = import_file(path, base)
    assert report.coverage == 1.0
    assert not report.unmatched
    with safe_open(path, framework="pt") as file:
        held = sum(file.get_tensor(key).numel() for key in file.keys() if not key.endswith(".alpha"))  # noqa: SIM118
    found = [tensor for module in adapter.modules.values() for _, tensor in tensors_of(module)]
    found += [tensor for vectors in adapter.tokens.values() for tensor in vectors.values()]
    assert sum(tensor.numel() for tensor in found) == held
    assert all(bool(tensor.isfinite().all()) for tensor in found)
    for name, module in adapter.low_rank.items():
        out, *features = base.shapes[name]
        assert module.A.shape == (module.rank, *features)
        assert module.B.shape[:2] == (out, module.rank)
        assert math.isfinite(module.alpha)


def refusal(path: Path, base: Base, terms: ImportTerms) -> str:
    """What an import says against the file, "" if it takes it."""
    try:
        report = import_file(path, base, terms)[1]
    except (UnsupportedFormat, AdapterMismatch) as error:
        return error.message
    if not terms.allow_partial:
        assert_complete(path, base)
    assert report.coverage == 1.0 or report.unmatched
    return ""


@pytest.mark.parametrize("count", [SAMPLE, pytest.param(ALL, marks=pytest.mark.soak)])
def test_damage_is_refused_with_its_cause_or_changes_nothing(count: int, tmp_path: Path) -> None:
    files, chance = corpus(tmp_path), random.Random(7)
    path = tmp_path / "damaged.safetensors"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for number in range(count):
        base, content = files[number % len(files)]
        mutation = chance.choice(MUTATIONS)
        damaged = mutation(content, chance)
        if damaged == content:
            continue
        path.write_bytes(damaged)
        said = refusal(path, base, ImportTerms())
        assert said or mutation not in REFUSED, (mutation.__name__, number)
        assert said.encode().decode().isprintable() or "\n" in said, said
        refused += bool(said)
        refusal(path, base, ImportTerms(allow_partial=True))
    assert refused > count // 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY_KB


def test_the_order_of_keys_means_nothing(tmp_path: Path) -> None:
    chance = random.Random(3)
    for number, (base, content) in enumerate(corpus(tmp_path)):
        (tmp_path / "a").write_bytes(content)
        (tmp_path / "b").write_bytes(reordered(content, chance))
        one, two = (import_file(tmp_path / name, base)[0] for name in ("a", "b"))
        assert list(one.modules) == list(two.modules), number
        for name, module in one.modules.items():
            pairs = zip(tensors_of(module), tensors_of(two.modules[name]), strict=True)
            assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)


def test_a_header_that_is_as_long_as_it_may_be(tmp_path: Path) -> None:
    """Sixteen megabytes of names: refused without taking a multiple of that in the answer."""
    tensors = {f"lora_unet_{'x' * 150}_{number}.alpha": torch.tensor(1.0) for number in range(40_000)}
    safetensors.torch.save_file(tensors, tmp_path / "x")
    with pytest.raises((AdapterMismatch, UnsupportedFormat)) as caught:
        import_file(tmp_path / "x", SD1)
    assert len(caught.value.message) < SHOWN * 3
