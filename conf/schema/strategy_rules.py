"""The support matrix of strategies: what each needs of adapters, ranks and noise; `rules.py` lists it with the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

from conf.schema.objective import FedDyn, QFedAvg, Scaffold
from conf.schema.privacy import ClientLevel
from conf.schema.robust import NoRobustness
from conf.schema.strategy import FLASC, Strategy

if TYPE_CHECKING:
    from conf.schema.experiment import Experiment

__all__ = [
    "STRATEGY_VARIANTS",
    "both_factors_under_noise",
    "correlated_noise_needs_fixed_coordinates",
    "folding_needs_no_dora",
    "heads_divide_the_rank",
    "no_global_model",
    "one_factor_needs_no_dora",
    "one_rank_because_of",
    "selection_is_no_change",
    "site_ranks_need_a_strategy",
    "starts_anew",
]

STRATEGY_VARIANTS: tuple[Any, ...] = get_args(get_args(Strategy)[0])
"""Every strategy's schema class."""


def one_factor_needs_no_dora(experiment: Experiment) -> str | None:
    """The mean of one factor is exact only when that factor is all that moves in its layer."""
    strategy = experiment.strategy
    if strategy.trains == "both" or not experiment.peft.dora:
        return None
    if strategy.trains == "cores":
        return f"strategy={strategy.kind} trains cores between the factors, which DoRA cannot norm; use peft.dora=false"
    return (
        f"strategy={strategy.kind} trains one factor at a time, peft.dora=true adds a magnitude; use strategy=fedit or "
        "peft.dora=false"
    )


def heads_divide_the_rank(experiment: Experiment) -> str | None:
    """Every core is as large as the others."""
    cores, rank = experiment.strategy.cores, experiment.peft.rank
    if cores == 0 or rank % cores == 0:
        return None
    return f"strategy.heads={cores} does not divide peft.rank={rank}; use a rank of {cores * max(1, rank // cores)}"


def folding_needs_no_dora(experiment: Experiment) -> str | None:
    """DoRA normalizes W₀ + BA, and knows nothing of what was folded beside it."""
    strategy = experiment.strategy
    if not strategy.folds or not experiment.peft.dora:
        return None
    return f"strategy={strategy.kind} folds products beside the base, which peft.dora=true ignores; use peft.dora=false"


def site_ranks_need_a_strategy(experiment: Experiment) -> str | None:
    """Sites of lower ranks need a rule for factors of different sizes, and a rank above theirs."""
    ranks, strategy, rank = experiment.federation.site_ranks, experiment.strategy, experiment.peft.rank
    if ranks is None or all(each >= rank for each in ranks):
        return None
    if not strategy.takes_ranks:
        takers = ", ".join(variant.model_fields["kind"].default for variant in STRATEGY_VARIANTS if variant.takes_ranks)
        return (
            f"federation.site_ranks={list(ranks)} has ranks below peft.rank={rank}, which strategy={strategy.kind} "
            f"cannot combine; use one of {takers}"
        )
    reason = one_rank_because_of(strategy)
    if reason is not None:
        return (
            f"federation.site_ranks={list(ranks)} has ranks below peft.rank={rank}, and {reason} needs updates of one "
            f"shape; use ranks of {rank} or more, or leave it out"
        )
    least = min(ranks)
    if strategy.rank_within(rank, least) == 0:
        return (
            f"federation.site_ranks={list(ranks)} has a rank of {least}, and strategy={strategy.kind} needs "
            f"{rank // strategy.cores} for a single core (peft.rank={rank} / strategy.heads={strategy.cores}); use "
            "higher ranks, or more heads"
        )
    return None


def one_rank_because_of(strategy: Any) -> str | None:
    """Return what holds or sums whole updates, as `group=kind`; None where sites may train at lower ranks."""
    if isinstance(strategy.objective, Scaffold | FedDyn | QFedAvg):
        return f"objective={strategy.objective.kind}"
    return None if isinstance(strategy.robust, NoRobustness) else f"robust={strategy.robust.kind}"


def correlated_noise_needs_fixed_coordinates(experiment: Experiment) -> str | None:
    """Noise that later rounds take back must meet the same values again."""
    privacy, strategy = experiment.privacy, experiment.strategy
    if not isinstance(privacy, ClientLevel) or privacy.noise.kind == "independent" or not strategy.turns_coordinates:
        return None
    return (
        f"privacy.noise.kind={privacy.noise.kind} cancels over rounds, and the values that strategy={strategy.kind} "
        "sums are others in every round; use noise.kind=independent, or strategy=ffa_lora"
    )


def selection_is_no_change(experiment: Experiment) -> str | None:
    """The entries that FLASC sends are others in every round, so there is no last one to send a change of."""
    strategy = experiment.strategy
    if not isinstance(strategy, FLASC) or strategy.download_density == 1:
        return None
    if getattr(experiment.quantization, "downlink", "none") == "none":
        return None
    return (
        f"strategy.download_density={strategy.download_density:g} sends other entries in every round, "
        "quantization.downlink=same their change; use quantization.downlink=none, or strategy.download_density=1"
    )


def both_factors_under_noise(experiment: Experiment) -> str | None:
    """Two noised factors make noise that is their product."""
    strategy = experiment.strategy
    if experiment.privacy.kind != "none" and strategy.trains == "both":
        return f"strategy={strategy.kind} noises both LoRA factors and the noises multiply; ffa_lora is steadier"
    return None


def starts_anew(experiment: Experiment) -> str | None:
    """FLoRA gives up its factors in every round."""
    if experiment.privacy.kind != "none" and experiment.strategy.kind == "flora":
        return (
            "strategy=flora starts from B = 0 in every round, so each round's noise meets factors that have learned "
            "nothing yet; fedsvd is exact too, and goes on from what was learned"
        )
    return None


def no_global_model(experiment: Experiment) -> str | None:
    """FedSA's server has half of every model."""
    if experiment.strategy.kind == "fedsa":
        return (
            "strategy=fedsa has no global model: every site keeps its own B, and what the server evaluates and exports "
            "holds A alone, which computes the base"
        )
    return None
