"""What a server says of its noise in a client-level run: compared with the plan, and with what this site allows.

A site cannot see the noise. It can see that the claim contradicts the plan, and what the claim would cost.
"""

from __future__ import annotations

from conf.schema.privacy import ClientLevel, NoPrivacy, local_privacy
from conf.schema.site import SiteFile
from privacy.accounting import epsilon_of
from privacy.mechanisms import SubsampledGaussian
from protocol.errors import SiteRefusal
from protocol.instructions import ClientPlan, InstructionHeader, ReleaseClaim

__all__ = ["check_claim", "check_claimed_cost", "whole_release"]

_TOLERANCE = 1e-6
"""Relative; between two machines an ε may differ by its last digits."""


def whole_release(claim: ReleaseClaim, plan: ClientPlan) -> SubsampledGaussian:
    """Return everything that a run releases by the claim; correlated noise is one mechanism."""
    steps = plan.rounds if claim.min_separation is None else 1
    return SubsampledGaussian(claim.sampling_rate, claim.noise_multiplier, steps)


def check_claimed_cost(site: SiteFile, header: InstructionHeader) -> None:
    """Refuse noise of the server's that breaks the policy, where this site adds none itself; nothing is spent yet.

    ε is at `site_budget`'s δ, or the plan's.

    Raises:
        SiteRefusal: `noise_too_small`, `epsilon_per_run` or `epsilon_per_round`; `no_budget` if a limit on ε has no δ;
            or what `check_claim` raises.
    """
    policy, privacy = site.policy, header.plan.privacy
    if policy is None or not isinstance(privacy, ClientLevel) or not isinstance(local_privacy(privacy), NoPrivacy):
        return
    limits = {"epsilon_per_run": policy.max_epsilon_per_run, "epsilon_per_round": policy.max_epsilon_per_round}
    asked = {code: limit for code, limit in limits.items() if limit is not None}
    if not asked and not policy.min_noise_multiplier:
        return
    site_delta = None if site.site_budget is None else site.site_budget.delta
    claim = check_claim(header, site_delta)
    if claim.noise_multiplier < policy.min_noise_multiplier:
        raise SiteRefusal(
            "noise_too_small",
            f"the server claims a noise multiplier of {claim.noise_multiplier:g}, below policy.min_noise_multiplier="
            f"{policy.min_noise_multiplier:g}",
        )
    delta = privacy.delta if site_delta is None else site_delta
    whole = whole_release(claim, header.plan)
    for code, limit in asked.items():
        if delta is None:
            raise SiteRefusal("no_budget", f"policy.max_{code} needs a δ, and the plan has none; set site_budget")
        epsilon = epsilon_of([whole if code == "epsilon_per_run" else whole.repeated(1)], delta)
        if not epsilon <= limit * (1 + 1e-9):  # unknown (NaN) means refused
            raise SiteRefusal(code, f"by the claim it costs ε={epsilon:.3f}, above policy.max_{code}={limit:g}")


def check_claim(header: InstructionHeader, site_delta: float | None) -> ReleaseClaim:
    """Return what the server says of its noise, if the plan's own figures bear it out.

    Args:
        header: the instruction.
        site_delta: of `site_budget`. A plan that gives no δ is taken at the server's, which must not be above this.

    Raises:
        SiteRefusal: code `no_release_claim` or `wrong_release_claim`.
    """
    claim, privacy = header.release, header.plan.privacy
    if claim is None or not isinstance(privacy, ClientLevel):
        raise SiteRefusal("no_release_claim", "the server does not say how it noises the sum, so nothing can be booked")
    problem = _wrong_delta(claim, privacy, site_delta) or _problem(claim, privacy, header.plan)
    if problem:
        raise SiteRefusal("wrong_release_claim", f"{problem}; server and plan disagree")
    return claim


def _problem(claim: ReleaseClaim, privacy: ClientLevel, plan: ClientPlan) -> str:
    correlated = privacy.noise.kind != "independent"
    limits = (claim.min_separation, claim.max_participations)
    if correlated != all(limit is not None for limit in limits) or (not correlated and any(limits)):
        return "limits on participation belong to correlated noise, both of them, and to nothing else"
    if correlated and claim.sampling_rate < 1:
        return "correlated noise is not amplified by sampling"
    if privacy.noise_multiplier is not None:
        if claim.noise_multiplier < privacy.noise_multiplier:
            return (
                f"the plan's noise multiplier is {privacy.noise_multiplier:g}, the claim's {claim.noise_multiplier:g}"
            )
        return ""
    epsilon = epsilon_of([whole_release(claim, plan)], claim.delta)
    if privacy.target_epsilon is not None and epsilon > privacy.target_epsilon * (1 + _TOLERANCE):
        return f"the plan's ε is {privacy.target_epsilon:g}, the claimed noise gives {epsilon:.4g}"
    return ""


def _wrong_delta(claim: ReleaseClaim, privacy: ClientLevel, site_delta: float | None) -> str:
    if privacy.delta is not None:
        return (
            ""
            if claim.delta == privacy.delta
            else f"the plan's δ is {privacy.delta:.3g}, the claim's {claim.delta:.3g}"
        )
    if site_delta is not None and claim.delta > site_delta:
        return f"the claim's δ is {claim.delta:.3g}, above site_budget.delta={site_delta:.3g}, and the plan gives none"
    return ""
