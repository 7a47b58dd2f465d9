"""`python -m atelier_server.rpc.probe DATA_DIR [SERVICE]`: exit 0 when the server on it says SERVING.

For a container's health check, where no probe of the platform speaks gRPC. Asks the health port, which needs
neither certificate nor token, or the only port where there is none.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2

TIMEOUT_SECONDS = 5.0
USAGE = "usage: python -m atelier_server.rpc.probe DATA_DIR [SERVICE]"


def main(argv: Sequence[str]) -> int:
    """Exit codes: 0 serving, 1 not (the reason on stderr), 2 usage."""
    if not 1 <= len(argv) <= 2:
        print(USAGE, file=sys.stderr)
        return 2
    service = argv[1] if len(argv) == 2 else ""
    try:
        facts = json.loads((Path(argv[0]) / "server.json").read_text())
        status = ask(f"localhost:{facts.get('health_port') or facts['port']}", service)
    except OSError:
        print(f"probe: no server runs on {argv[0]}", file=sys.stderr)
        return 1
    except grpc.RpcError as error:
        print(f"probe: {error.code().name}: {error.details()}", file=sys.stderr)
        return 1
    if status == health_pb2.HealthCheckResponse.SERVING:
        return 0
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
    print(f"probe: {service or 'the server'} is {name}", file=sys.stderr)
    return 1


def ask(address: str, service: str) -> int:
    """The HealthCheckResponse.ServingStatus of `service` ("" is the server itself) at `address`."""
    with grpc.insecure_channel(address) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        answer = check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_SECONDS)
        return int(answer.status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
