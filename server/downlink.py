"""How the adapter reaches the sites: in float32, or as the change since the last round in the codec of updates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from conf.schema.wire import Quantization
from protocol.codecs.base import WireContext
from protocol.codecs.build import build_codec, has_error_feedback, sends_changes
from protocol.codecs.feedback import compensated, residual
from protocol.instructions import Instruction
from protocol.tensors import NamedTensors, add, byte_count, corner, digest, layout_of, subtract

__all__ = ["ChangeDownlink", "Downlink", "FullDownlink", "Sent", "downlink_for"]


@dataclass(frozen=True)
class Sent:
    """What sites hold after a round."""

    adapter: NamedTensors = field(default_factory=dict)
    """As they decoded it, the tensors that are sent."""
    left: NamedTensors = field(default_factory=dict)
    """What the last change left out, with error feedback."""
    confirmed: tuple[str, ...] = ()
    """Sites that trained from it."""


class Downlink(Protocol):
    """Called in the order of its methods, once per round."""

    def broadcast(self, adapter: NamedTensors, names: frozenset[str], round_number: int) -> NamedTensors:
        """Return the adapter as every site will have it, and from which everything of this round follows."""
        ...

    def shortened(self, full: Instruction) -> Instruction | None:
        """Return the same instruction for a site that holds the last round's adapter; None where there is none."""
        ...

    def holds_last(self, site: str) -> bool:
        """Return whether a site showed that it has the adapter of the last round."""
        ...

    def confirmed(self, site: str) -> None:
        """Note that a site trained from this round's adapter."""
        ...

    def state(self) -> Sent:
        """Return what the next round's changes start from; stored in the checkpoint."""
        ...

    def restore(self, sent: Sent) -> None:
        """Go on from what `state` returned before an interruption."""
        ...


def downlink_for(config: Quantization, run: str) -> Downlink:
    """Return what an experiment asks for."""
    return ChangeDownlink(config, run) if sends_changes(config) else FullDownlink()


class FullDownlink:
    """Everything, in float32, to everybody."""

    def broadcast(self, adapter: NamedTensors, names: frozenset[str], round_number: int) -> NamedTensors:
        """Return the adapter."""
        return adapter

    def shortened(self, full: Instruction) -> None:
        """Return nothing."""

    def holds_last(self, site: str) -> bool:
        """Return False."""
        return False

    def confirmed(self, site: str) -> None:
        """Note nothing."""

    def state(self) -> Sent:
        """Return nothing."""
        return Sent()

    def restore(self, sent: Sent) -> None:
        """Nothing is carried on."""


class ChangeDownlink:
    """The encoded change, to sites that trained in the last round; everything, in float32, to the others.

    All of them start from one adapter, the decoded one, and so does the server: its digest is the instruction's. A site
    that lost its state refuses once, and gets everything in the next round. With error feedback, what a change left out
    is part of the next one. A site of a lower rank gets the same change and cuts it: what it holds is the cut of what
    the others hold, bit for bit, which a change of its own, encoded by itself, would not be.
    """

    def __init__(self, config: Quantization, run: str) -> None:
        self._codec, self._feeds_back, self._run = build_codec(config), has_error_feedback(config), run
        self._reference: NamedTensors = {}
        self._now: NamedTensors = {}
        self._encoded: NamedTensors | None = None
        self._left: NamedTensors = {}
        self._held: set[str] = set()
        self._confirmed: set[str] = set()

    def broadcast(self, adapter: NamedTensors, names: frozenset[str], round_number: int) -> NamedTensors:
        """Return the last round's adapter plus the decoded change; the adapter itself where nothing fits a change."""
        wanted: Mapping[str, torch.Tensor] = {name: adapter[name] for name in sorted(names)}
        self._held, self._confirmed = self._confirmed, set()
        self._reference, self._encoded = self._now, None
        if layout_of(self._reference) != layout_of(wanted):
            self._now, self._left = wanted, {}
            return adapter
        change = compensated(subtract(wanted, self._reference, names), self._left)
        context = WireContext(self._run, round_number, "", "down")
        self._encoded = self._codec.encode(change, context, context.rounding())
        decoded = self._codec.decode(self._encoded, layout_of(change), context)
        if self._feeds_back:
            self._left = residual(change, decoded)
        self._now = add(self._reference, decoded)
        return {**adapter, **self._now}

    def shortened(self, full: Instruction) -> Instruction | None:
        """Return the instruction with the change; None in a first round, where a site is sent something else, and where
        the change takes no fewer bytes than a cut of the adapter in float32."""
        sent = {name: full.tensors[name] for name in self._now if name in full.tensors}
        if self._encoded is None or len(sent) < len(self._now) or byte_count(self._encoded) >= byte_count(sent):
            return None
        if not all(torch.equal(corner(self._now[name], value.shape), value) for name, value in sent.items()):
            return None
        reference = {name: corner(self._reference[name], value.shape) for name, value in sent.items()}
        extras = {name: tensor for name, tensor in full.tensors.items() if name not in sent}
        header = full.header.model_copy(update={"reference_digest": digest(reference)})
        return replace(full, header=header, tensors={**self._encoded, **extras})

    def holds_last(self, site: str) -> bool:
        """Return whether a verified reply in the last round started from its adapter."""
        return site in self._held

    def confirmed(self, site: str) -> None:
        """Note a verified reply: it names the digest of the adapter that it started from."""
        self._confirmed.add(site)

    def state(self) -> Sent:
        """Return this round's adapter, what its change left out, and who trained from it."""
        return Sent(self._now, self._left, tuple(sorted(self._confirmed)))

    def restore(self, sent: Sent) -> None:
        """Take the last round's."""
        self._now, self._left, self._confirmed = sent.adapter, sent.left, set(sent.confirmed)
