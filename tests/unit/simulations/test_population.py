"""Simulated sites: what they say in public, and that their budgets fit the experiment."""

from pathlib import Path

import pytest

from conf.compose import compose_experiment
from privacy.accounting import epsilon_of
from privacy.mechanisms import SubsampledGaussian, Truncation
from protocol.errors import ConfigError
from simulations.population import (
    build_population,
    check_simulated_nodes,
    nth_site,
    published_count,
    site_file,
)


@pytest.mark.parametrize(
    ("records", "published"),
    [(1, 1), (9, 9), (99, 99), (100, 100), (104, 110), (1201, 1300), (1300, 1300), (3001, 3100)],
)
def test_published_counts_keep_two_digits(records: int, published: int) -> None:
    assert published_count(records) == published


def test_neighboring_sites_publish_the_same_count() -> None:
    assert published_count(1202) == published_count(1201)


def test_the_population_is_the_training_part_of_the_data() -> None:
    population = build_population(compose_experiment())
    assert list(population.parts) == ["eastfield", "harbor", "millbrook", "northgate"]
    assert {row["split"] for rows in population.parts.values() for row in rows} == {"train"}
    assert {row["split"] for row in population.heldout} == {"heldout"}


def test_budget_is_the_target_or_what_the_noise_costs_or_what_is_set() -> None:
    target = site_file(compose_experiment(["privacy.target_epsilon=3"]), "s", 1200, Path("x")).budget
    assert target is not None
    assert (target.epsilon, target.delta) == (3.0, pytest.approx(1 / 12_000))
    noise = compose_experiment(["privacy.target_epsilon=null", "privacy.noise_multiplier=1.0", "federation.rounds=5"])
    budget = site_file(noise, "s", 1200, Path("x")).budget
    assert budget is not None
    local = noise.federation.local
    steps = 5 * local.steps
    batch = local.expected_batch_size
    executed = SubsampledGaussian(batch / 1200, 1.0, steps, Truncation(1200, int(3 * batch)))
    assert budget.epsilon == epsilon_of([executed], budget.delta)
    own = site_file(compose_experiment(["federation.site_epsilon=0.5"]), "s", 1200, Path("x")).budget
    assert own is not None
    assert own.epsilon == 0.5
    assert site_file(compose_experiment(["privacy=none"]), "s", 1200, Path("x")).budget is None


def test_simulated_sites_release_only_what_the_owner_configured() -> None:
    assert not site_file(compose_experiment(), "s", 10, Path("x")).policy.release_training_loss
    released = compose_experiment(["federation.release_training_loss=true", "privacy=none"])
    assert site_file(released, "s", 10, Path("x")).policy.release_training_loss


@pytest.mark.parametrize("nodes", [2, 3, 5])
def test_fewer_or_more_nodes_than_sites_are_refused_with_the_command_to_use(nodes: int, tmp_path: Path) -> None:
    said = (
        rf"Flower simulates {nodes} nodes, the experiment has 4 sites; start it with: "
        'flwr run . --federation-config "num-supernodes=4"'
    )
    with pytest.raises(ConfigError, match=said):
        check_simulated_nodes(compose_experiment(), nodes)
    with pytest.raises(ConfigError, match=said):
        nth_site(compose_experiment(), 1, nodes, tmp_path)


def test_node_n_is_the_nth_site_by_name(tmp_path: Path) -> None:
    check_simulated_nodes(compose_experiment(), 4)
    names = [nth_site(compose_experiment(), position, 4, tmp_path).file.name for position in range(4)]
    assert names == ["eastfield", "harbor", "millbrook", "northgate"]


def test_sites_left_out_in_the_configuration_need_no_node() -> None:
    check_simulated_nodes(compose_experiment(["data.partition.sites=[eastfield,harbor]"]), 2)
