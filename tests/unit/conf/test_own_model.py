"""Which settings a user's own model gets, and when a user is left alone."""

import pytest

from conf.compose import chosen_settings, compose_experiment

OWN = ("model.path=/models/own",)
ROWS = ("data=csv_labelled", "data.source.path=/rows.csv", "task=classification", "task.labels=[a,b]")


def test_the_shipped_model_keeps_the_shipped_settings() -> None:
    assert chosen_settings(()) == ()
    assert chosen_settings(("model.path=embedded:clinic-base", "federation.rounds=3")) == ()
    assert compose_experiment(()).federation.local.steps == 4


def test_a_model_of_ones_own_takes_one_step_a_round() -> None:
    made = compose_experiment(OWN)
    local = made.federation.local
    assert (local.steps, local.optimizer.kind, local.optimizer.learning_rate) == (1, "sgd", 1.0)
    assert (made.strategy.server_optimizer.kind, made.strategy.weights) == ("fedadam", "published_records")
    assert made.peft.targets == "auto"


@pytest.mark.parametrize(("more", "targets"), [((), "none"), (("privacy=none",), "auto"), (("peft.rank=4",), "auto")])
def test_a_private_classifier_trains_its_head_alone(more: tuple[str, ...], targets: str) -> None:
    assert compose_experiment((*OWN, *ROWS, *more)).peft.targets == targets


def test_what_the_user_sets_wins() -> None:
    made = compose_experiment(
        ("federation.rounds=3", "strategy.weights=uniform", "federation.local.largest_rate=1", *OWN)
    )
    assert (made.federation.rounds, made.strategy.weights, made.federation.local.largest_rate) == (3, "uniform", 1.0)
    assert made.federation.local.steps == 1


@pytest.mark.parametrize(
    "chosen",
    [
        "federation=cross_silo",
        "strategy=fedit",
        "server_optimizer=fedavgm",
        "peft=rslora",
        "federation.local.steps=2",
        "federation.local.optimizer.learning_rate=0.5",
        "strategy.server_optimizer.kind=none",
    ],
)
def test_who_chooses_how_to_train_is_left_alone(chosen: str) -> None:
    assert chosen_settings((*OWN, chosen)) == ()
    assert compose_experiment((*OWN, chosen)).federation.local.largest_rate == 1.0
