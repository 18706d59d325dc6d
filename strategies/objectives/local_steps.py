"""How far a local optimizer goes on a constant gradient: what FedNova and SCAFFOLD divide an update by."""

from __future__ import annotations

from conf.schema.federation import SGD, Optimizer

__all__ = ["effective_steps"]


def effective_steps(optimizer: Optimizer, steps: int) -> float:
    """Return ‖a‖₁ of the update -η Σᵢ aᵢ gᵢ that SGD makes of its gradients (Wang et al. 2020, 2007.07481, table 1).

    Without momentum every aᵢ is 1 and ‖a‖₁ is the number of steps. Heavy-ball momentum ρ uses gᵢ again in every later
    step, aᵢ = (1-ρ^(τ-i+1)) / (1-ρ), so that ‖a‖₁ = (τ - ρ (1-ρ^τ) / (1-ρ)) / (1-ρ). AdamW divides by its own moments
    and has no such weights: the number of steps is returned, and what needs more refuses AdamW.
    """
    if not isinstance(optimizer, SGD) or optimizer.momentum == 0:
        return float(steps)
    rho = optimizer.momentum
    return (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)
