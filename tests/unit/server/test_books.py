"""The server's ledger outlives runs, and its noise can be drawn again by a server that starts again."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conf.compose import compose_experiment
from conf.schema.federation import ServerBudget
from privacy.accounting import epsilon_of
from privacy.mechanisms import SubsampledGaussian
from protocol.cards import SiteCard
from protocol.errors import BudgetExceeded, PrivacyError
from protocol.instructions import Reply, ReplyHeader
from protocol.tensors import Layout, NamedTensors, layout_of
from server.budget import ServerBooks
from server.cohort import Member
from server.events import RoundFinished
from server.protection import ClientLevelProtection, protection_for
from server.summary import summarize
from strategies.build import build_strategy

ROUNDS = 4
LAYOUT: Layout = layout_of({"b": torch.zeros(3, 4), "a": torch.zeros(5)})


def members(*numbers: int, first_count: int = 100) -> tuple[Member, ...]:
    """Sites of 100 records, but for the first."""
    counts = (first_count, *[100] * (len(numbers) - 1))
    return tuple(
        Member(node, SiteCard(cloister_version="0", site=f"site-{node}", published_records=count))
        for node, count in zip(numbers, counts, strict=True)
    )


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., ClientLevelProtection]:
    def make(
        *overrides: str,
        run: str = "run",
        sites: tuple[int, ...] = (1, 2, 3, 4),
        budget: ServerBudget | None = None,
        privacy: str = "client_level",
        first_count: int = 100,
    ) -> ClientLevelProtection:
        experiment = compose_experiment([f"privacy={privacy}", f"federation.rounds={ROUNDS}", *overrides])
        directory: Any = SimpleNamespace(path=tmp_path, run=run, books=ServerBooks(tmp_path / "books", budget))
        made = protection_for(
            experiment, build_strategy(experiment.strategy), members(*sites, first_count=first_count), directory
        )
        assert isinstance(made, ClientLevelProtection)
        return made

    return make


def released(protection: ClientLevelProtection, number: int, size: float = 0.1) -> NamedTensors:
    """One round in which every site of the cohort sends the same small update, all the way to the commit."""
    protection.reserve(number, LAYOUT, None)  # type: ignore[arg-type]
    for member in protection.cohort(number):
        update = {name: torch.full(spec.shape, size) for name, spec in LAYOUT.items()}
        header = ReplyHeader(status="trained", site=member.site, round=number, plan_digest="", below_clip=True)
        protection.fold(member.site, Reply(header, update), {})
    combined = protection.combined()
    assert protection.commit() is not None
    return combined


def run_whole(protection: ClientLevelProtection) -> None:
    for number in range(1, ROUNDS + 1):
        released(protection, number)
    protection.close()


def test_a_second_run_of_the_same_sites_is_refused_before_anything_is_sent(start: Callable[..., Any]) -> None:
    """The first run's promise is the budget, unless one is configured."""
    run_whole(start())
    second = start(run="second")
    with pytest.raises(BudgetExceeded, match=r"from 9\.\d+ to .*, above its budget of 8 at δ=0.025"):
        second.reserve(1, LAYOUT, None)
    second.close()


def test_a_budget_bounds_all_runs_together(start: Callable[..., Any]) -> None:
    budget = ServerBudget(epsilon=15, delta=1e-3)
    run_whole(start(budget=budget))
    second = start(run="second", budget=budget)
    assert second.claim.delta == 1e-3, "the δ is the ledger's"
    run_whole(second)
    third = start(run="third", budget=budget)
    with pytest.raises(BudgetExceeded, match="above its budget of 15"):
        run_whole(third)
    third.close()


def test_other_sites_have_spent_nothing(start: Callable[..., Any]) -> None:
    run_whole(start())
    run_whole(start(run="second", sites=(5, 6, 7, 8)))
    mixed = start(run="third", sites=(8, 9, 10, 11))
    with pytest.raises(BudgetExceeded, match="above its budget of 8"):
        mixed.reserve(1, LAYOUT, None)
    mixed.close()


@pytest.mark.parametrize(
    ("overrides", "budget", "problem"),
    [
        (("privacy.delta=1e-9",), None, r"privacy.delta=1e-09 is below the δ=0.025 at which the server's ledger"),
        ((), ServerBudget(epsilon=9, delta=1e-5), r"server_budget is at δ=1e-05, the ledger in .* at δ=0.025"),
    ],
)
def test_a_ledger_has_one_delta(
    start: Callable[..., Any], overrides: tuple[str, ...], budget: ServerBudget | None, problem: str
) -> None:
    run_whole(start())
    with pytest.raises(PrivacyError, match=problem):
        start(*overrides, run="second", budget=budget)


@pytest.mark.parametrize("privacy", ["client_level", "client_level_tree", "client_level_banded", "client_level_blt"])
def test_a_server_that_starts_again_releases_the_same_bits(
    start: Callable[..., Any], tmp_path: Path, privacy: str
) -> None:
    options = ("federation.cohort_size=2",)
    whole = start(*options, privacy=privacy)
    expected = [released(whole, number) for number in range(1, ROUNDS + 1)]
    spent = whole._budget.ledger.spent()
    whole.close()
    for stop in range(ROUNDS):
        again = start(*options, privacy=privacy)
        again.restore({"rounds": stop, "clip_norm": 1.0, "inputs": again._budget.inputs}, LAYOUT)
        for number in range(stop + 1, ROUNDS + 1):
            for name, tensor in released(again, number).items():
                assert torch.equal(tensor, expected[number - 1][name])
        public = {"rounds": ROUNDS, "clip_norm": 1.0, "inputs": again._budget.inputs}
        assert again.state() == public | {"heard": again.state()["heard"]}
        assert again._budget.ledger.spent() == spent, "what was released before costs nothing"
        again.close()


def test_other_updates_in_a_round_that_was_released_are_charged(start: Callable[..., Any]) -> None:
    budget = ServerBudget(epsilon=20, delta=1e-3)
    first = start(budget=budget)
    before = released(first, 1)
    spent = first._budget.ledger.spent()
    first.close()
    again = start(budget=budget)
    after = released(again, 1, size=0.2)
    assert again._budget.ledger.spent() > spent
    noise = [release["a"] * 4 - value * 4 for release, value in ((before, 0.1), (after, 0.2))]
    assert not torch.allclose(noise[0], noise[1], atol=1e-3)
    again.close()


def test_correlated_noise_never_lies_on_two_sums(start: Callable[..., Any]) -> None:
    first = start(privacy="client_level_tree")
    released(first, 1)
    released(first, 2)
    first.close()
    again = start(privacy="client_level_tree")
    again.restore({**first.state(), "rounds": 1}, LAYOUT)
    with pytest.raises(PrivacyError, match="round 2 of run run was released before, with other updates"):
        released(again, 2, size=0.2)
    again.close()


def test_an_adaptive_clip_norm_is_restored(start: Callable[..., Any]) -> None:
    options = ("privacy.clipping.kind=adaptive", "+privacy.clipping.count_noise=20")
    whole = start(*options)
    expected = [released(whole, 1)]
    state = whole.state()
    assert state["clip_norm"] != 1.0
    expected.append(released(whole, 2))
    whole.close()
    again = start(*options)
    again.restore(state, LAYOUT)
    assert torch.equal(released(again, 2)["b"], expected[1]["b"])
    again.close()


@pytest.mark.parametrize("privacy", ["client_level", "client_level_tree"])
def test_a_run_goes_on_with_the_weights_it_began_with(start: Callable[..., Any], privacy: str) -> None:
    """Noise is bound to what decides the release: with other weights it would be another noise, booked at nothing."""
    options = ("strategy.weights=published_records", "federation.cohort_size=2")
    first = start(*options, privacy=privacy)
    released(first, 1)
    state = first.state()
    first.close()
    again = start(*options, privacy=privacy, first_count=120)
    for stored in (state, {"rounds": 1, "clip_norm": 1.0}):
        with pytest.raises(PrivacyError, match=r"run run cannot go on: its sites, their published_records or its"):
            again.restore(stored, LAYOUT)
    again.close()


def test_later_rounds_of_correlated_noise_need_the_first_one_paid(start: Callable[..., Any]) -> None:
    options, privacy = ("strategy.weights=published_records",), "client_level_tree"
    unpaid = start(*options, privacy=privacy)
    with pytest.raises(PrivacyError, match="round 2 of run run belongs to correlated noise that is not booked"):
        unpaid.reserve(2, LAYOUT, None)
    released(unpaid, 1)
    spent = unpaid._budget.ledger.spent()
    released(unpaid, 2)
    assert unpaid._budget.ledger.spent() == spent
    unpaid.close()
    other = start(*options, privacy=privacy, first_count=120)
    with pytest.raises(PrivacyError, match="round 1 had other sites, weights or settings"):
        other.reserve(3, LAYOUT, None)
    other.close()


def test_the_statement_holds_what_was_booked(start: Callable[..., Any]) -> None:
    """A round that was released twice counts twice, and so does a group of sites over it."""
    budget = ServerBudget(epsilon=50, delta=1e-3)
    first = start(budget=budget)
    released(first, 1)
    first.close()
    again = start(budget=budget)
    stated = []
    for number in (1, 2):
        again.reserve(number, LAYOUT, None)
        again.combined()  # nobody replied this time
        stated.append(again.commit())
    assert [each.steps_executed for each in stated] == [2, 3]
    booked = again._budget.ledger.mechanisms()
    assert [SubsampledGaussian.from_json(each) for each in stated[-1].mechanisms] == [booked[0].repeated(3)]
    finished = [RoundFinished(number, 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, each) for number, each in enumerate(stated, 1)]
    experiment = compose_experiment(["privacy=client_level", "federation.sites_per_person=2"])
    now = datetime(2026, 3, 4, tzinfo=UTC)
    (site,) = summarize(experiment, finished, base_digest="b", started=now, status="finished")["privacy"]["joint"]
    assert site["epsilon_over_sites"] == pytest.approx(epsilon_of(booked, 1e-3, group_size=2), rel=1e-6)
    assert site["epsilon_over_sites"] > epsilon_of(booked[:2], 1e-3, group_size=2)
    again.close()
