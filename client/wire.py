"""What comes into a site and what leaves it, in the codec of the plan."""

from __future__ import annotations

import logging

import torch

from client.memory import SiteMemory
from privacy.client_level import clip_update
from protocol.codecs.base import ENCODED, WireContext
from protocol.codecs.build import build_codec, has_error_feedback
from protocol.codecs.feedback import compensated, residual
from protocol.errors import PrivacyError, SiteRefusal
from protocol.instructions import Instruction, InstructionHeader
from protocol.tensors import NamedTensors, add, corner, digest, layout_of
from strategies.lora.factors import whole_layout

__all__ = ["outgoing", "received"]

_log = logging.getLogger(__name__)


def received(instruction: Instruction, memory: SiteMemory) -> NamedTensors:
    """Return the tensors of an instruction; where a change was sent, added to what this site received before.

    Args:
        instruction: as it arrived.
        memory: of the adapters that this site received.

    Raises:
        SiteRefusal: code `unknown_reference`; the server sends everything then, in its next round.
        ReplyRejected: the change does not decode.
    """
    header, plan = instruction.header, instruction.header.plan
    if header.reference_digest is None:
        return instruction.tensors
    reference = memory.before(header.round)
    if digest(reference) != header.reference_digest:
        raise SiteRefusal("unknown_reference", "this site does not hold the adapter that the server sent a change of")
    change = {name: tensor for name, tensor in instruction.tensors.items() if name == ENCODED}
    extras = {name: tensor for name, tensor in instruction.tensors.items() if name != ENCODED}
    context = WireContext(plan.run, header.round, "", "down")
    # Whatever this site's rank, the change is that of the whole adapter.
    layout = whole_layout(layout_of(reference), plan.peft.rank, plan.strategy.cores)
    decoded = build_codec(plan.quantization).decode(change, layout, context)
    return add(reference, {name: corner(decoded[name], own.shape) for name, own in reference.items()}) | extras


def outgoing(
    update: NamedTensors, header: InstructionHeader, site: str, memory: SiteMemory
) -> tuple[NamedTensors, bool | None]:
    """Return what travels, and whether the clip changed nothing (None where nothing is clipped).

    What a codec left out before is added first, then the sum is clipped, the last step on real values, then encoded:
    the norm bound holds with error feedback too, and what the clip took off is gone.

    Args:
        update: trained minus received.
        header: of the instruction.
        site: this site's name.
        memory: of what the codec left out.

    Raises:
        SiteRefusal: code `not_finite`.
    """
    plan, below_clip = header.plan, None
    codec, feeds_back = build_codec(plan.quantization), has_error_feedback(plan.quantization)
    left_out = memory.before(header.round) if feeds_back else {}
    if feeds_back:
        update = compensated(update, left_out)
    if header.clip_norm is not None:
        update, below_clip = _clipped(update, header.clip_norm)
    context = WireContext(plan.run, header.round, site, "up")
    try:
        encoded = codec.encode(update, context, context.rounding())
    except ValueError as error:
        raise SiteRefusal("not_finite", f"the update cannot be encoded: {error}") from error
    if feeds_back:
        left = residual(update, codec.decode(encoded, layout_of(update), context))
        # What this round did not train waits for a round that does.
        memory.keep(header.round, {**left_out, **left})
    return encoded, below_clip


def _clipped(update: NamedTensors, clip_norm: float) -> tuple[NamedTensors, bool]:
    """Return the clipped update; zeros for one that is not finite, because a refusal would tell that it was not."""
    try:
        return clip_update(update, clip_norm)
    except PrivacyError as error:
        _log.warning("zeros are sent in place of the update: %s", error)
        return {name: torch.zeros_like(tensor) for name, tensor in update.items()}, True
