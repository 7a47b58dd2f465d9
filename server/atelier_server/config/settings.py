"""What a server can be told. Nothing here looks at the environment: `reading` does."""

from __future__ import annotations

import re
from ipaddress import ip_address
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

_FROZEN = ConfigDict(frozen=True, extra="forbid")
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_NOTICE_SECONDS = 5.0
_OFFLOADABLE = ("text_encoders", "vae")


class Limits(BaseModel):
    """What a single request may ask for, and how many may be under way; told by GetServerInfo.

    Flags `--limits.*`, variables ATELIER_LIMIT_*, table [limits] of the file.
    """

    model_config = _FROZEN

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
    max_request_bytes: int = Field(default=64 * 2**20, ge=2**21, le=2**31 - 1)
    min_adapter_coverage: float = Field(
        default=1.0, ge=0, le=1, description="what share of an import has to fit, unless it allows less"
    )
    max_queued_generations: int = Field(default=256, ge=1)
    max_queued_trainings: int = Field(default=64, ge=1)
    max_generate_calls: int = Field(default=512, ge=1, description="open at once, also those refused soon")
    max_train_calls: int = Field(default=512, ge=1, description="open at once: who trains and who watches")
    max_control_calls: int = Field(default=128, ge=1, description="open at once: all other calls")
    max_uploads: int = Field(default=16, ge=1, description="under way at once")


class Quotas(BaseModel):
    """What a tenant may have at once; nothing set means no bound.

    For every tenant: flags `--quotas.*`, variables ATELIER_QUOTA_*, table [quotas] of the file. The tokens
    file may say otherwise for one tenant.
    """

    model_config = _FROZEN

    max_images: int | None = Field(default=None, ge=0, description="pictures waiting or being painted")
    max_trainings: int | None = Field(default=None, ge=0, description="trainings that have not ended")
    max_stored_bytes: int | None = Field(default=None, ge=0, description="adapters in the store")
    max_train_steps_per_day: int | None = Field(default=None, ge=0, description="asked for in 24 hours")


class Settings(BaseModel):
    """One server. Every field is a flag of `atelier serve`, an ATELIER_* variable and a key of the file."""

    model_config = _FROZEN

    model: str = Field(default="pocket", min_length=1, description="hub id, folder, .safetensors, or pocket")
    controlnet: tuple[str, ...] = Field(
        default=(), description="a ControlNet for requests to choose, NAME=REF; several: again, or by commas"
    )
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    host: str = Field(default="127.0.0.1", min_length=1, description="address to listen on; 0.0.0.0 is all")
    port: int = Field(default=50051, ge=0, le=65535, description="0 picks a free one")
    metrics_port: int = Field(default=9090, ge=-1, le=65535, description="0 picks a free one, -1 is off")
    health_port: int = Field(
        default=-1,
        ge=-1,
        le=65535,
        description="health without TLS, for probes; 0 picks a free one, -1 is off",
    )
    cert_file: Path | None = Field(default=None, description="TLS: the server's certificate chain, PEM")
    key_file: Path | None = Field(default=None, description="TLS: the key of --cert-file, PEM")
    client_ca_file: Path | None = Field(
        default=None, description="mTLS: clients must have a certificate of this authority, PEM"
    )
    tokens_file: Path | None = Field(default=None, description="tenants' tokens; see `atelier token new`")
    insecure: bool = Field(default=False, description="listen beyond loopback without TLS or without tokens")
    reflection: bool = Field(default=True, description="answer gRPC server reflection")
    data_dir: Path = Field(default=Path("data"), description="jobs, adapters, uploads")
    store: str = Field(default="", description="adapters elsewhere: s3://BUCKET/PREFIX; not set = DATA_DIR")
    store_cache_gb: float = Field(default=20.0, gt=0, description="files of a remote --store kept here")
    retention_days: float = Field(default=7.0, ge=0, description="deleted adapters can be undeleted so long")
    training_retention: float | None = Field(
        default=None,
        ge=0,
        description="keep the pictures of ended trainings so long: seconds, or e.g. 36h, 30d (default: kept)",
    )
    slots: int = Field(default=16, ge=1, le=1024, description="adapters on the device")
    compile: bool = Field(
        default=False, description="compile the U-Net's blocks: a slower start, faster steps"
    )
    quantize: Literal["", "int8", "fp8"] = Field(
        default="", description="the U-Net's linear layers in eight bits: less memory; needs [quantize]"
    )
    offload: tuple[str, ...] = Field(
        default=(),
        description="text_encoders, vae: on the GPU only while they are used; several: again, or by commas",
    )
    host_adapter_bytes: int = Field(
        default=2 * 2**30, ge=0, description="adapters kept in host memory, ready for a slot"
    )
    training_share: float = Field(
        default=0.25, ge=0, le=0.95, description="of the device's time, while pictures are wanted too"
    )
    max_running_trainings: int = Field(default=16, ge=1, description="on the device at once; others wait")
    threads: int = Field(default=0, ge=0, description="CPU threads of the worker; 0 = one a core")
    drain_seconds: float = Field(default=30.0, ge=0, description="grace for running pictures on SIGTERM")
    drain_notice_seconds: float | None = Field(
        default=None,
        ge=0,
        description=f"listen so long after SIGTERM, not ready (default {_NOTICE_SECONDS:g}; on loopback 0)",
    )
    connection_age_seconds: float = Field(
        default=1800.0, gt=0, description="ask clients to connect anew, so that they find new replicas"
    )
    connection_age_grace_seconds: float = Field(
        default=600.0, gt=0, description="for calls on a connection that is asked to go"
    )
    slow_reader_seconds: float = Field(
        default=60.0, gt=0, description="end a stream of which nothing is read for so long"
    )
    stall_seconds: float = Field(
        default=600.0, ge=0, description="replace a worker whose step takes longer; 0 is never"
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "text", "json"] = Field(
        default="auto", description="auto is text on a terminal and JSON elsewhere"
    )
    otlp_endpoint: str = Field(
        default="", description="send traces to this OpenTelemetry collector, http://HOST:4317; needs [otel]"
    )
    limits: Limits = Field(default_factory=Limits)
    quotas: Quotas = Field(default_factory=Quotas)

    @field_validator("controlnet", mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        parts = [value] if isinstance(value, str) else value
        if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
            raise ValueError("is no list of NAME=REF")
        pairs = [pair for part in parts for pair in part.split(",")]
        for pair in pairs:
            if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}=.+", pair):
                raise ValueError(f"{pair!r} is not NAME=REF, with a name of a-z, 0-9, '.', '_' and '-'")
        names = [pair.partition("=")[0] for pair in pairs]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{twice[0]!r} is there twice; give each ControlNet a name of its own")
        return tuple(pairs)

    @field_validator("offload", mode="before")
    @classmethod
    def _components(cls, value: object) -> object:
        parts = [value] if isinstance(value, str) else value
        if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
            raise ValueError(f"is no list of {' and '.join(_OFFLOADABLE)}")
        named = [name.strip() for part in parts for name in part.split(",") if name.strip()]
        for name in named:
            if name not in _OFFLOADABLE:
                raise ValueError(f"{name!r} is none of {', '.join(_OFFLOADABLE)}")
        return tuple(dict.fromkeys(named))

    @field_validator("store")
    @classmethod
    def _url(cls, value: str) -> str:
        if value and not re.fullmatch(r"[a-z][a-z0-9+]*://[^/\s]*(/\S*)?", value):
            raise ValueError(f"{value!r} is no URL such as s3://BUCKET/PREFIX")
        return value.rstrip("/")

    @field_validator("training_retention", mode="before")
    @classmethod
    def _duration(cls, value: object) -> object:
        if isinstance(value, str) and (match := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", value.strip())):
            return float(match[1]) * _UNITS[match[2]]
        return value

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        name, _, index = value.partition(":")
        if value in ("auto", "cpu", "cuda") or (name == "cuda" and index.isdigit()):
            return value
        raise ValueError(f"{value!r} is none of auto, cpu, cuda, cuda:N")

    @field_validator("otlp_endpoint")
    @classmethod
    def _collector(cls, value: str) -> str:
        url = urlsplit(value)
        if value and (url.scheme not in ("http", "https") or not url.hostname):
            raise ValueError(f"{value!r} is no http://HOST:PORT or https://HOST:PORT")
        return value

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if conflicts := [*self._port_conflicts(), *self._security_conflicts(), *self._slot_conflicts()]:
            raise ValueError("\n".join(conflicts))
        return self

    def _port_conflicts(self) -> list[str]:
        ports = {"port": self.port, "metrics-port": self.metrics_port, "health-port": self.health_port}
        taken: dict[int, str] = {}
        conflicts = []
        for name, port in ports.items():
            if port > 0 and port in taken:
                conflicts.append(f"--{name}: {port} is --{taken[port]} already; give each a port of its own")
            taken.setdefault(port, name)
        return conflicts

    def _security_conflicts(self) -> list[str]:
        conflicts = []
        if (self.cert_file is None) != (self.key_file is None):
            given, missing = ("cert", "key") if self.cert_file else ("key", "cert")
            conflicts.append(f"--{missing}-file: is missing; --{given}-file goes only together with it")
        if self.client_ca_file and not (self.cert_file and self.key_file):
            conflicts.append("--client-ca-file: goes only with --cert-file and --key-file")
        lacking = [
            *([] if self.cert_file else ["TLS (--cert-file, --key-file)"]),
            *(
                []
                if self.authenticates
                else ["tokens (--tokens-file) or client certificates (--client-ca-file)"]
            ),
        ]
        if lacking and not self.insecure and not is_loopback(self.host):
            conflicts.append(
                f"--host: {self.host} can be reached from other machines, without "
                f"{' and without '.join(lacking)}; set these, or --insecure on a network that you trust"
            )
        return conflicts

    def _slot_conflicts(self) -> list[str]:
        most = self.limits.max_adapters_per_image
        if self.slots >= most:
            return []
        return [
            f"--slots: {self.slots} are too few for one picture with "
            f"limits.max_adapters_per_image={most} adapters"
        ]

    @property
    def controlnets(self) -> tuple[tuple[str, str], ...]:
        """Names and references."""
        return tuple((name, ref) for name, _, ref in (pair.partition("=") for pair in self.controlnet))

    @property
    def store_cache_bytes(self) -> int:
        return int(self.store_cache_gb * 2**30)

    @property
    def authenticates(self) -> bool:
        """Whether a call has to say whose it is."""
        return self.tokens_file is not None or self.client_ca_file is not None

    @property
    def notice_seconds(self) -> float:
        """How long the server goes on listening once it has said that it leaves."""
        if self.drain_notice_seconds is not None:
            return self.drain_notice_seconds
        return 0.0 if is_loopback(self.host) else _NOTICE_SECONDS


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
