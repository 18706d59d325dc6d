"""The two factors of LoRA by name: ΔW = s·B A, with A drawn at random and B zero at first."""

from __future__ import annotations

from strategies.base import Names

__all__ = ["RANDOM_FACTORS", "is_random_factor", "without_random_factors"]

RANDOM_FACTORS = ("lora_A", "lora_embedding_B")
"""The factor drawn at random; the other one starts at zero. PEFT's embedding has them swapped."""


def is_random_factor(name: str) -> bool:
    """Return whether a tensor is the factor that is drawn at random."""
    return any(part in RANDOM_FACTORS for part in name.split("."))


def without_random_factors(names: Names, round_number: int) -> Names:
    """Return all names but those of the random factors, in every round."""
    return frozenset(name for name in names if not is_random_factor(name))
