"""A sweep's runs share their sites' records, and so one budget."""

import json
from pathlib import Path

import pytest

from conf.compose import compose_experiment
from conf.schema.experiment import Experiment
from privacy.accounting import epsilon_of, selection_epsilon
from privacy.mechanisms import SubsampledGaussian
from protocol.errors import BudgetExceeded, ConfigError
from simulations.books import shared_books
from simulations.population import Population
from simulations.simulate import simulate

SMALL = (
    "experiment=smoke",
    "data.max_records=80",
    "data.max_length=96",
    "federation.rounds=1",
    "federation.local.steps=1",
    "federation.local.expected_batch_size=2",
    "evaluation.every=0",
    "runtime.threads=1",
)
ROWS = [{"prompt": "p", "completion": "c", "site": "a", "patient": str(number)} for number in range(100)]


def made(*overrides: str) -> Experiment:
    return compose_experiment([*SMALL, *overrides])


def of(_: Experiment) -> Population:
    return Population({"a": ROWS, "b": ROWS[:50]}, ())


@pytest.mark.rare
def test_a_sweep_of_two_runs_charges_both_to_the_same_ledgers(tmp_path: Path) -> None:
    experiments = [made("privacy.target_epsilon=3"), made("privacy.target_epsilon=3", "peft.rank=2")]
    books = shared_books(experiments, tmp_path)
    (cost,) = books.costs
    assert cost.unit == "record"
    assert 3 < cost.epsilon < 9, "more than one run, and not more than the sum with its adaptivity"
    runs = [simulate(each, tmp_path / f"{number}", books=books) for number, each in enumerate(experiments)]
    for site in runs[0].summary["sites"]:
        first, second = (run.summary["sites"][site]["privacy"] for run in runs)
        assert first["epsilon_run"] == pytest.approx(second["epsilon_run"]) == pytest.approx(3, rel=2e-3)
        assert first["epsilon_total"] == pytest.approx(first["epsilon_run"])
        assert second["epsilon_run"] < second["epsilon_total"] <= second["epsilon_budget"]
        assert (tmp_path / "sites" / site / "ledger.db").is_file()
    assert max(s["privacy"]["epsilon_total"] for s in runs[1].summary["sites"].values()) == pytest.approx(cost.epsilon)
    assert json.loads(json.dumps(books.told())) == books.told()


def test_a_run_beyond_the_sweep_is_refused_by_every_site(tmp_path: Path) -> None:
    experiment = made("privacy.target_epsilon=3", "data.partition.sites=[harbor]")
    books = shared_books([experiment], tmp_path)
    assert len(simulate(experiment, tmp_path / "0", books=books).summary["rounds"][0]["accepted"]) == 1
    with pytest.raises(Exception, match="0 valid replies"):
        simulate(experiment, tmp_path / "1", books=books)


def test_a_budget_that_does_not_hold_the_sweep_is_refused_before_the_first_run(tmp_path: Path) -> None:
    experiments = [made("federation.site_epsilon=8", f"peft.rank={rank}") for rank in (2, 4)]
    with pytest.raises(BudgetExceeded, match=r"the 2 runs of this sweep together need ε=.*, above the 8 of federation"):
        shared_books(experiments, tmp_path, of)


def test_two_units_share_no_budget(tmp_path: Path) -> None:
    experiments = [made(), made("privacy=user_level", "data.user_column=patient")]
    with pytest.raises(ConfigError, match="the sweep protects record and users"):
        shared_books(experiments, tmp_path, of)


def test_a_sweep_without_privacy_has_no_price(tmp_path: Path) -> None:
    books = shared_books([made("privacy=none"), made("privacy=none", "seed=1")], tmp_path, of)
    assert not books.costs
    assert not books.budgets


def test_a_sweep_over_whole_sites_is_charged_to_the_server(tmp_path: Path) -> None:
    experiments = [made("privacy=client_level", f"privacy.clip_norm={norm}") for norm in (0.5, 1)]
    books = shared_books(experiments, tmp_path, of)
    (cost,) = books.costs
    assert cost.unit == "site"
    assert books.server.budget is not None
    assert 8 < cost.epsilon <= books.server.budget.epsilon


def test_the_best_of_different_runs_costs_no_more_than_the_best_of_the_dearest() -> None:
    cheap, dear = SubsampledGaussian(0.1, 3.0, 10), SubsampledGaussian(0.1, 1.0, 10)
    mixed = selection_epsilon([cheap], 1e-5, mean_trials=4, alternatives=[[dear]])
    assert mixed == selection_epsilon([dear], 1e-5, mean_trials=4)
    assert mixed > selection_epsilon([cheap], 1e-5, mean_trials=4) > epsilon_of([cheap], 1e-5)
