"""One HTTPS question at a time, to a server that must show a certificate of the federation's authority."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from http.client import HTTPResponse, HTTPSConnection
from pathlib import Path

__all__ = ["Door"]


@dataclass(frozen=True)
class Door:
    """An address, and the name its certificate must have."""

    address: str
    port: int
    authority: Path
    name: str = "localhost"
    timeout_s: float = 5.0

    def ask(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> int:
        """Return the status of an answer. `path` is sent as written.

        Raises:
            OSError: no connection, or (ssl.SSLError) no TLS that can be trusted.
            http.client.HTTPException: no HTTP.
        """
        connection = HTTPSConnection(self.name, self.port, timeout=self.timeout_s)
        connection.sock = self._connected()
        try:
            connection.putrequest(method, path, skip_accept_encoding=True)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            response: HTTPResponse = connection.getresponse()
            response.read()
            return response.status
        finally:
            connection.close()

    def _connected(self) -> ssl.SSLSocket:
        context = ssl.create_default_context(cafile=str(self.authority))
        plain = socket.create_connection((self.address, self.port), timeout=self.timeout_s)
        try:
            return context.wrap_socket(plain, server_hostname=self.name)
        except BaseException:
            plain.close()
            raise
