"""What a worker tells of its device and its base: names, versions, memory."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
from pathlib import Path

import torch

from atelier_server.core import BaseInfo
from atelier_server.diffusion.base import BaseModel
from atelier_server.diffusion.schedulers import all_options, default_scheduler
from atelier_server.engine.runner import Memory

_PACKAGES = ("atelier", "torch", "diffusers", "transformers", "peft")


def describe(base: BaseModel, prediction_type: str) -> BaseInfo:
    """The resident base, for GetServerInfo and receipts."""
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
        scheduler_options=tuple(all_options()),
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


def weight_bytes(base: BaseModel) -> int:
    """Memory of the base's weights."""
    modules = (base.unet, base.vae, base.text_encoder)
    return sum(p.nbytes for module in modules for p in module.parameters())


def _description(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def _total_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return 0
