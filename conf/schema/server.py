"""A server's own file: under which names sites reach it, and on which ports. Written by `cloister server init`."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from conf.schema.base import Frozen

__all__ = ["Host", "ServerFile"]

_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")


def _host(value: str) -> str:
    try:
        return str(ipaddress.ip_address(value))
    except ValueError:
        if len(value) <= 253 and _NAME.fullmatch(value) and not value.replace(".", "").isdigit():
            return value.lower()
    raise ValueError(f"{value!r} is neither a host name nor an IP address")


Host = Annotated[str, AfterValidator(_host)]


class ServerFile(Frozen):
    """What a federation's server is called and where it listens."""

    name: str = Field(default="cloister", pattern=r"^[a-z0-9][a-z0-9-]{0,30}$", description="names its systemd units")
    hosts: tuple[Host, ...] = Field(
        min_length=1,
        description="host names and addresses by which sites reach the proxy; the first one is told to them",
    )
    public_address: Host = Field(default="0.0.0.0", description="address on which the proxy listens for sites")
    public_port: int = Field(default=443, ge=1, le=65535, description="the proxy's port; all that a firewall opens")
    admin_port: int = Field(
        default=8000, ge=1, le=65535, description="the SuperLink's port, on loopback alone: who reaches it submits runs"
    )

    @model_validator(mode="after")
    def _ports_differ(self) -> ServerFile:
        if self.public_port == self.admin_port:
            raise ValueError(f"public_port and admin_port are both {self.admin_port}; give each its own")
        return self
