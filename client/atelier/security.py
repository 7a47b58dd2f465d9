"""How a client shows who it is, and knows whom it talks to: tokens and TLS, from arguments or ATELIER_*."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import grpc

logger = logging.getLogger("atelier")
C = TypeVar("C")
Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Security:
    """`tls` alone trusts the authorities that this machine trusts, `tls_ca` those of a PEM file;
    `tls_cert` and `tls_key` are the client's own, for mTLS. The token file is read at every call.
    """

    token: str | None = None
    token_file: Path | None = None
    tls: bool = False
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None

    @classmethod
    def of(
        cls,
        *,
        token: str | None = None,
        token_file: str | Path | None = None,
        tls: bool | None = None,
        tls_ca: str | Path | None = None,
        tls_cert: str | Path | None = None,
        tls_key: str | Path | None = None,
    ) -> Self:
        """What is None comes from ATELIER_TOKEN, ATELIER_TOKEN_FILE, ATELIER_TLS, ATELIER_TLS_CA,
        ATELIER_TLS_CERT, ATELIER_TLS_KEY. Raises ValueError for a certificate without its key.
        """
        if token is None and token_file is None:
            token, token_file = _variable("TOKEN"), _variable("TOKEN_FILE")
        ca, cert, key = (
            None if path is None else Path(path)
            for path in (
                _or_variable(tls_ca, "TLS_CA"),
                _or_variable(tls_cert, "TLS_CERT"),
                _or_variable(tls_key, "TLS_KEY"),
            )
        )
        if (cert is None) != (key is None):
            raise ValueError("tls_cert and tls_key go only together")
        if tls is None:
            wanted = (_variable("TLS") or "").lower() in ("1", "true", "yes", "on")
            tls = wanted or ca is not None or cert is not None
        return cls(token, None if token_file is None else Path(token_file), tls, ca, cert, key)

    def channel(self, address: str, options: tuple[tuple[str, str | int], ...]) -> grpc.Channel:
        if self.tls:
            return self._signed(grpc.secure_channel(address, self._credentials(), options=options))
        self._warn(address)
        return self._signed(grpc.insecure_channel(address, options=options))

    def aio_channel(self, address: str, options: tuple[tuple[str, str | int], ...]) -> grpc.aio.Channel:
        if self.tls:
            return self._signed(grpc.aio.secure_channel(address, self._credentials(), options=options))
        self._warn(address)
        return self._signed(grpc.aio.insecure_channel(address, options=options))

    def metadata(self) -> Metadata:
        """Raises ValueError for a token file that cannot be read."""
        token = self.token
        if token is None and self.token_file is not None:
            try:
                token = self.token_file.read_text(encoding="utf-8")
            except OSError as error:
                raise ValueError(f"token file {self.token_file}: {error.strerror}") from None
        return () if token is None else (("authorization", f"Bearer {token.strip()}"),)

    def _credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(
            _bytes(self.tls_ca), private_key=_bytes(self.tls_key), certificate_chain=_bytes(self.tls_cert)
        )

    def _signed(self, channel: C) -> C:
        if self.token is None and self.token_file is None:
            return channel
        return cast(C, _SignedChannel(channel, self.metadata))

    def _warn(self, address: str) -> None:
        if (self.token or self.token_file) and not _is_loopback(address):
            logger.warning("the token goes to %s unencrypted: use TLS", address)


class _SignedChannel:
    """A channel, of either transport, that adds metadata to every call.

    grpc's call credentials go only over TLS, and its interceptors would wrap every call of a stream.
    """

    def __init__(self, channel: Any, metadata: Callable[[], Metadata]) -> None:
        self._channel = channel
        self._metadata = metadata

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._channel, name)
        if name not in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
            return found

        def build(*args: Any, **kwargs: Any) -> Any:
            call = found(*args, **kwargs)

            def signed(request: Any, *, metadata: Metadata = (), **options: Any) -> Any:
                return call(request, metadata=(*metadata, *self._metadata()), **options)

            return signed

        return build


def _variable(name: str) -> str | None:
    return os.environ.get(f"ATELIER_{name}") or None


def _or_variable(value: str | Path | None, name: str) -> str | Path | None:
    return _variable(name) if value is None else value


def _bytes(path: Path | None) -> bytes | None:
    return None if path is None else path.read_bytes()


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or address.startswith("unix:")
