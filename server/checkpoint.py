"""What a round leaves so that a run can go on from it: one file, whole or not at all."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError

from finetuning.checkpoints import load_tensors, save_tensors
from protocol.instructions import LedgerName
from protocol.tensors import NamedTensors
from server.downlink import Sent
from strategies.base import ServerState

__all__ = ["Checkpoint", "Heads", "load_newest", "save_checkpoint"]

Heads = Mapping[str, dict[LedgerName, str]]
"""Each site's ledger heads."""

_log = logging.getLogger(__name__)
_ADAPTER, _STATE, _SENT, _LEFT = "adapter/", "state/", "sent/", "left/"


@dataclass(frozen=True)
class Checkpoint:
    """Everything that the next round starts from."""

    round: int
    adapter: NamedTensors
    state: ServerState
    members: tuple[str, ...]
    """The sites of the run: cohorts are drawn from these."""
    protection: Mapping[str, float | str] = field(default_factory=dict)
    """What the server's own privacy mechanism carries on, beside its ledger and its keys."""
    sent: Sent = field(default_factory=Sent)
    unused: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Rounds whose update was not used and whose site has not been told yet, by site."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """The members' public keys: who goes on under a name has the key that it began with."""
    heads: Heads = field(default_factory=dict)
    """Where each site's ledgers ended when it last answered (`protocol.instructions.ReplyHeader.ledger_heads`)."""


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, run: str, config_digest: str, base_digest: str) -> Path:
    """Write one file `round-NNNNN.safetensors`, atomically and durably, and return its path."""
    facts = {
        "run": run,
        "round": checkpoint.round,
        "config_digest": config_digest,
        "base_digest": base_digest,
        "members": checkpoint.members,
        "numbers": dict(checkpoint.state.numbers),
        "protection": checkpoint.protection,
        "confirmed": checkpoint.sent.confirmed,
        "unused": checkpoint.unused,
        "keys": checkpoint.keys,
        "heads": checkpoint.heads,
    }
    parts = {
        _ADAPTER: checkpoint.adapter,
        _STATE: checkpoint.state.tensors,
        _SENT: checkpoint.sent.adapter,
        _LEFT: checkpoint.sent.left,
    }
    tensors = {prefix + name: tensor.clone() for prefix, part in parts.items() for name, tensor in part.items()}
    path = folder / f"round-{checkpoint.round:05d}.safetensors"
    save_tensors(path, tensors, {"cloister": json.dumps(facts, sort_keys=True)})
    return path


def load_newest(folder: Path, *, run: str, config_digest: str, base_digest: str) -> Checkpoint | None:
    """Return the newest checkpoint of a run that can be read; None when there is none.

    A file that cannot be read, or that belongs to another run, configuration or base, is passed over with a warning:
    the round before it is then done again, and sites answer it from what they have already spent.
    """
    wanted = {"run": run, "config_digest": config_digest, "base_digest": base_digest}
    for path in sorted(folder.glob("round-*.safetensors"), reverse=True):
        try:
            tensors, metadata = load_tensors(path)
            facts = json.loads(metadata["cloister"])
            differing = [name for name, value in wanted.items() if facts[name] != value]
            if differing:
                _log.warning("checkpoint %s is passed over: it has another %s", path, differing[0])
                continue
            return Checkpoint(
                round=int(facts["round"]),
                adapter=_part(tensors, _ADAPTER),
                state=ServerState(_part(tensors, _STATE), facts["numbers"]),
                members=tuple(facts["members"]),
                protection=facts["protection"],
                sent=Sent(_part(tensors, _SENT), _part(tensors, _LEFT), tuple(facts["confirmed"])),
                unused={site: tuple(rounds) for site, rounds in facts["unused"].items()},
                keys=facts.get("keys", {}),
                heads=facts.get("heads", {}),
            )
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            _log.warning("checkpoint %s is passed over: it cannot be read (%s)", path, type(error).__name__)
    return None


def _part(tensors: NamedTensors, prefix: str) -> NamedTensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
