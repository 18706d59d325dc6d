"""FedSA-LoRA: share A, keep B (Guo et al., ICLR 2025, arXiv 2410.01463, section 4)."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.tensors import NamedTensors, subtract
from strategies.averaging import Averaging, PlainClient, PlainRound, everything
from strategies.base import LocalOutcome, LocalRound, LocalStart, Strategy
from strategies.lora.factors import without_zero_factors

__all__ = ["fedsa"]


def fedsa() -> Strategy:
    """Return A ← A + Σ pₖ ΔAₖ, with both factors trained and every site's B its own.

    There is no global model: ΔWₖ = s BₖA is personal. The server holds A alone, with B = 0, so what it evaluates and
    exports computes the base; `SiteMemory` at each site holds the rest. Bₖ never leaves. A site that takes part for the
    first time starts from B = 0.
    """
    return Strategy(
        is_linear=True,
        sensitivity="weighted_clip_norm",
        post_processes_sum=True,
        server=Averaging(),
        client=PersonalFactor(),
        trained=everything,
        uploaded=without_zero_factors,
        downloaded=without_zero_factors,
        has_memory=True,
    )


class PersonalFactor(PlainClient):
    """The client half that starts from what this site kept."""

    def begin(self, start: LocalStart) -> LocalRound:
        """Return a round that remembers what it trains and does not send."""
        return _PersonalRound(start)


@dataclass(frozen=True)
class _PersonalRound(PlainRound):
    @property
    def start(self) -> NamedTensors:
        """What was received, and the site's own factors."""
        return {**self.given.adapter, **self.given.memory}

    def finish(self, after: NamedTensors) -> LocalOutcome:
        """Return the shared part's difference; the rest stays."""
        personal = sorted(self.given.trained - self.given.uploaded)
        update = subtract(after, self.start, self.given.uploaded)
        return LocalOutcome(update, {name: after[name] for name in personal})
