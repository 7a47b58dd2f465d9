"""The committed stubs are what protoc makes of protos/ today, and the contract passes buf's rules."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
STUBS = ROOT / "client"
# protoc looks for its mypy plugin, and we for buf, beside the interpreter that runs the tests.
TOOLS = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "PATH": f"{TOOLS}{os.pathsep}{os.environ['PATH']}"}


def _run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def _texts(folder: Path) -> dict[str, str]:
    stubs = (folder / "atelier" / "v1").glob("*_pb2*.py*")
    return {path.name: path.read_text(encoding="utf-8") for path in stubs}


def test_stubs_are_fresh(tmp_path: Path) -> None:
    protos = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "protos").rglob("*.proto"))
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "mypy", "grpc_python", "mypy_grpc")]
    assert _run(sys.executable, "-m", "grpc_tools.protoc", "-I", "protos", *outputs, *protos) == ""
    fresh, committed = _texts(tmp_path), _texts(STUBS)
    assert sorted(fresh) == sorted(committed)
    stale = [name for name in fresh if fresh[name] != committed[name]]
    assert stale == [], "run `make protos`"


def test_contract_passes_buf_lint() -> None:
    assert _run(str(TOOLS / "buf"), "lint") == ""


def test_contract_breaks_nobody_who_speaks_the_released_one() -> None:
    assert _run(str(TOOLS / "buf"), "breaking", "--against", "protos/released.binpb") == ""


def test_a_break_of_the_contract_is_seen(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "protos", tmp_path / "protos")
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    proto = tmp_path / "protos" / "atelier" / "v1" / "server.proto"
    proto.write_text(proto.read_text().replace("bool ready = 1;", "string ready = 1;"))
    told = _run(str(TOOLS / "buf"), "breaking", str(tmp_path), "--against", "protos/released.binpb")
    assert '"ready"' in told
    assert "changed type" in told
