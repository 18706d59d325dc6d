"""What server optimizers, objectives and robust rules may be combined with."""

import pytest

from conf.compose import InvalidConfiguration, compose_experiment
from conf.schema.aggregation_rules import ADDING_STRATEGIES, fixed_coordinates
from conf.schema.rules import warnings_for
from conf.schema.strategy import RoLoRA

CLIENT_LEVEL = ("privacy=client_level",)
SIX = ("data.partition={kind:iid,sites:6}",)

REFUSED = [
    (("robust=median", *CLIENT_LEVEL), "robust=median with privacy=client_level: its sensitivity to one site is not"),
    (("robust=norm_bound", *CLIENT_LEVEL), "the clip norm is that bound already; use robust=none"),
    (("objective=scaffold", *CLIENT_LEVEL), "objective=scaffold needs each site's update as it was trained"),
    (("objective=feddyn", "server_optimizer=fedadam"), "server_optimizer=fedadam would undo it"),
    (("objective=fednova", "robust=krum"), "robust=krum with objective=fednova: both say how updates are combined"),
    (("robust=krum", "strategy.weights=published_records"), "a site could claim any count"),
    (("objective=feddyn", "strategy.weights=published_records"), "keeps an unweighted mean over all sites"),
    (
        ("robust=krum", "strategy.robust.attackers=2", *SIX),
        "robust=krum needs 7 replies in a round to withstand strategy.robust.attackers=2 "
        r"\(strategy.robust.mixing=none\), the cohort has 6 sites",
    ),
    (("robust=median", "strategy.robust.attackers=1", "federation.cohort_size=2"), "needs 3 replies in a round"),
    (
        ("robust=median", "strategy.robust.attackers=2", "strategy.robust.mixing.kind=bucketing", *SIX),
        r"needs 9 replies in a round .*mixing=bucketing\), the cohort has 6 sites",
    ),
    (
        ("objective=scaffold", "federation.local.optimizer.kind=adamw"),
        "objective=scaffold divides an update by the steps or the learning rate behind it",
    ),
    (("objective=qfedavg",), "may not leave under privacy=example_level; set privacy.loss_noise_multiplier"),
    (("objective=qfedavg", "privacy=none"), "federation.release_training_loss=false keeps it"),
    (("robust=fltrust", "evaluation.every=0"), "evaluation.every=0 reads none"),
    (
        ("strategy=rolora", "server_optimizer=fedadam"),
        "strategy=rolora changes what .* use strategy=fedit or ffa_lora or",
    ),
    (("strategy=fedsvd", "objective=fednova"), "objective=fednova: strategy=fedsvd changes what"),
    (
        ("strategy=flasc", "objective=scaffold"),
        "with strategy=flasc that is not all that the site changed; use strategy=",
    ),
    (("strategy=fedsa", "objective=feddyn"), "with strategy=fedsa that is not all that the site changed"),
    (("strategy=fedrot", "objective=scaffold"), "use strategy=fedit or ffa_lora or fedsb, or objective=none"),
    (("strategy=ravan", "objective=feddyn"), "with strategy=ravan that is not all"),
    (("strategy=flasc", "robust=median"), "with strategy=flasc every site sends other entries"),
    (("strategy=fedsa", "robust=krum"), "with strategy=fedsa every site has another B"),
    (("strategy=ffa_lora", "robust=median", "federation.site_ranks=[8,2]"), "updates of different sizes cannot be"),
    (
        ("objective=qfedavg", "federation.local.optimizer.kind=adamw"),
        "objective=qfedavg divides an update by the steps or the learning rate behind it",
    ),
    (("objective=scaffold", "quantization=eden"), "objective=scaffold with quantization=eden: a site keeps a sum of"),
    (("objective=feddyn", "quantization=bf16"), "objective=feddyn with quantization=bf16: a site keeps a sum of"),
    *(
        (("strategy=ffa_lora", choice, "peft.rank=8", "federation.site_ranks=[8,2]"), f"and {choice} needs updates of")
        for choice in ("objective=scaffold", "objective=feddyn", "objective=qfedavg", "robust=median")
    ),
    (("robust=krum", "strategy.robust.selected=2"), "strategy.robust.selected is not a known key"),
]

ALLOWED = [
    ("robust=bulyan", "data.partition={kind:iid,sites:7}"),
    ("robust=krum", "objective=fedprox", "server_optimizer=fedadam"),
    ("objective=fedprox", *CLIENT_LEVEL),
    ("objective=fedprox", "strategy=ffa_lora", "peft.rank=8", "federation.site_ranks=[8,2]"),
    ("server_optimizer=fedyogi", *CLIENT_LEVEL),
    ("objective=qfedavg", "privacy=none", "federation.release_training_loss=true"),
    ("objective=qfedavg", "privacy.loss_noise_multiplier=10"),
    ("objective=scaffold", "server_optimizer=fedavgm"),
    ("objective=fednova", "federation.local.optimizer.momentum=0.9"),
    ("robust=median", "strategy.robust.mixing.kind=nearest_neighbors"),
    *((f"strategy={kind}", "server_optimizer=fedadam") for kind in ADDING_STRATEGIES),
    *((f"strategy={kind}", "objective=fednova") for kind in ADDING_STRATEGIES),
    ("strategy=fedsb", "objective=scaffold"),
    ("strategy=fedrot", "robust=median"),
]


@pytest.mark.parametrize(("overrides", "problem"), REFUSED, ids=lambda part: str(part)[:60])
def test_what_cannot_hold_is_refused_with_the_fix(overrides: tuple[str, ...], problem: str) -> None:
    with pytest.raises(InvalidConfiguration, match=problem):
        compose_experiment(overrides)


@pytest.mark.parametrize("overrides", ALLOWED, ids=str)
def test_the_rest_composes(overrides: tuple[str, ...]) -> None:
    assert compose_experiment(overrides).digest


def test_a_strategy_that_moves_its_coordinates_takes_fedprox_alone() -> None:
    """Asked of the rule itself: the strategies that are refused are named nowhere, those that may are."""
    experiment = compose_experiment(["robust=krum", "objective=fedprox", "server_optimizer=fedavgm"])
    other = RoLoRA.model_construct(**{**experiment.strategy.__dict__, "kind": "rolora"})
    problem = fixed_coordinates(experiment.model_copy(update={"strategy": other}))
    assert problem is not None
    assert problem.startswith("server_optimizer=fedavgm, robust=krum: strategy=rolora changes what")
    alone = compose_experiment(["objective=fedprox"])
    other = RoLoRA.model_construct(**{**alone.strategy.__dict__, "kind": "rolora"})
    assert fixed_coordinates(alone.model_copy(update={"strategy": other})) is None


def test_what_adds_is_known_from_the_schema() -> None:
    assert ADDING_STRATEGIES == ("fedit", "ffa_lora", "fedsa", "fedrot", "flasc", "fedsb", "ravan")


def test_a_rule_that_takes_every_reply_of_its_cohort_is_warned_of() -> None:
    def spared(*overrides: str) -> bool:
        return not any("needs a valid reply of all" in each for each in warnings_for(compose_experiment(overrides)))

    assert not spared("robust=median", "data.partition={kind:iid,sites:3}")
    assert not spared("robust=median", "federation.min_replies=6", *SIX)
    assert spared("robust=median", *SIX)
    assert spared("robust=norm_bound", "data.partition={kind:iid,sites:1}")
