"""A site books client-level runs itself: what the server claims, under limits that the site counts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binom

from client.claims import check_claim, check_claimed_cost
from client.site import Site
from client.whole_site import WholeSite
from conf.compose import compose_experiment
from conf.schema.site import SiteFile, SitePolicy, WholeSiteBudget
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


def test_a_site_that_is_drawn_too_often_for_chance_refuses(ledger: Callable[[float], Ledger]) -> None:
    """Drawn at a rate of 0.01 in each of 100 rounds a site is asked once; 12 times by chance in 1 of 10^9 runs."""
    books = ledger(100.0)
    release, rounds = claim(sampling_rate=0.01), "federation.rounds=100"
    most = next(count for count in range(1, 100) if binom.sf(count, 100, 0.01) < 1e-9)
    for number in range(1, most + 1):
        WholeSite.reserve(books, header(number, release, rounds), f"{number:064}").commit("o" * 64)
    with pytest.raises(SiteRefusal, match=rf"number {most + 1} of 100, and the server claims to draw it at") as caught:
        WholeSite.reserve(books, header(most + 1, release, rounds), "f" * 64)
    assert caught.value.code == "participation_limit"
    assert most < 15
    # A round that was answered may be asked for again.
    WholeSite.reserve(books, header(most, release, rounds), f"{most:064}").commit("o" * 64)


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


SECRET = claim(sampling_rate=0.25)
LIMITS = claim(min_separation=1, max_participations=4)
TREE = ("privacy=client_level_tree", *BASE[1:])


def book(ledger: Ledger, header: InstructionHeader, inputs: str, output: str = "o" * 64) -> float:
    """Return what a round adds to the ledger."""
    before = ledger.spent()
    WholeSite.reserve(ledger, header, inputs * 64).commit(output)
    return ledger.spent() - before


def steps(ledger: Ledger) -> list[tuple[float, int]]:
    return [(mechanism.sampling_rate, mechanism.steps) for mechanism in ledger.mechanisms("run")]


def test_a_round_of_a_secret_cohort_asked_again_with_other_inputs_is_charged(
    ledger: Callable[[float], Ledger],
) -> None:
    """The cohort of a round is drawn once: nothing amplifies a second release."""
    books = ledger(100.0)
    book(books, header(1, SECRET), "1")
    assert book(books, header(2, SECRET), "2") == 0
    assert book(books, header(2, SECRET), "2") == 0, "the same instruction again is free"
    assert all(book(books, header(2, SECRET), inputs) > 0 for inputs in "345")
    assert steps(books) == [(0.25, ROUNDS), (0.25, 0), (1, 1), (1, 1), (1, 1)]
    assert book(books, header(3, SECRET), "6") == 0


def test_another_result_in_a_secret_cohort_is_charged(ledger: Callable[[float], Ledger]) -> None:
    books = ledger(100.0)
    book(books, header(1, SECRET), "1")
    book(books, header(2, SECRET), "2")
    assert book(books, header(2, SECRET), "2", output="p" * 64) > 0
    assert book(books, header(2, SECRET), "2", output="p" * 64) == 0
    assert steps(books) == [(0.25, ROUNDS), (0.25, 0), (1, 1)]


@pytest.mark.parametrize(
    ("then", "overrides"),
    [
        (claim(sampling_rate=0.5), ()),
        (claim(sampling_rate=0.25, noise_multiplier=3.0), ()),
        (SECRET, ("privacy.noise_multiplier=1",)),
        (LIMITS, TREE),
    ],
)
def test_another_plan_or_claim_under_the_same_name_is_charged_whole(
    ledger: Callable[[float], Ledger], then: ReleaseClaim, overrides: tuple[str, ...]
) -> None:
    books = ledger(100.0)
    book(books, header(1, SECRET), "1")
    assert book(books, header(2, then, *overrides), "2") > 0
    assert steps(books)[1] == (then.sampling_rate, ROUNDS if then.min_separation is None else 1)
    assert book(books, header(3, then, *overrides), "3") == 0
    assert book(books, header(4, SECRET), "4") == 0, "what was paid for is still paid for"


def test_a_weaker_claim_of_correlated_noise_is_charged_whole(ledger: Callable[[float], Ledger]) -> None:
    books = ledger(100.0)
    book(books, header(1, LIMITS, *TREE), "1")
    assert book(books, header(2, claim(min_separation=1, max_participations=3), *TREE), "2") > 0
    assert book(books, header(3, LIMITS, *TREE), "3") == 0


def test_correlated_noise_lies_on_one_update_of_a_round(ledger: Callable[[float], Ledger]) -> None:
    books = ledger(100.0)
    for number in (1, 2):
        book(books, header(number, LIMITS, *TREE), f"{number}")
    spent = books.spent()
    for again in (header(2, LIMITS, *TREE), header(2, LIMITS, *TREE, "privacy.noise_multiplier=1")):
        with pytest.raises(SiteRefusal, match="round 2 of run run was answered before") as refused:
            WholeSite.reserve(books, again, "3" * 64)
        assert refused.value.code == "round_repeated"
    with pytest.raises(SiteRefusal, match="must not lie on both") as refused:
        book(books, header(2, LIMITS, *TREE), "2", output="p" * 64)
    assert refused.value.code == "round_repeated"
    assert books.spent() == spent


def file_of(site_budget: WholeSiteBudget | None, **policy: Any) -> SiteFile:
    return SiteFile(
        name="clinic",
        published_records=1000,
        data=compose_experiment().data,
        model_path="embedded:clinic-base",
        site_budget=site_budget,
        policy=SitePolicy(trust_server_noise=True, **policy),
        state_directory="state",
    )


@pytest.mark.parametrize(
    ("policy", "code"),
    [
        ({"min_noise_multiplier": 1.01 * NOISE}, "noise_too_small"),
        ({"max_epsilon_per_run": 0.99 * cost(1.0, ROUNDS)}, "epsilon_per_run"),
        ({"max_epsilon_per_round": 0.99 * cost(1.0, 1)}, "epsilon_per_round"),
    ],
)
def test_the_policy_limits_the_servers_noise(policy: dict[str, float], code: str) -> None:
    asked, budget = header(1, claim(delta=1e-4)), WholeSiteBudget(epsilon=100, delta=DELTA)
    with pytest.raises(SiteRefusal) as refused:
        check_claimed_cost(file_of(budget, **policy), asked)
    assert refused.value.code == code
    check_claimed_cost(
        file_of(budget, **{name: limit / 0.98**2 for name, limit in policy.items() if "max" in name}), asked
    )
    planned = header(1, claim(), f"privacy.delta={DELTA}")
    with pytest.raises(SiteRefusal) as refused:
        check_claimed_cost(file_of(None, **policy), planned)
    assert refused.value.code == code


def test_a_limit_on_epsilon_needs_a_delta_that_is_not_the_servers_alone() -> None:
    with pytest.raises(SiteRefusal, match="max_epsilon_per_run needs a δ, and the plan has none") as refused:
        check_claimed_cost(file_of(None, max_epsilon_per_run=1e6), header(1, claim()))
    assert refused.value.code == "no_budget"


@pytest.mark.parametrize(
    ("overrides", "delta", "reason"),
    [
        (("privacy.delta=0.01",), 0.02, "the plan's δ is 0.01, the claim's 0.02"),
        (("privacy.delta=0.01",), 0.001, "the plan's δ is 0.01, the claim's 0.001"),
        ((), 0.999, "the claim's δ is 0.999, above site_budget.delta=0.001"),
    ],
)
def test_a_claim_cannot_choose_its_delta(
    ledger: Callable[[float], Ledger], overrides: tuple[str, ...], delta: float, reason: str
) -> None:
    books = ledger(100.0)
    with pytest.raises(SiteRefusal, match=reason) as refused:
        WholeSite.reserve(books, header(1, claim(delta=delta), *overrides), "1" * 64)
    assert refused.value.code == "wrong_release_claim"
    assert books.spent() == 0


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
        check_claim(header(1, release, *overrides), None)
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
