"""What a worker tells of its device and its base: names, versions, memory."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import resource
from pathlib import Path

import torch

from atelier_server.core import BaseInfo
from atelier_server.diffusion.base import BaseModel
from atelier_server.diffusion.quantization import stored_bytes
from atelier_server.diffusion.schedulers import all_options, default_scheduler, usable_schedulers
from atelier_server.engine.runner import Memory
from atelier_server.errors import OutOfMemory
from atelier_server.guides import ControlNetInfo
from atelier_server.training.abilities import abilities

_CGROUP = Path("/sys/fs/cgroup")
# How libraries below torch say that they got no memory.
_NO_MEMORY = (
    "DefaultCPUAllocator",
    "CUDA error: out of memory",
    "could not create a primitive",
    "could not create a memory object",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_PACKAGES = ("atelier", "torch", "diffusers", "transformers", "peft")


def describe(
    base: BaseModel,
    prediction_type: str,
    controlnets: tuple[ControlNetInfo, ...] = (),
    *,
    compiled: bool = False,
) -> BaseInfo:
    """The resident base and what lies beside it, for GetServerInfo and receipts."""
    return BaseInfo(
        reference=base.reference,
        family=base.family.name,
        sha256=base.sha256,
        native_width=base.native_width,
        native_height=base.native_height,
        prediction_type=prediction_type,
        default_scheduler=default_scheduler(base.scheduler_config),
        max_prompt_tokens=base.max_prompt_tokens,
        num_parameters=base.num_parameters,
        device=str(base.device),
        device_description=_description(base.device),
        dtype=str(base.dtype).removeprefix("torch."),
        memory_total_bytes=_total_memory(base.device),
        versions=tuple((package, importlib.metadata.version(package)) for package in _PACKAGES),
        inpainting=base.inpainting,
        controlnets=controlnets,
        max_clip_skip=base.max_clip_skip,
        schedulers=usable_schedulers(base.scheduler_config),
        scheduler_options=tuple(all_options()),
        training=abilities(base),
        quantization=base.quantization,
        config_sha256=base.config_sha256,
        compiled=compiled,
    )


def memory(device: torch.device) -> Memory:
    """torch's allocator on a GPU, the process on a CPU. Bytes; never waits for the device."""
    if device.type == "cuda":
        return Memory(
            allocated=torch.cuda.memory_allocated(device),
            reserved=torch.cuda.memory_reserved(device),
            peak=torch.cuda.max_memory_allocated(device),
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return Memory(allocated=resident, reserved=resident, peak=peak)


def out_of_memory(error: Exception, device: torch.device) -> OutOfMemory | None:
    """The error for users, with the bytes that were asked for and those that are free, if `error` is torch's
    out-of-memory: an exception of its own on a GPU, a RuntimeError of its allocator or of oneDNN on a CPU."""
    text = str(error)
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not any(s in text for s in _NO_MEMORY):
        return None
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _meminfo("MemAvailable")
    facts = {"free_bytes": str(free)}
    message = f"the device has too little memory for this: {free} bytes are free"
    if asked := re.search(r"tried to allocate ([\d.]+) (bytes|[KMG]iB)", text, re.IGNORECASE):
        needed = int(float(asked[1]) * _UNITS[asked[2]])
        facts["needed_bytes"] = str(needed)
        message += f", and one piece alone needed {needed}"
    return OutOfMemory(f"{message}; ask for a smaller size", facts)


def free_bytes(device: torch.device) -> int:
    """What more can be had: of a GPU what neither it nor torch's allocator holds in use, of a CPU the
    system's free memory or what the control group leaves."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    free = _meminfo("MemAvailable")
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        # As Kubernetes' working set has it: the cache of files that nobody reads is free.
        free = min(free, int(text) - int(used.read_text()) + _inactive_file())
    return max(0, free)


def _inactive_file() -> int:
    """Bytes of the control group's file cache that go first; 0 where it does not tell."""
    stat = _CGROUP / "memory.stat"
    for line in stat.read_text().splitlines() if stat.exists() else ():
        if line.startswith("inactive_file "):
            return int(line.split()[1])
    return 0


def weight_bytes(base: BaseModel) -> int:
    """Memory of the base's weights on its device."""
    resident = (module for name, module in base.modules.items() if name not in base.offloaded)
    return sum(stored_bytes(p) for module in resident for p in module.parameters())


def _description(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def _total_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return _meminfo("MemTotal")


def _meminfo(entry: str) -> int:
    """Bytes; 0 where the system does not tell."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{entry}:"):
            return int(line.split()[1]) * 1024
    return 0
