"""What a site says of itself before a run, and the signature that tells it from another that gives its name."""

from __future__ import annotations

import json
from typing import Literal

from pydantic import Field

from conf.schema.base import Frozen
from protocol.instructions import WIRE_VERSION

__all__ = ["CHALLENGE_BYTES", "SiteCard"]

CHALLENGE_BYTES = 32
"""Random bytes that a server asks with: a card signed for another question is worth nothing."""


class SiteCard(Frozen):
    """What a site says of itself before a run. All of it is public."""

    wire_version: Literal[1] = WIRE_VERSION
    cloister_version: str
    site: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    published_records: int = Field(ge=1)
    trained_rank: int | None = Field(default=None, ge=1, description="the most LoRA rank that the site trains")
    key: str = Field(
        default="", pattern=r"^([0-9a-f]{64})?$", description="the site's Ed25519 public key, which its ledger has too"
    )
    signature: str = Field(
        default="", pattern=r"^([0-9a-f]{128})?$", description="of `statement`, by that key; empty: none"
    )

    def statement(self, challenge: bytes) -> bytes:
        """Return what the site's key signs: this card without its signature, and the server's challenge."""
        said = json.dumps(self.model_dump(mode="json", exclude={"signature"}), sort_keys=True)
        return b"cloister card|" + challenge.hex().encode() + b"|" + said.encode()
