"""Fed-SB and RAVAN: train square cores between frozen factors, ΔW = s·B blockdiag(c₁H₁, …, c_hH_h) A.

Fed-SB (Singhal et al. 2025, arXiv 2502.15436, section 3) has one core R; RAVAN (Raje et al., NeurIPS 2025, arXiv
2506.05568, section 4) has h heads, each with a trained scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from protocol.tensors import NamedTensors, subtract
from strategies.averaging import Averaging, PlainClient, PlainRound
from strategies.base import LocalOutcome, LocalRound, LocalStart, Names, Strategy
from strategies.lora.factors import no_factors

__all__ = ["fedsb", "ravan"]

_CORE, _SCALE = "lora_core", "lora_core_scale"


def fedsb() -> Strategy:
    """Return R ← R + Σ pₖ ΔRₖ.

    The bases are common and fixed, so the mean is exact, Σ pₖ B RₖA = B R̄ A, and r² values per layer are trained,
    noised and sent. They are drawn from the public seed, so nothing else travels. A site of rank rₖ trains the leading
    rₖ x rₖ block.
    """
    return Strategy(
        is_linear=True,
        sensitivity="weighted_clip_norm",
        post_processes_sum=True,
        server=Averaging(),
        client=PlainClient(),
        trained=_cores,
        uploaded=_cores,
        downloaded=_cores,
        takes_ranks=True,
    )


def ravan() -> Strategy:
    """Return Hᵢ ← Hᵢ + Σ pₖ Δ(cᵢHᵢ)ₖ for each head i, with cᵢ = 1 at the start of every round.

    A site trains Hᵢ and cᵢ and sends their product, so the mean is exact: Σ pₖ Bᵢ(cᵢHᵢ)ₖAᵢ. h heads of r/h give a rank
    of r for r²/h values. A site of rank rₖ trains the first heads that fit.
    """
    return Strategy(
        is_linear=True,
        sensitivity="weighted_clip_norm",
        post_processes_sum=True,
        server=Averaging(),
        client=_Absorbing(),
        trained=_cores_and_scales,
        uploaded=_cores,
        downloaded=_cores,
        takes_ranks=True,
    )


class _Absorbing(PlainClient):
    def begin(self, start: LocalStart) -> LocalRound:
        """Return a round that sends scaled cores."""
        return _AbsorbingRound(start)


@dataclass(frozen=True)
class _AbsorbingRound(PlainRound):
    def finish(self, after: NamedTensors) -> LocalOutcome:
        """Return scaled cores minus received ones."""
        return LocalOutcome(subtract(_absorbed(after), _absorbed(self.start), self.given.uploaded))


def _absorbed(tensors: NamedTensors) -> dict[str, torch.Tensor]:
    """Return the adapter with every scale moved into its cores."""
    absorbed = dict(tensors)
    for name in tensors:
        module, found, _ = name.rpartition(f".{_SCALE}")
        if found:
            core = f"{module}.{_CORE}"
            absorbed[core] = tensors[core] * tensors[name][:, None, None]
    return absorbed


def _cores(names: Names, round_number: int) -> Names:
    return frozenset(name for name in no_factors(names, round_number) if not name.endswith(f".{_SCALE}"))


def _cores_and_scales(names: Names, round_number: int) -> Names:
    return no_factors(names, round_number)
