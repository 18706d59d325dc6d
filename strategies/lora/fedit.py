"""FedIT: train and average both LoRA factors (Zhang et al., ICASSP 2024, arXiv 2305.05644, section 3)."""

from __future__ import annotations

from protocol.tensors import NamedTensors, add
from strategies.mean import WeightedMean

__all__ = ["FedIT"]


class FedIT:
    """A ← A + Σ pₖ ΔAₖ and B ← B + Σ pₖ ΔBₖ.

    The product of the means is not the mean of the products: the server's B̄Ā misses Σ pₖ (Bₖ-B̄)(Aₖ-Ā). Under
    example-level privacy both factors are noised and their noises multiply; `ffa_lora` has neither problem.
    """

    is_linear = True

    def trained(self, names: frozenset[str]) -> frozenset[str]:
        """Return everything."""
        return names

    def aggregator(self) -> WeightedMean:
        """Return a weighted mean."""
        return WeightedMean()

    def step(self, adapter: NamedTensors, combined: NamedTensors) -> NamedTensors:
        """Return the adapter moved by the mean update."""
        return add(adapter, combined)
