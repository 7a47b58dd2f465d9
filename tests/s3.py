"""An S3 server for tests: moto's, as a process of its own on loopback. `python -m tests.s3` is that process.

It answers one request at a time, so its conditional writes are atomic, as S3's are.
"""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from typing import Self

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    # No look for credentials or settings anywhere else.
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    "AWS_MAX_ATTEMPTS": "1",
}


class S3Server:
    """Everything it holds is in its memory: gone when it is killed."""

    def __init__(self) -> None:
        self.port = 0
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> Self:
        """Starts it, on the port that it had before, with an empty bucket `atelier`."""
        command = [sys.executable, "-m", "tests.s3", str(self.port)]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())
        bucket = urllib.request.Request(f"{self.url}/atelier", method="PUT")
        with urllib.request.urlopen(bucket, timeout=30) as response:
            assert response.status == 200
        return self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        """The usual variables, for a client of it."""
        return {**CREDENTIALS, "AWS_ENDPOINT_URL": self.url}

    def kill(self) -> None:
        """kill -9."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None


def main(port: int) -> None:
    # Here, and not above: who starts the server need not import it.
    from moto.server import DomainDispatcherApplication, create_backend_app  # noqa: PLC0415
    from werkzeug.serving import make_server  # noqa: PLC0415

    application = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", port, application, threaded=False)
    print(server.port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]))
