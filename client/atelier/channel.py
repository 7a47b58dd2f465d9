"""How this client talks to a server: address and channel options, the same for both transports."""

from __future__ import annotations

import json
import os

DEFAULT_ADDRESS = "127.0.0.1:50051"
RECONNECT_TIMEOUT_SECONDS = 120.0
CALL_TIMEOUT_SECONDS = 60.0

# Only calls that may safely happen twice. Streams are sent again by `streams.py`.
_REPEATABLE = {
    "TrainingService": ("GetTraining", "ListTrainings", "CancelTraining"),
    "AdapterService": ("ListAdapters", "GetAdapter", "LoadAdapter", "UnloadAdapter"),
    "ServerService": ("GetServerInfo",),
}
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [
                {"service": f"atelier.v1.{service}", "method": method}
                for service, methods in _REPEATABLE.items()
                for method in methods
            ],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.2s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
    # When most tries fail, the server has enough to do: no more are made until some succeed.
    "retryThrottling": {"maxTokens": 20, "tokenRatio": 0.5},
}

OPTIONS: tuple[tuple[str, str | int], ...] = (
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    ("grpc.enable_retries", 1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 0),
    # A server that was restarted is found again within a second or two, not after grpc's two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # A sample picture of a large base comes in one message.
    ("grpc.max_receive_message_length", 64 * 2**20),
)


def default_address() -> str:
    """ATELIER_SERVER, or a server on this machine."""
    return os.environ.get("ATELIER_SERVER") or DEFAULT_ADDRESS
