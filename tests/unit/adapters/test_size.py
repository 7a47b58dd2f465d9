"""A rank 32 file for all of SDXL: parsed, checked, converted, published; in time, without a second copy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.unit.adapters.formats.test_names import names

RANK, SECONDS = 32, 2.0
READ = """
import json, sys, threading, time
from pathlib import Path
from atelier_server.adapters.importer import Base, import_file
from atelier_server.adapters.store import AdapterStore
from atelier_server.adapters.stored import write_stored
from tests.unit.adapters.formats.test_names import names

def anonymous():
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

seen, ended = [anonymous()], threading.Event()
def watch():
    while not ended.wait(0.005):
        seen.append(anonymous())

source, store = Path(sys.argv[1]), AdapterStore(Path(sys.argv[2]))
base = Base("sdxl", names("sdxl").shapes, {}, 64, lambda word: False)
seen = [anonymous()]
watcher = threading.Thread(target=watch)
watcher.start()
began, cpu = time.monotonic(), time.process_time()
adapter, report = import_file(source, base)
store.publish_version(
    lambda folder: write_stored(adapter, folder / "adapter.safetensors"),
    name="x", trigger="", base_model="", base_sha256="", new_version=False, rank=32, lora_alpha=16.0,
)
seconds, cpu = time.monotonic() - began, time.process_time() - cpu
ended.set()
watcher.join()
grown, matched = max(seen) - seen[0], len(report.matched)
print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "grown": grown, "matched": matched}))
"""


def sdxl_file(path: Path) -> Path:
    tensors = {}
    for name, (out, *features) in names("sdxl").shapes.items():
        if not features:
            continue
        key = "lora_unet_" + names("sdxl").sgm(name.removeprefix("unet.")).replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = torch.full((RANK, *features), 0.01, dtype=torch.float16)
        tensors[f"{key}.lora_up.weight"] = torch.full((out, RANK, *(1,) * len(features[1:])), 0.01).half()
        tensors[f"{key}.alpha"] = torch.tensor(16.0)
    safetensors.torch.save_file(tensors, path)
    return path


@pytest.mark.soak
def test_two_seconds_and_one_copy(tmp_path: Path) -> None:
    path = sdxl_file(tmp_path / "x.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path), str(tmp_path / "store")],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    print(found)
    assert found["matched"] == 794
    # Memory of the process's own, beside the mapped file.
    assert found["grown"] < path.stat().st_size / 2, found
    # Of one core: what else the machine does is not the import's.
    assert found["cpu_seconds"] < SECONDS, found
