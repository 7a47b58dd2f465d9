"""An S3 server for tests: moto's, as a process of its own on loopback. `python -m tests.s3` is that process.

It answers one request at a time, so its conditional writes are atomic, as S3's are.
"""

from __future__ import annotations

import io
import socket
import subprocess
import sys
import threading
import urllib.request
from contextlib import suppress
from typing import Any, Self

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


class Relay:
    """A line to a server on loopback that goes dead, in both directions, after `most` bytes to the server."""

    def __init__(self, server_port: int, most: int | None) -> None:
        self._server_port = server_port
        self._most = most
        self.forwarded = 0
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with self._lock:
            for open_socket in (self._listener, *self._sockets):
                with suppress(OSError):
                    open_socket.shutdown(socket.SHUT_RDWR)
                open_socket.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._server_port))
                with self._lock:
                    self._sockets += [client, server]
                threading.Thread(target=self._up, args=(client, server), daemon=True).start()
                threading.Thread(target=self._down, args=(server, client), daemon=True).start()

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                left = None if self._most is None else max(self._most - self.forwarded, 0)
                self.forwarded += len(data)
                server.sendall(data[:left])
                if left is not None and left < len(data):
                    self.close()
                    return
            server.shutdown(socket.SHUT_WR)

    def _down(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(65536):
                client.sendall(data)
            client.shutdown(socket.SHUT_WR)


def main(port: int) -> None:
    # Here, and not above: who starts the server need not import it.
    from moto.server import DomainDispatcherApplication, create_backend_app  # noqa: PLC0415
    from werkzeug.serving import make_server  # noqa: PLC0415

    application = DomainDispatcherApplication(create_backend_app)

    def whole_bodies_only(environ: Any, start_response: Any) -> Any:
        """S3 refuses a request that is cut short in its head or its body; moto would store what has come."""
        length = int(environ.get("CONTENT_LENGTH") or (-1 if environ["REQUEST_METHOD"] == "PUT" else 0))
        body = environ["wsgi.input"].read(max(length, 0))
        if length < 0 or len(body) < length:
            start_response("400 Bad Request", [("Content-Length", "0")])
            return [b""]
        environ["wsgi.input"] = io.BytesIO(body)
        return application(environ, start_response)

    server = make_server("127.0.0.1", port, whole_bodies_only, threaded=False)
    print(server.port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]))
