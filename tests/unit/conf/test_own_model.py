"""Which settings a user's own model gets, and when a user is left alone."""

from pathlib import Path

import pytest

from conf.compose import CONFIG_DIRECTORY, InvalidConfiguration, chosen_settings, compose_experiment

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


def test_a_head_on_summaries_reads_every_record(tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    own = (f"model.path={tmp_path}", *ROWS)
    local = compose_experiment(own).federation.local
    assert (local.expected_batch(70), local.expected_batch(9000), local.steps) == (70, 9000, 1)
    assert "federation=every_record" in chosen_settings((*OWN, *ROWS, "task.pooling=mean"))
    for other in ("task.pooling=model", "privacy=none", "peft.rank=4"):
        assert "federation=one_step" in chosen_settings((*own, other))


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ((), "has none; use peft.targets=auto"),
        ((*ROWS, "strategy=ravan"), "no layer for the square cores of strategy=ravan"),
        ((*ROWS, "peft.dora=true"), "no layer for peft.dora=true"),
    ],
)
def test_a_head_alone_needs_a_head_and_nothing_else(more: tuple[str, ...], problem: str) -> None:
    with pytest.raises(InvalidConfiguration, match=problem):
        compose_experiment((*OWN, *more, "peft=head"))


def test_what_the_user_sets_wins() -> None:
    made = compose_experiment(
        ("federation.rounds=3", "strategy.weights=uniform", "federation.local.largest_rate=1", *OWN)
    )
    assert (made.federation.rounds, made.strategy.weights, made.federation.local.largest_rate) == (3, "uniform", 1.0)
    assert made.federation.local.steps == 1


@pytest.mark.parametrize("group", ["robust", "objective", "quantization", "privacy", "runtime"])
def test_what_is_chosen_goes_with_whatever_else_is(group: str) -> None:
    """A user is never told of a conflict with a setting that they did not make."""
    for member in sorted((CONFIG_DIRECTORY / group).glob("*.yaml")):
        by_hand = (*OWN, f"{group}={member.stem}", "federation.local.steps=4")
        try:
            compose_experiment(by_hand)
        except InvalidConfiguration:
            continue
        compose_experiment(by_hand[:-1])


@pytest.mark.parametrize(
    "chosen",
    [
        "federation=cross_silo",
        "objective=fedprox",
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


@pytest.mark.parametrize("robust", ["robust=median", "strategy.robust.kind=median"])
def test_counts_are_no_weights_where_sites_are_not_trusted(robust: str) -> None:
    assert "strategy.weights=published_records" not in chosen_settings((*OWN, robust))
    assert compose_experiment((*OWN, robust)).strategy.weights == "uniform"
