"""A site books client-level runs itself: what the server claims, under limits that the site counts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.site import Site
from client.whole_site import WholeSite, check_claim
from conf.compose import compose_experiment
from conf.schema.site import WholeSiteBudget
from privacy.accounting import epsilon_of
from privacy.identity import identify
from privacy.ledger import Budget, Ledger, SigningKey
from privacy.mechanisms import SubsampledGaussian
from protocol.errors import BudgetExceeded, SiteRefusal
from protocol.instructions import Instruction, InstructionHeader, ReleaseClaim, client_plan
from simulations.population import site_file

Make = Callable[..., Any]
DELTA = 1e-3
ROUNDS = 4
NOISE = 2.0
BASE = (
    "privacy=client_level",
    f"federation.rounds={ROUNDS}",
    "privacy.target_epsilon=null",
    "privacy.noise_multiplier=2",
)


def claim(**changes: Any) -> ReleaseClaim:
    return ReleaseClaim(**({"noise_multiplier": NOISE, "sampling_rate": 1.0, "delta": DELTA} | changes))


def header(number: int, release: ReleaseClaim | None, *overrides: str, run: str = "run") -> InstructionHeader:
    plan = client_plan(compose_experiment([*BASE, *overrides]), run)
    return InstructionHeader(
        round=number,
        plan=plan,
        plan_digest=plan.digest,
        base_digest="b",
        adapter_digest="a",
        clip_norm=1.0,
        release=release,
    )


@pytest.fixture
def ledger(tmp_path: Path) -> Callable[[float], Ledger]:
    def make(epsilon: float) -> Ledger:
        identity = identify([b"the whole site"], b"k" * 32)
        return Ledger(tmp_path / "site_ledger.db", SigningKey.generate(), identity, Budget(epsilon, DELTA, "site"))

    return make


def cost(rate: float, steps: int) -> float:
    return epsilon_of([SubsampledGaussian(rate, NOISE, steps)], DELTA)


def test_a_known_cohort_costs_one_step_for_each_round_that_asks(ledger: Callable[[float], Ledger]) -> None:
    books = ledger(100.0)
    for number in (1, 4):
        WholeSite.reserve(books, header(number, claim()), f"{number}" * 64).commit("o" * 64)
    assert books.spent() == pytest.approx(cost(1.0, 2))
    WholeSite.reserve(books, header(4, claim()), "4" * 64).commit("o" * 64)
    assert books.spent() == pytest.approx(cost(1.0, 2)), "the same instruction again is free"
    WholeSite.reserve(books, header(4, claim()), "4" * 64).commit("p" * 64)
    assert books.spent() == pytest.approx(cost(1.0, 3)), "another update is another release"


def test_a_secret_cohort_is_booked_whole_at_the_first_round(ledger: Callable[[float], Ledger]) -> None:
    """The rounds in which the site is not drawn are part of what amplifies, and of what costs."""
    books = ledger(100.0)
    for number in (2, 3):
        WholeSite.reserve(books, header(number, claim(sampling_rate=0.25)), f"{number}" * 64).commit("o" * 64)
        assert books.spent() == pytest.approx(cost(0.25, ROUNDS))


def test_correlated_noise_is_booked_once_and_its_limits_are_counted(ledger: Callable[[float], Ledger]) -> None:
    books, noise = ledger(100.0), "privacy=client_level_tree"
    limits = claim(min_separation=2, max_participations=2)
    overrides = (noise, *BASE[1:])
    for number in (1, 3):
        WholeSite.reserve(books, header(number, limits, *overrides), f"{number}" * 64).commit("o" * 64)
        assert books.spent() == pytest.approx(cost(1.0, 1))
    WholeSite.reserve(books, header(3, limits, *overrides), "3" * 64).commit("o" * 64)
    with pytest.raises(SiteRefusal, match="round 4 is this site's number 3 of at most 2, and less than 2 rounds") as no:
        WholeSite.reserve(books, header(4, limits, *overrides), "4" * 64)
    assert no.value.code == "participation_limit"


def test_several_runs_share_one_budget(ledger: Callable[[float], Ledger]) -> None:
    books = ledger(1.1 * cost(1.0, 2))
    for number in (1, 2):
        WholeSite.reserve(books, header(number, claim()), f"{number}" * 64).commit("o" * 64)
    with pytest.raises(BudgetExceeded, match="above its budget"):
        WholeSite.reserve(books, header(1, claim(), run="another"), "9" * 64)


@pytest.mark.parametrize(
    ("release", "overrides", "code", "reason"),
    [
        (None, (), "no_release_claim", "does not say how it noises the sum"),
        (claim(noise_multiplier=1.5), (), "wrong_release_claim", "noise multiplier is 2, the claim's 1.5"),
        (claim(min_separation=1, max_participations=1), (), "wrong_release_claim", "limits on participation belong"),
        (claim(), ("privacy=client_level_tree", *BASE[1:]), "wrong_release_claim", "limits on participation belong"),
        (
            claim(min_separation=1, max_participations=4, sampling_rate=0.5),
            ("privacy=client_level_tree", *BASE[1:]),
            "wrong_release_claim",
            "correlated noise is not amplified",
        ),
        (
            claim(),
            ("privacy.target_epsilon=1", "privacy.noise_multiplier=null"),
            "wrong_release_claim",
            "the plan's ε is 1, the claimed noise gives",
        ),
    ],
)
def test_a_claim_that_does_not_fit_the_plan_is_refused(
    release: ReleaseClaim | None, overrides: tuple[str, ...], code: str, reason: str
) -> None:
    with pytest.raises(SiteRefusal, match=reason) as refused:
        check_claim(header(1, release, *overrides))
    assert refused.value.code == code


def test_a_site_trains_no_client_level_round_beyond_its_own_budget(
    tmp_path: Path, small: Make, instruct: Make, population: Any
) -> None:
    experiment = small("privacy=client_level", "privacy.insecure_seed=null", "federation.rounds=2", private=False)
    rows = population.parts["harbor"][:20]
    file = site_file(experiment, "harbor", len(rows), tmp_path / "state")
    enough = SubsampledGaussian(1.0, NOISE, 1)
    budget = WholeSiteBudget(epsilon=1.1 * epsilon_of([enough], DELTA), delta=DELTA)
    site = Site(file.model_copy(update={"site_budget": budget}), rows=lambda: rows)

    def asked(number: int) -> Instruction:
        return instruct(experiment, number, release=claim(noise_multiplier=NOISE))

    first = site.handle(asked(1))
    assert first.header.status == "trained", first.header.reason
    assert site.handle(asked(1)).tensors.keys() == first.tensors.keys()
    assert site.handle(asked(2)).header.code == "budget_exceeded"
    site.close()
    again = Site(file.model_copy(update={"site_budget": budget}), rows=lambda: rows)
    assert again.handle(asked(2)).header.code == "budget_exceeded", "the ledger outlives the process"
    again.close()
