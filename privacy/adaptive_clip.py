"""A clip norm that follows a quantile of the update norms (Andrew et al. 2021, arXiv 1905.03871)."""

from __future__ import annotations

import math

from conf.schema.privacy import AdaptiveClip
from protocol.errors import PrivacyError

__all__ = ["next_clip_norm", "update_noise_multiplier"]


def update_noise_multiplier(noise_multiplier: float, count_noise: float) -> float:
    """Return z_Δ = (z⁻² - (2σ_b)⁻²)^(-1/2): the updates' noise multiplier (theorem 1).

    The sum of updates with z_Δ and the count of unclipped updates with σ_b are together one Gaussian release with
    multiplier z. The count is a sum of ±1/2, one per site, so its sensitivity is 1/2.

    Args:
        noise_multiplier: z, what the accountant is told.
        count_noise: σ_b, the standard deviation of the noise on the count.

    Raises:
        PrivacyError: the count alone would cost as much as both may, z >= 2σ_b.
    """
    if noise_multiplier >= 2 * count_noise:
        raise PrivacyError(
            f"privacy.clipping.count_noise={count_noise:g} spends the whole ε on the count of unclipped updates: "
            f"count and updates together need a noise multiplier of {noise_multiplier:.3g}; use more than "
            f"{noise_multiplier / 2:.3g}"
        )
    return (noise_multiplier**-2 - (2 * count_noise) ** -2) ** -0.5


def next_clip_norm(clip_norm: float, noised_count: float, expected_sites: float, config: AdaptiveClip) -> float:
    """Return C · exp(-η (b̃ - γ)) (algorithm 1); b̃ is the noised fraction of updates below C.

    Args:
        clip_norm: C of the round that ended.
        noised_count: Σ ±1/2 over the sites that replied (plus where the norm was below C), with its noise.
        expected_sites: the public expected size of a cohort.
        config: γ and η.
    """
    fraction = noised_count / expected_sites + 0.5
    return clip_norm * math.exp(-config.learning_rate * (fraction - config.quantile))
