"""What a site agrees to. Its own file decides; an instruction can only ask."""

from __future__ import annotations

from conf.schema.privacy import NoPrivacy, local_privacy
from conf.schema.site import SiteFile, SitePolicy
from protocol.errors import SiteRefusal
from protocol.instructions import InstructionHeader

__all__ = ["check_policy"]

_UNITS = {"example_level": "record", "user_level": "user"}


def check_policy(site: SiteFile, header: InstructionHeader, *, simulated: bool = False) -> None:
    """Refuse what the site's file does not allow, and repeatable noise unless the site is `simulated`.

    Raises:
        SiteRefusal: with a code for the server, and a message that tells nothing about the data.
    """
    plan, policy = header.plan, site.policy
    if header.round > plan.rounds:
        raise SiteRefusal("round_out_of_plan", f"round {header.round} is beyond the {plan.rounds} rounds of the plan")
    steps = min(plan.local.steps, site.runtime.steps_per_round or plan.local.steps)
    if steps > policy.max_steps_per_round:
        raise SiteRefusal(
            "too_many_steps",
            f"{steps} steps per round are above this site's policy.max_steps_per_round={policy.max_steps_per_round}",
        )
    if plan.task != site.task:
        raise SiteRefusal("wrong_task", f"the plan's task is not this site's own ({site.task.kind})")
    asked = local_privacy(plan.privacy)
    seeds = [each.insecure_seed for each in (plan.privacy, asked) if not isinstance(each, NoPrivacy)]
    if any(seed is not None for seed in seeds) and not simulated:
        raise SiteRefusal(
            "insecure_seed",
            "the plan makes the noise repeatable, which real sites never do; set privacy.insecure_seed=null",
        )
    if asked.kind == "none":
        if plan.privacy.kind == "client_level":
            _check_trust(policy)
        elif not policy.allow_no_privacy:
            raise SiteRefusal(
                "no_privacy", "the plan protects nothing and this site's policy.allow_no_privacy is false"
            )
        return
    if asked.kind == "user_level" and site.published_users is None:
        raise SiteRefusal("no_users", "this site publishes no count of users, so it takes no part in user-level runs")
    if site.budget is not None and site.budget.unit != _UNITS[asked.kind]:
        raise SiteRefusal(
            "wrong_unit", f"this site's budget counts each {site.budget.unit}, the plan protects a {_UNITS[asked.kind]}"
        )
    if site.budget is None:
        raise SiteRefusal("no_budget", "this site has no privacy budget; its operator must set one in the site file")
    if not isinstance(asked, NoPrivacy) and asked.delta is not None and asked.delta < site.budget.delta:
        raise SiteRefusal(
            "delta_below_budget",
            f"the plan asks for δ={asked.delta:.3g}, below the δ={site.budget.delta:.3g} at which this site keeps its "
            f"budget; ask for {site.budget.delta:.3g} or more, or null",
        )


def _check_trust(policy: SitePolicy) -> None:
    """Client-level noise is added by the server, which sees this site's clipped update first."""
    if not policy.trust_server_noise:
        raise SiteRefusal(
            "no_trust_in_server_noise",
            "the plan leaves the noise to the server and this site's policy.trust_server_noise is false",
        )
