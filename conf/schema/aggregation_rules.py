"""The support matrix of server optimizers, objectives and robust rules. Each rule returns the problem, or None."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from conf.schema.federation import SGD, Buffered
from conf.schema.objective import FedDyn, FedNova, FedProx, NoObjective, QFedAvg, Scaffold
from conf.schema.privacy import ClientLevel, NoPrivacy, local_privacy
from conf.schema.robust import FLTrust, NormBound, NoRobustness, replies_needed
from conf.schema.server_optimizer import NoServerOptimizer
from conf.schema.strategy_rules import STRATEGY_VARIANTS

if TYPE_CHECKING:
    from conf.schema.experiment import Experiment

__all__ = [
    "ADDING_STRATEGIES",
    "buffered_needs_plain_updates",
    "corrections_need_whole_updates",
    "equal_ranks_to_compare",
    "fair_weights_need_a_loss",
    "fixed_coordinates",
    "no_reply_to_spare",
    "objective_fits_optimizer",
    "objective_within_client_level",
    "one_server_step",
    "robust_is_no_sum",
    "robust_needs_comparable_updates",
    "robust_needs_replies",
    "robust_over_plain_updates",
    "robust_without_weights",
    "root_needs_held_out_records",
]

_ADDING = tuple(variant for variant in STRATEGY_VARIANTS if variant().adds)
ADDING_STRATEGIES: tuple[str, ...] = tuple(variant.model_fields["kind"].default for variant in _ADDING)
"""Kinds whose server adds the mean update to the adapter: a coordinate means the same in every round and at every
site, so that momentum makes sense."""


def fixed_coordinates(experiment: Experiment) -> str | None:
    """What remembers or compares coordinates needs a strategy that leaves them where they are."""
    strategy = experiment.strategy
    if strategy.adds:
        return None
    chosen = [
        f"{group}={choice.kind}"
        for group, choice, harmless in (
            ("server_optimizer", strategy.server_optimizer, NoServerOptimizer),
            ("objective", strategy.objective, NoObjective | FedProx),
            ("robust", strategy.robust, NoRobustness),
        )
        if not isinstance(choice, harmless)
    ]
    if not chosen:
        return None
    return (
        f"{', '.join(chosen)}: strategy={strategy.kind} changes what the adapter's coordinates mean between rounds; "
        f"use strategy={' or '.join(ADDING_STRATEGIES)}"
    )


def corrections_need_whole_updates(experiment: Experiment) -> str | None:
    """SCAFFOLD's and FedDyn's server works out from an update what a site's steps did."""
    strategy = experiment.strategy
    if not strategy.adds or strategy.sends_difference or not isinstance(strategy.objective, Scaffold | FedDyn):
        return None
    whole = _kinds(lambda variant: variant.sends_difference)
    return (
        f"objective={strategy.objective.kind} reads a site's steps out of its update, and with "
        f"strategy={strategy.kind} that is not all that the site changed; use strategy={whole}, or objective="
        "none, fedprox, fednova or qfedavg"
    )


def robust_needs_comparable_updates(experiment: Experiment) -> str | None:
    """A robust rule tells attackers from others by comparing their updates."""
    strategy = experiment.strategy
    if not strategy.adds or not strategy.incomparable or isinstance(strategy.robust, NoRobustness):
        return None
    return (
        f"robust={strategy.robust.kind} compares updates, and with strategy={strategy.kind} {strategy.incomparable}; "
        f"use strategy={_kinds(lambda variant: not variant.incomparable)}, or robust=none"
    )


def equal_ranks_to_compare(experiment: Experiment) -> str | None:
    """Control variates and distances are between tensors of one size."""
    strategy, ranks, rank = experiment.strategy, experiment.federation.site_ranks, experiment.peft.rank
    if ranks is None or all(each >= rank for each in ranks):
        return None
    if isinstance(strategy.robust, NoRobustness) and not isinstance(strategy.objective, Scaffold | FedDyn):
        return None
    return (
        f"federation.site_ranks={list(ranks)} with robust={strategy.robust.kind}, objective="
        f"{strategy.objective.kind}: updates of different sizes cannot be compared; use federation.site_ranks=null"
    )


def _kinds(fits: Callable[[Any], bool]) -> str:
    """Return the adding strategies that fit, as a message lists them."""
    return " or ".join(variant.model_fields["kind"].default for variant in _ADDING if fits(variant))


def one_server_step(experiment: Experiment) -> str | None:
    """FedDyn is a server step of its own."""
    strategy = experiment.strategy
    if not isinstance(strategy.objective, FedDyn) or isinstance(strategy.server_optimizer, NoServerOptimizer):
        return None
    return (
        f"objective=feddyn moves the adapter by its own rule, server_optimizer={strategy.server_optimizer.kind} would "
        "undo it; use server_optimizer=none"
    )


def robust_over_plain_updates(experiment: Experiment) -> str | None:
    """FedProx changes what a site trains, the others what the server makes of updates, as a robust rule does."""
    strategy = experiment.strategy
    if isinstance(strategy.robust, NoRobustness) or isinstance(strategy.objective, NoObjective | FedProx):
        return None
    return (
        f"robust={strategy.robust.kind} with objective={strategy.objective.kind}: both say how updates are combined; "
        "use objective=none or fedprox"
    )


def robust_without_weights(experiment: Experiment) -> str | None:
    """A published count is a site's own claim."""
    strategy = experiment.strategy
    needs_equal = not isinstance(strategy.robust, NoRobustness) or isinstance(strategy.objective, Scaffold | FedDyn)
    if not needs_equal or strategy.weights == "uniform":
        return None
    if isinstance(strategy.robust, NoRobustness):
        return (
            f"objective={strategy.objective.kind} keeps an unweighted mean over all sites at the server; "
            "use strategy.weights=uniform"
        )
    return (
        f"robust={strategy.robust.kind} with strategy.weights={strategy.weights}: a site could claim any count; "
        "use strategy.weights=uniform"
    )


def robust_needs_replies(experiment: Experiment) -> str | None:
    """A rule withstands f attackers only among enough others."""
    robust = experiment.strategy.robust
    if isinstance(robust, NoRobustness | NormBound):
        return None
    cohort, needed = _cohort(experiment), replies_needed(robust)
    if cohort is None or cohort >= needed:
        return None
    return (
        f"robust={robust.kind} needs {needed} replies in a round to withstand strategy.robust.attackers="
        f"{robust.attackers} (strategy.robust.mixing={robust.mixing.kind}), the cohort has {cohort} sites; lower "
        f"strategy.robust.attackers, or ask {needed} sites"
    )


def no_reply_to_spare(experiment: Experiment) -> str | None:
    """A rule's own need is a quorum: where it takes the whole cohort, one site that is late ends the run."""
    robust, cohort = experiment.strategy.robust, _cohort(experiment)
    if isinstance(robust, NoRobustness | NormBound) or cohort is None:
        return None
    quorum = max(experiment.federation.min_replies, replies_needed(robust))
    if cohort != quorum or quorum == 1:
        return None
    return (
        f"robust={robust.kind} needs a valid reply of all {cohort} sites in every round, and the run ends at the first "
        "round that lacks one, after sites have spent their ε; ask more sites, or lower strategy.robust.attackers"
    )


def robust_is_no_sum(experiment: Experiment) -> str | None:
    """What one site changes of a median or a selection is not bounded by its clip norm."""
    robust = experiment.strategy.robust
    if not isinstance(experiment.privacy, ClientLevel) or isinstance(robust, NoRobustness):
        return None
    if isinstance(robust, NormBound):
        return "robust=norm_bound with privacy=client_level: the clip norm is that bound already; use robust=none"
    return (
        f"robust={robust.kind} with privacy=client_level: its sensitivity to one site is not known, and the noise "
        "would be for a sum; use robust=none, or privacy=example_level, under which it costs nothing"
    )


def objective_within_client_level(experiment: Experiment) -> str | None:
    """Under client-level privacy the server sees a noised sum alone, and a site's update is clipped after training."""
    objective = experiment.strategy.objective
    if not isinstance(experiment.privacy, ClientLevel) or isinstance(objective, NoObjective | FedProx):
        return None
    return (
        f"objective={objective.kind} needs each site's update as it was trained, privacy=client_level clips it and "
        "releases a sum alone; use objective=none or fedprox, or privacy=example_level"
    )


def objective_fits_optimizer(experiment: Experiment) -> str | None:
    """SCAFFOLD, FedNova and q-FedAvg read a mean gradient out of an update, which AdamW does not allow."""
    objective, optimizer = experiment.strategy.objective, experiment.federation.local.optimizer
    if not isinstance(objective, Scaffold | FedNova | QFedAvg) or isinstance(optimizer, SGD):
        return None
    return (
        f"objective={objective.kind} divides an update by the steps or the learning rate behind it, which says "
        f"nothing under federation.local.optimizer.kind={optimizer.kind}; use sgd (momentum is accounted for)"
    )


def fair_weights_need_a_loss(experiment: Experiment) -> str | None:
    """q-FedAvg weighs by losses, so they must leave: bare where nothing is protected, else noised and paid for."""
    if not isinstance(experiment.strategy.objective, QFedAvg):
        return None
    privacy = local_privacy(experiment.privacy)
    if isinstance(privacy, NoPrivacy):
        if experiment.federation.release_training_loss:
            return None
        return (
            "objective=qfedavg weighs sites by their training loss, and federation.release_training_loss=false keeps "
            "it; set it to true, or use another objective"
        )
    if privacy.loss_noise_multiplier is not None:
        return None
    return (
        "objective=qfedavg weighs sites by their training loss, which may not leave under "
        f"privacy={experiment.privacy.kind}; set privacy.loss_noise_multiplier (10, say) to release it with noise, or "
        "use another objective"
    )


def buffered_needs_plain_updates(experiment: Experiment) -> str | None:
    """A buffer mixes updates that started from different adapters, and a fast site may be in it twice."""
    strategy, mode = experiment.strategy, experiment.federation.mode
    if not isinstance(mode, Buffered):
        return None
    begun = "federation.mode.kind=buffered"
    if isinstance(experiment.privacy, ClientLevel):
        return (
            f"{begun} with privacy=client_level: who is in a buffer depends on how fast sites are, which no accounting "
            "covers; use federation.mode.kind=synchronous"
        )
    if not strategy.adds:
        return (
            f"{begun} adds updates from older adapters to a newer one, which strategy={strategy.kind} does not allow; "
            f"use strategy={' or '.join(ADDING_STRATEGIES)}"
        )
    if isinstance(strategy.objective, Scaffold | FedDyn):
        return (
            f"{begun} with objective={strategy.objective.kind}: what the server keeps for all sites would be of "
            "different rounds; use objective=none, fedprox, fednova or qfedavg"
        )
    if not isinstance(strategy.robust, NoRobustness | NormBound):
        return (
            f"{begun} with robust={strategy.robust.kind}: an attacker that answers fast would fill the buffer; use "
            "robust=norm_bound, or federation.mode.kind=synchronous"
        )
    if getattr(experiment.quantization, "downlink", "none") != "none":
        return (
            f"{begun} with quantization.downlink=same: sites hold adapters of different "
            "rounds, and a change is from the last one; use quantization.downlink=none"
        )
    cohort = _cohort(experiment)
    if cohort is not None and mode.buffer_size > cohort:
        return (
            f"federation.mode.buffer_size={mode.buffer_size} is larger than the {cohort} sites that are asked, each "
            f"of them once in a round; use at most {cohort}"
        )
    if experiment.federation.min_replies > mode.buffer_size:
        return (
            f"federation.min_replies={experiment.federation.min_replies} is larger than "
            f"federation.mode.buffer_size={mode.buffer_size}; use at most that"
        )
    return None


def _cohort(experiment: Experiment) -> int | None:
    """Return how many sites are asked in a round, where the configuration alone tells."""
    return experiment.federation.cohort_size or experiment.data.partition.population


def root_needs_held_out_records(experiment: Experiment) -> str | None:
    """The server's own update is trained on held-out records, which `evaluation.every=0` does not read."""
    if not isinstance(experiment.strategy.robust, FLTrust) or experiment.evaluation.every > 0:
        return None
    return (
        "robust=fltrust trains on public held-out records, evaluation.every=0 reads none; set evaluation.every to 1 or "
        "more"
    )
