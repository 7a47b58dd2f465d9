"""Settings: read once from flags and ATELIER_* variables, checked together, frozen.

The only place that looks at the environment.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class Limits(BaseSettings):
    """What a single request may ask for; told by GetServerInfo. Variables: ATELIER_LIMIT_*."""

    model_config = SettingsConfigDict(env_prefix="ATELIER_LIMIT_", frozen=True, extra="forbid")

    max_num_images: int = Field(default=16, ge=1)
    max_inference_steps: int = Field(default=200, ge=1)
    max_width: int = Field(default=2048, ge=8)
    max_height: int = Field(default=2048, ge=8)
    max_adapters_per_image: int = Field(default=4, ge=1)
    max_lora_rank: int = Field(default=64, ge=1, le=256)
    max_prompt_characters: int = Field(default=10_000, ge=1)
    max_train_steps: int = Field(default=20_000, ge=1)
    max_train_images: int = Field(default=200, ge=1)
    max_train_batch_size: int = Field(default=16, ge=1)
    max_image_bytes: int = Field(default=32 * 2**20, ge=1)
    max_image_pixels: int = Field(default=50_000_000, ge=64)
    max_adapter_bytes: int = Field(default=2 * 2**30, ge=1)
    max_queued_generations: int = Field(default=256, ge=1)
    max_queued_trainings: int = Field(default=64, ge=1)


class Settings(BaseSettings):
    """One server. Every field is a flag of `atelier serve` and an ATELIER_* variable."""

    model_config = SettingsConfigDict(
        env_prefix="ATELIER_", frozen=True, extra="forbid", cli_kebab_case=True, cli_prog_name="atelier serve"
    )

    model: str = Field(default="pocket", min_length=1, description="hub id, folder, .safetensors, or pocket")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    host: str = "127.0.0.1"
    port: int = Field(default=50051, ge=0, le=65535, description="0 picks a free one")
    metrics_port: int = Field(default=9090, ge=-1, le=65535, description="0 picks a free one, -1 is off")
    data_dir: Path = Field(default=Path("data"), description="jobs, adapters, uploads")
    slots: int = Field(default=16, ge=1, le=1024, description="adapters on the device")
    threads: int = Field(default=0, ge=0, description="CPU threads of the worker; 0 = one a core")
    drain_seconds: float = Field(default=30.0, ge=0, description="grace for running pictures on SIGTERM")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    limits: Limits = Field(default_factory=Limits)

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        name, _, index = value.partition(":")
        if value in ("auto", "cpu", "cuda") or (name == "cuda" and index.isdigit()):
            return value
        raise ValueError(f"{value!r} is none of auto, cpu, cuda, cuda:N")

    @model_validator(mode="after")
    def _slots_for_one_picture(self) -> Self:
        if self.slots < self.limits.max_adapters_per_image:
            raise ValueError(
                f"slots: {self.slots} are too few for one picture with "
                f"limits.max_adapters_per_image={self.limits.max_adapters_per_image} adapters"
            )
        return self
