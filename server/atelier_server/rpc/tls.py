"""The server's certificate, read again when its files change: for new connections, without a restart."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

import grpc

from atelier_server.errors import StartError

_log = logging.getLogger(__name__)
Stamp = tuple[tuple[int, int, int], ...]


class Certificates:
    """`client_ca`: clients must show a certificate of that authority. Raises StartError for bad files."""

    def __init__(self, cert: Path, key: Path, client_ca: Path | None = None) -> None:
        self._cert = cert
        self._key = key
        self._client_ca = client_ca
        self._stamp = self._look()
        self._first = self._read()

    def credentials(self) -> grpc.ServerCredentials:
        # The stubs do not know that the callable may answer None.
        return grpc.dynamic_ssl_server_credentials(
            self._first,
            self._changed,  # type: ignore[arg-type]
            require_client_authentication=self._client_ca is not None,
        )

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """gRPC asks at every handshake, on a thread of its own; None means no change."""
        try:
            stamp = self._look()
            if stamp == self._stamp:
                return None
            # Once for each change: files that are half replaced are looked at again when the rest comes.
            self._stamp = stamp
            found = self._read()
        except (StartError, OSError) as error:
            _log.error("the certificate was not read again, the last good one stays in use: %s", error)
            return None
        _log.info("the certificate was read again")
        return found

    def _look(self) -> Stamp:
        found = [path.stat() for path in self._paths() if path.exists()]
        return tuple((item.st_mtime_ns, item.st_size, item.st_ino) for item in found)

    def _paths(self) -> tuple[Path, ...]:
        return (self._cert, self._key, *([self._client_ca] if self._client_ca else []))

    def _read(self) -> grpc.ServerCertificateConfiguration:
        _check(self._cert, self._key, self._client_ca)
        return grpc.ssl_server_certificate_configuration(
            [(self._key.read_bytes(), self._cert.read_bytes())],
            root_certificates=self._client_ca.read_bytes() if self._client_ca else None,
        )


def _check(cert: Path, key: Path, client_ca: Path | None) -> None:
    """Raises StartError. gRPC itself would find a wrong pair at the first handshake."""
    problems = []
    files = {"--cert-file": cert, "--key-file": key, **({"--client-ca-file": client_ca} if client_ca else {})}
    for flag, path in files.items():
        try:
            path.read_bytes()
        except OSError as error:
            problems.append(f"{flag}: {path} cannot be read: {error.strerror}")
    if not problems:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # A key with a passphrase is refused: nobody is there to type it.
            context.load_cert_chain(cert, key, password=lambda: b"")
        except (ssl.SSLError, ValueError) as error:
            reason = getattr(error, "reason", None) or "not a PEM certificate with its key"
            problems.append(f"--cert-file, --key-file: {cert} and {key} are no pair: {reason}")
        if client_ca is not None:
            try:
                context.load_verify_locations(client_ca)
            except (ssl.SSLError, ValueError) as error:
                reason = getattr(error, "reason", None) or "no PEM certificates"
                problems.append(f"--client-ca-file: {client_ca} holds no certificates: {reason}")
    if problems:
        raise StartError(*problems)
