"""The support matrix: what must hold across groups. Each rule returns the problem, or None."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import TYPE_CHECKING

from conf.schema import aggregation_rules as aggregation
from conf.schema import codec_rules as codecs
from conf.schema.privacy import Banded, ClientLevel, NoPrivacy, Privacy, adaptive_clipping, local_privacy
from conf.schema.server_optimizer import NoServerOptimizer
from conf.schema.strategy_rules import (
    STRATEGY_VARIANTS,
    both_factors_under_noise,
    correlated_noise_needs_fixed_coordinates,
    folding_needs_no_dora,
    heads_divide_the_rank,
    no_global_model,
    one_factor_needs_no_dora,
    selection_is_no_change,
    site_ranks_need_a_strategy,
    starts_anew,
)

if TYPE_CHECKING:
    from conf.schema.experiment import Experiment

__all__ = ["FEW_SITES", "LARGE_DELTA", "LINEAR_STRATEGIES", "RULES", "WARNINGS", "Rule", "broken_rules", "warnings_for"]


FEW_SITES = 100
"""Whole sites below which client-level privacy is worth a warning."""

LARGE_DELTA = 1e-3
"""δ above which a promise is worth a warning."""

LINEAR_STRATEGIES: tuple[str, ...] = tuple(
    variant.model_fields["kind"].default for variant in STRATEGY_VARIANTS if variant.is_linear
)
"""Kinds whose combined update is a weighted sum of the updates: `is_linear`, known before the algorithm is built."""


@dataclass(frozen=True)
class Rule:
    """A check, and the groups it reads: it can be applied as soon as these are valid."""

    check: Callable[[Experiment], str | None]
    groups: frozenset[str]


def one_noise_setting(experiment: Experiment) -> str | None:
    """Each promise takes a target ε or a noise multiplier: one of them, not both."""
    privacy = experiment.privacy
    promises: dict[str, Privacy] = {"privacy": privacy}
    if isinstance(privacy, ClientLevel):
        promises["privacy.local"] = privacy.local
    for path, promise in promises.items():
        if isinstance(promise, NoPrivacy):
            continue
        given = [name for name in ("target_epsilon", "noise_multiplier") if getattr(promise, name) is not None]
        if len(given) != 1:
            state = "both are set" if given else "neither is set"
            both = f"{path}.target_epsilon and {path}.noise_multiplier"
            return f"{path}: {state}; give exactly one of {both} (null the other)"
    return None


def cohort_within_population(experiment: Experiment) -> str | None:
    """A cohort cannot be larger than the number of sites."""
    federation, population = experiment.federation, experiment.data.partition.population
    if federation.cohort_size is None or population is None or federation.cohort_size <= population:
        return None
    return (
        f"federation.cohort_size={federation.cohort_size} is larger than the population of {population} sites; "
        f"use at most {population}, or null for all"
    )


def quorum_within_cohort(experiment: Experiment) -> str | None:
    """More replies than sites asked can never arrive."""
    federation = experiment.federation
    cohort = federation.cohort_size or experiment.data.partition.population
    if cohort is None or federation.min_replies <= cohort:
        return None
    return (
        f"federation.min_replies={federation.min_replies} is larger than the cohort of {cohort} sites; "
        f"use at most {cohort}"
    )


def labels_need_a_classifier(experiment: Experiment) -> str | None:
    """Labelled data and the classification task go together."""
    labelled = experiment.data.columns.kind == "labelled"
    if labelled == (experiment.task.kind == "classification"):
        return None
    if labelled:
        return "data.columns.kind=labelled needs task=classification (and task.labels=[...]), or text columns"
    return (
        f"task=classification needs data.columns.kind=labelled, not {experiment.data.columns.kind}; "
        "choose data=csv_labelled or set data.columns"
    )


def head_alone_needs_a_head(experiment: Experiment) -> str | None:
    """Without LoRA a language model has nothing to train, and cores or DoRA have no layer to be on."""
    if experiment.peft.targets != "none":
        return None
    if experiment.task.kind != "classification":
        return (
            f"peft.targets=none trains a classification head alone, and task={experiment.task.kind} has none; use "
            "peft.targets=auto, or task=classification"
        )
    if experiment.strategy.cores:
        return (
            f"peft.targets=none leaves no layer for the square cores of strategy={experiment.strategy.kind}; use "
            "peft.targets=auto, or strategy=ffa_lora"
        )
    if experiment.peft.dora:
        return "peft.targets=none leaves no layer for peft.dora=true; set it to false, or use peft.targets=auto"
    return None


def dora_has_no_opacus_rule(experiment: Experiment) -> str | None:
    """Opacus has no per-example rule for DoRA's magnitude vectors; a problem where a missing rule is to be refused."""
    privacy = local_privacy(experiment.privacy)
    if isinstance(privacy, NoPrivacy) or not experiment.peft.dora or privacy.per_example_gradients != "opacus":
        return None
    if privacy.without_rule != "refuse":
        return None
    return (
        "peft.dora=true has no per-example gradient rule in Opacus (layer lora_magnitude_vector); "
        "set privacy.per_example_gradients=native, or peft.dora=false"
    )


def poisson_needs_client_level(experiment: Experiment) -> str | None:
    """A secret cohort amplifies the privacy of a whole site, with fresh noise in every round, and nothing else."""
    federation, privacy = experiment.federation, experiment.privacy
    if federation.cohort_sampling != "poisson":
        return None
    if not isinstance(privacy, ClientLevel):
        return (
            f"federation.cohort_sampling=poisson amplifies client-level privacy only, not privacy={privacy.kind}; "
            "use fixed_size, or privacy=client_level"
        )
    if federation.cohort_size is None:
        return (
            "federation.cohort_sampling=poisson needs federation.cohort_size, the expected number of sites in a round"
        )
    if privacy.noise.kind != "independent":
        return (
            f"federation.cohort_sampling=poisson needs privacy.noise.kind=independent, not {privacy.noise.kind}, whose "
            "analysis assumes no sampling; use fixed_size, or independent noise"
        )
    if privacy.local.kind != "none":
        return (
            f"federation.cohort_sampling=poisson with privacy.local.kind={privacy.local.kind}: the sites' own "
            "statements would tell who was in the secret cohorts; use fixed_size, or privacy.local.kind=none"
        )
    return None


def client_level_needs_a_sum(experiment: Experiment) -> str | None:
    """A clip norm bounds what one site changes only where the update is a weighted sum."""
    strategy = experiment.strategy.kind
    if not isinstance(experiment.privacy, ClientLevel) or strategy in LINEAR_STRATEGIES:
        return None
    return (
        f"privacy=client_level needs a strategy that sums updates ({', '.join(LINEAR_STRATEGIES)}), not {strategy}; "
        "use strategy=ffa_lora"
    )


def bands_within_separation(experiment: Experiment) -> str | None:
    """Bands wider than the separation would make a site's participations overlap, and the noise larger for nothing."""
    privacy = experiment.privacy
    if not isinstance(privacy, ClientLevel) or not isinstance(privacy.noise, Banded):
        return None
    noise = privacy.noise
    if noise.bands is None or noise.min_separation is None or noise.bands <= noise.min_separation:
        return None
    return (
        f"privacy.noise.bands={noise.bands} is above privacy.noise.min_separation={noise.min_separation}; "
        f"use at most {noise.min_separation} bands, or a larger separation"
    )


def adaptive_clip_needs_independent_noise(experiment: Experiment) -> str | None:
    """Correlated noise is one mechanism over all rounds, which needs one clip norm."""
    privacy = experiment.privacy
    if not adaptive_clipping(privacy) or not isinstance(privacy, ClientLevel) or privacy.noise.kind == "independent":
        return None
    return (
        f"privacy.clipping.kind=adaptive moves the clip norm, and privacy.noise.kind={privacy.noise.kind} needs the "
        "same one in all rounds; use clipping.kind=fixed, or noise.kind=independent"
    )


def protected_loss_needs_noise(experiment: Experiment) -> str | None:
    """A training loss is computed from records: under privacy it leaves with noise, and charged, or not at all."""
    if not experiment.federation.release_training_loss or isinstance(experiment.privacy, NoPrivacy):
        return None
    return (
        "federation.release_training_loss=true would send losses that no ε covers; set "
        "privacy.loss_noise_multiplier (10, say) to release them with noise, and federation.release_training_loss=false"
    )


def users_need_a_column(experiment: Experiment) -> str | None:
    """User-level privacy groups records by a column."""
    if local_privacy(experiment.privacy).kind != "user_level" or experiment.data.user_column is not None:
        return None
    return "privacy=user_level needs data.user_column, the column that names the person a record is about; it is null"


RULES: tuple[Rule, ...] = (
    Rule(one_noise_setting, frozenset({"privacy"})),
    Rule(cohort_within_population, frozenset({"federation", "data"})),
    Rule(quorum_within_cohort, frozenset({"federation", "data"})),
    Rule(labels_need_a_classifier, frozenset({"data", "task"})),
    Rule(head_alone_needs_a_head, frozenset({"peft", "task", "strategy"})),
    Rule(protected_loss_needs_noise, frozenset({"federation", "privacy"})),
    Rule(users_need_a_column, frozenset({"privacy", "data"})),
    Rule(dora_has_no_opacus_rule, frozenset({"privacy", "peft"})),
    Rule(one_factor_needs_no_dora, frozenset({"strategy", "peft"})),
    Rule(heads_divide_the_rank, frozenset({"strategy", "peft"})),
    Rule(folding_needs_no_dora, frozenset({"strategy", "peft"})),
    Rule(site_ranks_need_a_strategy, frozenset({"federation", "strategy", "peft"})),
    Rule(poisson_needs_client_level, frozenset({"privacy", "federation"})),
    Rule(client_level_needs_a_sum, frozenset({"privacy", "strategy"})),
    Rule(correlated_noise_needs_fixed_coordinates, frozenset({"privacy", "strategy"})),
    Rule(bands_within_separation, frozenset({"privacy"})),
    Rule(adaptive_clip_needs_independent_noise, frozenset({"privacy"})),
    Rule(codecs.secret_cohorts_hold_nothing, frozenset({"quantization", "federation"})),
    Rule(codecs.lattice_needs_a_sum, frozenset({"quantization", "strategy"})),
    Rule(codecs.lattice_holds_the_cohort, frozenset({"quantization", "federation", "data"})),
    Rule(codecs.lattice_clips_as_privacy_does, frozenset({"quantization", "privacy"})),
    Rule(codecs.books_need_exact_updates, frozenset({"quantization", "strategy"})),
    Rule(codecs.fed_back_changes_need_a_sum, frozenset({"quantization", "strategy"})),
    Rule(selection_is_no_change, frozenset({"quantization", "strategy"})),
    Rule(aggregation.fixed_coordinates, frozenset({"strategy"})),
    Rule(aggregation.corrections_need_whole_updates, frozenset({"strategy"})),
    Rule(aggregation.robust_needs_comparable_updates, frozenset({"strategy"})),
    Rule(aggregation.equal_ranks_to_compare, frozenset({"strategy", "federation", "peft"})),
    Rule(aggregation.one_server_step, frozenset({"strategy"})),
    Rule(aggregation.robust_over_plain_updates, frozenset({"strategy"})),
    Rule(aggregation.robust_without_weights, frozenset({"strategy"})),
    Rule(aggregation.robust_needs_replies, frozenset({"strategy", "federation", "data"})),
    Rule(aggregation.robust_is_no_sum, frozenset({"strategy", "privacy"})),
    Rule(aggregation.objective_within_client_level, frozenset({"strategy", "privacy"})),
    Rule(aggregation.objective_fits_optimizer, frozenset({"strategy", "federation"})),
    Rule(aggregation.fair_weights_need_a_loss, frozenset({"strategy", "federation", "privacy"})),
    Rule(
        aggregation.buffered_needs_plain_updates,
        frozenset({"strategy", "federation", "privacy", "data", "quantization"}),
    ),
    Rule(aggregation.root_needs_held_out_records, frozenset({"strategy", "evaluation"})),
)


def broken_rules(experiment: Experiment, invalid: Container[str] = ()) -> list[str]:
    """Return one sentence per broken rule, each with the path, the value, the bound and the fix.

    Rules that read an `invalid` group are left out: their answer would mean nothing.
    """
    usable = [rule for rule in RULES if not any(group in invalid for group in rule.groups)]
    return [problem for rule in usable if (problem := rule.check(experiment)) is not None]


def _no_privacy(experiment: Experiment) -> str | None:
    if experiment.privacy.kind == "none":
        return "privacy=none: nothing protects the sites' records; adapters can be inverted to recover text"
    return None


def _insecure_seed(experiment: Experiment) -> str | None:
    if experiment.privacy.kind != "none" and experiment.privacy.insecure_seed is not None:
        return (
            "privacy.insecure_seed is set: noise is repeatable, so ε holds only against those who do not know the seed"
        )
    return None


def _high_epsilon(experiment: Experiment) -> str | None:
    if experiment.privacy.kind != "none" and (experiment.privacy.target_epsilon or 0) > 10:
        return f"privacy.target_epsilon={experiment.privacy.target_epsilon} is a weak promise; 10 or less is usual"
    return None


def _large_delta(experiment: Experiment) -> str | None:
    privacy = experiment.privacy
    asked = {"privacy.delta": privacy, "privacy.local.delta": local_privacy(privacy)}
    for path, each in asked.items():
        if not isinstance(each, NoPrivacy) and each.delta is not None and each.delta > LARGE_DELTA:
            return f"{path}={each.delta:g}: the promise may fail that often; {LARGE_DELTA:g} or less is usual"
    return None


def _few_whole_sites(experiment: Experiment) -> str | None:
    """Whole sites hide among each other: with few of them δ = 1/(10 sites) is large, and so is the noise."""
    population = experiment.data.partition.population
    if not isinstance(experiment.privacy, ClientLevel) or population is None or population >= FEW_SITES:
        return None
    return (
        f"privacy={experiment.privacy.kind} with {population} sites: each hides among {population - 1} others, the "
        f"noise is made for one of {population} and δ is at most 1/{population}; {FEW_SITES} sites or more, or "
        "privacy=example_level, whose noise is made for one of a site's records"
    )


def _correlation_without_rest(experiment: Experiment) -> str | None:
    """Where every site takes part in every round, correlated noise gains nothing, and a tree loses."""
    privacy, population = experiment.privacy, experiment.data.partition.population
    cohort = experiment.federation.cohort_size
    if not isinstance(privacy, ClientLevel) or privacy.noise.kind == "independent":
        return None
    if cohort is not None and (population is None or population // cohort > 1):
        return None
    return (
        f"privacy.noise.kind={privacy.noise.kind} with {cohort or 'all'} sites in every round: no site rests, and "
        "correlation gains nothing; set federation.cohort_size to half of the sites or less, or use "
        "privacy.noise.kind=independent"
    )


def _large_rate(experiment: Experiment) -> str | None:
    """A rate says how far a value may move: a step of a clipped gradient is at most rate x clip norm long, and Adam's
    moves every value by about the rate."""
    optimizer, server = experiment.federation.local.optimizer, experiment.strategy.server_optimizer
    asked = {"federation.local.optimizer.learning_rate": (optimizer.learning_rate, _LARGE_RATES[optimizer.kind])}
    if not isinstance(server, NoServerOptimizer):
        asked["strategy.server_optimizer.learning_rate"] = (server.learning_rate, _LARGE_RATES[server.kind])
    for path, (rate, usual) in asked.items():
        if rate > usual:
            return f"{path}={rate:g} is far above what trains any model that was tried: at most {usual:g} is usual"
    return None


_LARGE_RATES = {"sgd": 32.0, "adamw": 0.1, "fedavgm": 4.0, "fedadagrad": 1.0, "fedadam": 1.0, "fedyogi": 1.0}
"""By optimizer: some ten times the largest that did well in any study (docs/decisions/0004-defaults.md)."""
WARNINGS: tuple[Callable[[Experiment], str | None], ...] = (
    _no_privacy,
    _insecure_seed,
    _high_epsilon,
    both_factors_under_noise,
    starts_anew,
    no_global_model,
    codecs.errors_that_stay,
    codecs.lattice_clips_in_silence,
    aggregation.no_reply_to_spare,
    _large_delta,
    _few_whole_sites,
    _correlation_without_rest,
    _large_rate,
)


def warnings_for(experiment: Experiment) -> list[str]:
    """Return what is allowed but worth a second look."""
    return [warning for rule in WARNINGS if (warning := rule(experiment)) is not None]
