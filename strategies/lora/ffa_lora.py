"""FFA-LoRA: freeze A, train and average B (Sun et al., ICLR 2024, arXiv 2403.12313, section 4)."""

from __future__ import annotations

from protocol.tensors import NamedTensors, add
from strategies.mean import WeightedMean

__all__ = ["FFALoRA"]

_RANDOM_FACTORS = ("lora_A", "lora_embedding_B")
"""The factor drawn at random is frozen, the one that starts at zero is trained. PEFT's embedding has them swapped."""


class FFALoRA:
    """B ← B + Σ pₖ ΔBₖ, with A as drawn from the public seed.

    With one common A the mean is exact, Σ pₖ BₖA = B̄A; the noise enters linearly; and half the bytes travel, because
    every site derives A itself. Tensors that are no LoRA factor (a classification head) are trained and averaged too.
    """

    is_linear = True

    def trained(self, names: frozenset[str]) -> frozenset[str]:
        """Return everything but the A factors."""
        return frozenset(name for name in names if not any(part in _RANDOM_FACTORS for part in name.split(".")))

    def aggregator(self) -> WeightedMean:
        """Return a weighted mean."""
        return WeightedMean()

    def step(self, adapter: NamedTensors, combined: NamedTensors) -> NamedTensors:
        """Return the adapter moved by the mean update."""
        return add(adapter, combined)
