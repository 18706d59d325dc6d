"""What a site agrees to. Its own file decides; an instruction can only ask, and the stricter of the two holds."""

from __future__ import annotations

from datetime import datetime

from conf.schema.privacy import NoPrivacy, local_privacy
from conf.schema.site import SiteFile, SitePolicy
from privacy.plan import PrivacyPlan
from protocol.errors import SiteRefusal
from protocol.instructions import ClientPlan, InstructionHeader

__all__ = ["check_cost", "check_moment", "check_policy"]

_UNITS = {"example_level": "record", "user_level": "user"}


def check_policy(site: SiteFile, header: InstructionHeader, *, simulated: bool = False) -> None:
    """Refuse what the site's file does not allow, and repeatable noise unless the site is `simulated`.

    What it costs is `check_cost`'s, or `claims.check_claimed_cost`'s where the server adds the noise; when it may be
    asked is `check_moment`'s.

    Raises:
        SiteRefusal: with a code for the server; its message is for the site's own log.
    """
    plan, policy = header.plan, site.policy
    if policy is None:
        raise SiteRefusal("no_policy", "the site file has no policy section, so nothing is allowed")
    if header.round > plan.rounds:
        raise SiteRefusal("round_out_of_plan", f"round {header.round} is beyond the {plan.rounds} rounds of the plan")
    if plan.task != site.task:
        raise SiteRefusal("wrong_task", f"the plan's task is not this site's own ({site.task.kind})")
    _check_work(site, plan, policy)
    if policy.bases is not None and header.base_digest not in policy.bases:
        raise SiteRefusal("base_not_allowed", f"the base {header.base_digest[:12]} is not among policy.bases")
    _check_privacy(site, header, policy, simulated)


def check_cost(site: SiteFile, privacy: PrivacyPlan) -> None:
    """Refuse a plan whose noise, or whose price at the budget's δ, breaks the policy; nothing is spent yet.

    Raises:
        SiteRefusal: `noise_too_small`, `epsilon_per_run` or `epsilon_per_round`.
    """
    policy = site.policy
    if policy is None or not privacy.is_private:
        return
    if privacy.noise_multiplier < policy.min_noise_multiplier:
        raise SiteRefusal(
            "noise_too_small",
            f"the plan's noise multiplier {privacy.noise_multiplier:.3f} is below policy.min_noise_multiplier="
            f"{policy.min_noise_multiplier:g}",
        )
    for code, limit, mechanism in (
        ("epsilon_per_run", policy.max_epsilon_per_run, privacy.whole_run),
        ("epsilon_per_round", policy.max_epsilon_per_round, privacy.mechanism(privacy.steps_per_round)),
    ):
        if limit is None:
            continue
        epsilon = privacy.epsilon([mechanism])
        if not epsilon <= limit * (1 + 1e-9):  # unknown (NaN) means refused
            raise SiteRefusal(code, f"it would cost ε={epsilon:.3f}, above policy.max_{code}={limit:g}")


def check_moment(site: SiteFile, now: datetime, plan: ClientPlan) -> None:
    """Refuse what is asked outside of working hours, or after a budget's last day (in client-level runs, of either).

    Raises:
        SiteRefusal: `outside_hours` or `budget_expired`.
    """
    if site.policy is not None and site.policy.hours is not None and not site.policy.hours.cover(now):
        raise SiteRefusal("outside_hours", f"{now.isoformat()} is outside of policy.hours")
    if site.budget is not None and site.budget.expired(now):
        raise SiteRefusal("budget_expired", f"the budget expired on {site.budget.expires}, it is {now.isoformat()}")
    whole = site.site_budget
    if whole is not None and plan.privacy.kind == "client_level" and whole.expired(now):
        raise SiteRefusal("budget_expired", f"site_budget expired on {whole.expires}, it is {now.isoformat()}")


def _check_work(site: SiteFile, plan: ClientPlan, policy: SitePolicy) -> None:
    """Refuse too much work, and kinds of work that the policy does not list."""
    steps = min(plan.local.steps, site.runtime.steps_per_round or plan.local.steps)
    for code, asked, limit, name in (
        ("too_many_rounds", plan.rounds, policy.max_rounds, "policy.max_rounds"),
        ("too_many_steps", steps, policy.max_steps_per_round, "policy.max_steps_per_round"),
        ("rank_too_large", plan.peft.rank, policy.max_rank, "policy.max_rank"),
    ):
        if asked > limit:
            raise SiteRefusal(code, f"the plan asks for {asked}, above this site's {name}={limit}")
    if plan.model.dtype not in policy.dtypes:
        raise SiteRefusal("dtype_not_allowed", f"model.dtype={plan.model.dtype} is not among this site's policy.dtypes")
    if policy.strategies is not None and plan.strategy.kind not in policy.strategies:
        raise SiteRefusal("strategy_not_allowed", f"strategy {plan.strategy.kind} is not among policy.strategies")
    for code, what, asked, allowed, name in (
        ("objective_not_allowed", "objective", plan.strategy.objective.kind, policy.objectives, "objectives"),
        (
            "server_rule_not_allowed",
            "server optimizer",
            plan.strategy.server_optimizer.kind,
            policy.server_optimizers,
            "server_optimizers",
        ),
        ("server_rule_not_allowed", "robust rule", plan.strategy.robust.kind, policy.robust_rules, "robust_rules"),
        ("quantization_not_allowed", "quantization", plan.quantization.kind, policy.quantization, "quantization"),
    ):
        if allowed is not None and asked not in (*allowed, "none"):
            raise SiteRefusal(code, f"{what} {asked} is not among policy.{name}")


def _check_privacy(site: SiteFile, header: InstructionHeader, policy: SitePolicy, simulated: bool) -> None:
    plan = header.plan
    asked = local_privacy(plan.privacy)
    seeds = [each.insecure_seed for each in (plan.privacy, asked) if not isinstance(each, NoPrivacy)]
    if any(seed is not None for seed in seeds) and not simulated:
        raise SiteRefusal(
            "insecure_seed",
            "the plan makes the noise repeatable, which real sites never do; set privacy.insecure_seed=null",
        )
    clips = [each.clip_norm for each in (plan.privacy, asked) if not isinstance(each, NoPrivacy)]
    clips += [] if header.clip_norm is None else [header.clip_norm]  # adaptive clipping moves it from the plan's
    if any(clip > policy.max_clip_norm for clip in clips):
        raise SiteRefusal(
            "clip_norm_too_large",
            f"clip norm {max(clips):g} is above this site's policy.max_clip_norm={policy.max_clip_norm:g}",
        )
    if isinstance(asked, NoPrivacy):
        if plan.privacy.kind == "client_level":
            _check_trust(policy)
        elif not policy.allow_no_privacy:
            raise SiteRefusal(
                "no_privacy", "the plan protects nothing and this site's policy.allow_no_privacy is false"
            )
        return
    if asked.kind not in policy.privacy_modes:
        raise SiteRefusal("mode_not_allowed", f"{asked.kind} is not among this site's policy.privacy_modes")
    if asked.loss_noise_multiplier is not None and not policy.release_noisy_loss:
        raise SiteRefusal("loss_not_allowed", "the plan releases the loss and policy.release_noisy_loss is false")
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
