"""Who may import what, checked on the source itself: every import of every module, by `ast`."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {"atelier": "client", "atelier_server": "server", "pocket": ".", "benchmarks": "."}
GENERATED = "atelier.v1."
NAMES_THAT_SAY_NOTHING = {"utils", "util", "common", "helpers", "helper", "misc", "manager", "managers"}

TORCH = {"torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "torchvision"}
WIRE = {"google", "grpc", "grpc_health", "grpc_reflection", "grpc_status", "atelier"}
# The client's whole diet beyond the standard library.
CLIENT_MAY = {"atelier", "google", "grpc", "grpc_status", "IPython", "PIL", "rich", "typer", "click"}

# A room of atelier_server -> the rooms it may see beside itself. "adapters.store" is the torch-free half.
NOUNS = {"core", "errors", "guides", "origin", "raster", "receipt", "report"}
MESSAGES = {"messages"}
STORE = {
    f"adapters.{name}"
    for name in (
        *("store", "reference", "records", "labels", "trash", "catalog"),
        *("blobs", "objects", "cache", "shelf", "staging", "layout", "folder"),
    )
}
ROOMS: dict[str, set[str]] = {
    "guides": set(),
    "core": {"guides"},
    "raster": set(),
    "receipt": {"core"},
    "report": set(),
    "origin": set(),
    "messages": {"core", "errors", "origin", "report"},
    "logs": {"origin"},
    "traces": {"origin", *MESSAGES},
    "otel": {"origin", "traces", *MESSAGES},
    "errors": {"core"},
    "config": {"core"},
    "data_directory": {"errors"},
    "access": {*NOUNS, "config"},
    "preflight": {"access", "config", "data_directory", "errors", "rpc.tls"},
    "metrics": {"core", *MESSAGES},
    "adapters": NOUNS,
    "diffusion": {*NOUNS, "pocket"},
    "training": {*NOUNS, "adapters", "diffusion"},
    "engine": {*NOUNS, *MESSAGES, "metrics", *STORE},
    "jobs": {*NOUNS, *MESSAGES, "access", "metrics", "traces", "config", "workers", *STORE},
    "rpc": {*NOUNS, *MESSAGES, "access", "metrics", "traces", "config", "jobs", *STORE},
    "workers": {*NOUNS, *MESSAGES, "metrics", "config", "logs"},
    "pocket": set(),
}
# The worker's entry is where the desk, the wardrobe, the maths and the teacher are wired.
ENTRY = {
    "workers.adapters",
    "workers.craft",
    "workers.darkroom",
    "workers.device",
    "workers.probe",
    "workers.process",
    "workers.runner",
    "workers.texts",
    "workers.trainings",
}
ENTRY_MAY = {
    *NOUNS,
    *MESSAGES,
    "config",
    "logs",
    "engine",
    "adapters",
    "diffusion",
    "training",
    "workers",
    "pocket",
    *STORE,
}
TORCH_ROOMS = {"adapters", "diffusion", "training"}
COMPOSITION = {"app", "__main__", "atelier_server"}


@dataclass(frozen=True)
class Import:
    """`module` imports `target` (the full dotted name, as deep as it is known)."""

    module: str
    target: str
    local: bool
    typing_only: bool

    def __str__(self) -> str:
        return f"{self.module} imports {self.target}"


def imports_of(module: str, source: str, known: frozenset[str], package: bool = False) -> list[Import]:
    """Every import in `source`; `known` are the project's own modules, told apart from names in them."""
    found: list[Import] = []

    def visit(node: ast.AST, local: bool, typing_only: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(module, alias.name, local, typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, node, package)
            for alias in node.names:
                deeper = f"{base}.{alias.name}"
                found.append(Import(module, deeper if deeper in known else base, local, typing_only))
        inside = local or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        typing_block = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.iter_child_nodes(node):
            visit(child, inside, typing_only or typing_block)

    visit(ast.parse(source), False, False)
    return found


def _absolute(module: str, node: ast.ImportFrom, package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + package]
    return ".".join([*parts, *([node.module] if node.module else [])])


@cache
def modules() -> Mapping[str, Path]:
    """Dotted name -> file, of all hand-written modules."""
    found = {}
    for package, folder in SOURCES.items():
        for path in sorted((ROOT / folder / package).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = path
    return {name: path for name, path in found.items() if not name.startswith(GENERATED)}


@cache
def imports() -> tuple[Import, ...]:
    known = frozenset(modules())
    return tuple(
        found
        for name, path in modules().items()
        for found in imports_of(name, path.read_text(encoding="utf-8"), known, path.name == "__init__.py")
    )


def room_of(module: str) -> str:
    """The room of a module of atelier_server: "jobs" for atelier_server.jobs.book."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "atelier_server"


def _server_imports() -> Iterator[Import]:
    return (found for found in imports() if found.module.split(".")[0] == "atelier_server")


def _inner(name: str) -> str:
    return name.removeprefix("atelier_server.")


def rooms_violated(found: Import) -> bool:
    """Whether an import inside atelier_server goes where its room may not look."""
    if not found.target.startswith("atelier_server.") or room_of(found.module) in COMPOSITION:
        return False
    target = room_of(found.target)
    if target == room_of(found.module):
        return False
    may = ENTRY_MAY if _inner(found.module) in ENTRY else ROOMS[room_of(found.module)]
    return not (target in may or _inner(found.target) in may)


def torch_violated(found: Import) -> bool:
    """Whether a torch-free module of atelier_server imports torch or what stands on it."""
    module = _inner(found.module)
    with_torch = module in ENTRY or (room_of(found.module) in TORCH_ROOMS and module not in STORE)
    return found.target.split(".")[0] in TORCH and not with_torch


def wire_violated(found: Import) -> bool:
    """Whether protobuf or gRPC is seen outside the door and the composition root."""
    room = room_of(found.module)
    return found.target.split(".")[0] in WIRE and room != "rpc" and room not in COMPOSITION


def cycle(edges: Mapping[str, set[str]]) -> list[str]:
    """A cycle of modules, or []."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_every_room_is_known() -> None:
    rooms = {room_of(name) for name in modules() if name.startswith("atelier_server")}
    assert rooms - COMPOSITION <= set(ROOMS)


def test_rooms_look_only_where_they_may() -> None:
    assert [str(found) for found in _server_imports() if rooms_violated(found)] == []


def test_torch_stays_in_its_rooms() -> None:
    assert [str(found) for found in _server_imports() if torch_violated(found)] == []


def test_protobuf_and_grpc_stay_at_the_door() -> None:
    assert [str(found) for found in _server_imports() if wire_violated(found)] == []


def test_prometheus_is_known_to_metrics_alone() -> None:
    users = {found.module for found in imports() if found.target.split(".")[0] == "prometheus_client"}
    assert users <= {"atelier_server.metrics", "atelier_server.app"}


def test_opentelemetry_is_known_to_one_module() -> None:
    users = {found.module for found in imports() if found.target.split(".")[0] == "opentelemetry"}
    assert users == {"atelier_server.otel"}
    assert not [str(found) for found in imports() if found.target == "atelier_server.otel"]


def test_nobody_imports_the_composition_root() -> None:
    users = {found.module for found in imports() if found.target == "atelier_server.app"}
    assert users <= {"atelier_server.__main__"}


def test_the_client_is_light() -> None:
    heavy = [
        str(found)
        for found in imports()
        if found.module.split(".")[0] == "atelier"
        and not found.typing_only
        and (top := found.target.split(".")[0]) not in CLIENT_MAY
        and top not in sys.stdlib_module_names
    ]
    assert heavy == []


def test_the_workshop_does_not_know_the_service() -> None:
    users = [
        str(found) for found in imports() if found.module.startswith("pocket") and _is_ours(found.target)
    ]
    assert users == []


def _is_ours(target: str) -> bool:
    return target.split(".", maxsplit=1)[0] in {"atelier", "atelier_server", "benchmarks"}


def test_no_import_cycles() -> None:
    edges: dict[str, set[str]] = {name: set() for name in modules()}
    for found in imports():
        if found.target in edges and found.target != found.module and not found.typing_only:
            edges[found.module].add(found.target)
    assert cycle(edges) == []


def test_no_function_imports_anything() -> None:
    assert [str(found) for found in imports() if found.local] == []


def test_names_say_what_a_module_is() -> None:
    assert [name for name in modules() if name.split(".")[-1] in NAMES_THAT_SAY_NOTHING] == []


# -- the rules themselves: each catches what it is there for
@pytest.mark.parametrize(
    ("module", "source", "violated"),
    [
        ("atelier_server.adapters.bank", "from atelier_server.diffusion import denoiser", rooms_violated),
        ("atelier_server.engine.loop", "from atelier_server.adapters.bank import SlotBank", rooms_violated),
        ("atelier_server.workers.handle", "import atelier_server.engine.loop", rooms_violated),
        ("atelier_server.jobs.book", "import torch.nn as nn", torch_violated),
        ("atelier_server.adapters.store", "from safetensors.torch import save_file", torch_violated),
        ("atelier_server.jobs.book", "from google.protobuf import timestamp_pb2", wire_violated),
        ("atelier_server.core", "from atelier.v1 import generation_pb2", wire_violated),
    ],
)
def test_a_broken_rule_is_seen(module: str, source: str, violated: object) -> None:
    known = frozenset({"atelier_server.diffusion.denoiser"})
    assert callable(violated)
    assert [violated(found) for found in imports_of(module, source, known)] == [True]


def test_the_engine_may_see_the_store() -> None:
    [found] = imports_of(
        "atelier_server.engine.loop", "from atelier_server.adapters.store import AdapterStore", frozenset()
    )
    assert not rooms_violated(found)


def test_imports_in_functions_and_relative_ones_are_seen() -> None:
    source = "def f():\n    from . import b\nif TYPE_CHECKING:\n    from .c import d\n"
    local, typing_only = imports_of("p.a", source, frozenset({"p.b", "p.c"}))
    assert (local.target, local.local) == ("p.b", True)
    assert (typing_only.target, typing_only.typing_only) == ("p.c", True)


def test_a_cycle_is_seen() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert not cycle({"a": {"b"}, "b": {"c"}, "c": set()})
