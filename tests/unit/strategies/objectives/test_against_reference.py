"""Local objectives against plain float64 loops written from the papers' equations, on quadratics.

Site k's loss is ½ (w - bₖ)ᵀ Hₖ (w - bₖ), full gradients, so that nothing is random. Ours runs through both halves of
the built strategy: downloads, corrections after the gradient, memories, contributions, server steps.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from conf.schema.federation import SGD, LocalTraining
from conf.schema.objective import FedDyn, FedNova, FedProx, NoObjective, Objective, QFedAvg, Scaffold
from conf.schema.strategy import FedIT
from protocol.errors import ReplyRejected
from protocol.tensors import NamedTensors
from strategies.base import Contribution, LocalStart, ServerState, Strategy
from strategies.build import build_strategy
from strategies.objectives.local_steps import effective_steps

NAME = "score.weight"
DIMENSION, ROUNDS, SITES = 6, 12, 4


@dataclass(frozen=True)
class Quadratic:
    curvature: np.ndarray
    bottom: np.ndarray

    def gradient(self, at: np.ndarray) -> np.ndarray:
        return self.curvature @ (at - self.bottom)


def quadratics(seed: int = 0) -> list[Quadratic]:
    generator = np.random.default_rng(seed)
    made: list[Quadratic] = []
    for _ in range(SITES):
        root = generator.normal(size=(DIMENSION, DIMENSION)) / 2
        made.append(Quadratic(root @ root.T + 0.2 * np.eye(DIMENSION), generator.normal(size=DIMENSION)))
    return made


def optimum(sites: list[Quadratic]) -> np.ndarray:
    return np.linalg.solve(sum(s.curvature for s in sites), sum(s.curvature @ s.bottom for s in sites))


@dataclass
class Federation:
    """The built strategy on quadratics, one cohort a round."""

    strategy: Strategy
    sites: list[Quadratic]
    steps: list[int]
    optimizer: SGD

    def __post_init__(self) -> None:
        self.adapter: NamedTensors = {NAME: torch.zeros(DIMENSION)}
        state = self.strategy.server.init(self.adapter)
        self.state = ServerState(state.tensors, {**state.numbers, "population": float(len(self.sites))})
        self.memories: list[NamedTensors] = [{} for _ in self.sites]

    def round(self, cohort: list[int]) -> np.ndarray:
        names = frozenset(self.adapter)
        sent = self.strategy.server.download(self.adapter, self.state, names, None)
        extras = {name: tensor for name, tensor in sent.items() if name not in names}
        self.strategy.client.verify_extras(extras, self.adapter)
        aggregator = self.strategy.server.aggregator(self.adapter, self.state)
        for site in cohort:
            aggregator.accumulate(self._trained(site, names, extras))
        self.adapter, self.state = self.strategy.server.step(self.adapter, aggregator.result(), self.state)
        return self.adapter[NAME].numpy()

    def _trained(self, site: int, names: frozenset[str], extras: NamedTensors) -> Contribution:
        local = LocalTraining(steps=self.steps[site], optimizer=self.optimizer)
        rate = self.optimizer.learning_rate
        memory = self.memories[site]
        begun = self.strategy.client.begin(LocalStart(self.adapter, extras, memory, names, names, local, rate))
        weights = nn.Parameter(begun.start[NAME].clone())
        sgd = torch.optim.SGD([weights], rate, momentum=self.optimizer.momentum)
        for _ in range(local.steps):
            gradient = self.sites[site].gradient(weights.detach().double().numpy())
            weights.grad = torch.from_numpy(gradient).float()
            begun.correct({NAME: weights})
            sgd.step()
        outcome = begun.finish({NAME: weights.detach().clone()})
        self.memories[site] = outcome.memory
        effective = effective_steps(self.optimizer, local.steps)
        return Contribution(
            outcome.update, 1.0, self.adapter, local.steps, learning_rate=rate, effective_steps=effective
        )


def federation(objective: Objective, steps: list[int] | None = None, momentum: float = 0.0) -> Federation:
    optimizer = SGD(learning_rate=0.1, momentum=momentum)
    return Federation(build_strategy(FedIT(objective=objective)), quadratics(), steps or [5] * SITES, optimizer)


COHORTS = [[0, 1, 2, 3] if number % 3 else [1, 3] for number in range(ROUNDS)]


def test_fedprox_is_gradient_descent_on_the_pulled_loss() -> None:
    ours, sites, x = federation(FedProx(mu=0.7)), quadratics(), np.zeros(DIMENSION)
    for cohort in COHORTS:
        ends: list[np.ndarray] = []
        for k in cohort:
            w = x.copy()
            for _ in range(5):
                w = w - 0.1 * (sites[k].gradient(w) + 0.7 * (w - x))
            ends.append(w)
        x = np.mean(ends, axis=0)
        np.testing.assert_allclose(ours.round(cohort), x, rtol=1e-5, atol=1e-6)


def test_scaffold_is_the_papers_algorithm_although_only_updates_go_up() -> None:
    """The reference sends Δcₖ as algorithm 1 does; ours derives it at the server."""
    ours, sites, x = federation(Scaffold()), quadratics(), np.zeros(DIMENSION)
    c, own = np.zeros(DIMENSION), [np.zeros(DIMENSION) for _ in range(SITES)]
    for cohort in COHORTS:
        moves: list[np.ndarray] = []
        changes: list[np.ndarray] = []
        for k in cohort:
            y = x.copy()
            for _ in range(5):
                y = y - 0.1 * (sites[k].gradient(y) - own[k] + c)
            after = own[k] - c + (x - y) / (5 * 0.1)
            moves.append(y - x)
            changes.append(after - own[k])
            own[k] = after
        x = x + np.mean(moves, axis=0)
        c = c + len(cohort) / SITES * np.mean(changes, axis=0)
        np.testing.assert_allclose(ours.round(cohort), x, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(ours.state.tensors[f"scaffold.common.{NAME}"].numpy(), c, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(c, np.mean(own, axis=0), atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_scaffold_reaches_the_optimum_where_averaging_does_not(momentum: float) -> None:
    ours, plain, wanted = federation(Scaffold(), momentum=momentum), federation(NoObjective()), optimum(quadratics())
    for _ in range(150):
        ended, drifted = ours.round([0, 1, 2, 3]), plain.round([0, 1, 2, 3])
    assert np.linalg.norm(ended - wanted) < 1e-3
    assert np.linalg.norm(drifted - wanted) > 0.05


def test_feddyn_is_the_papers_algorithm() -> None:
    alpha = 0.5
    ours, sites, x = federation(FedDyn(alpha=alpha)), quadratics(), np.zeros(DIMENSION)
    h, own = np.zeros(DIMENSION), [np.zeros(DIMENSION) for _ in range(SITES)]
    for cohort in COHORTS:
        ends: list[np.ndarray] = []
        for k in cohort:
            w = x.copy()
            for _ in range(5):
                w = w - 0.1 * (sites[k].gradient(w) - own[k] + alpha * (w - x))
            own[k] = own[k] - alpha * (w - x)
            ends.append(w)
        h = h - alpha / SITES * np.sum([w - x for w in ends], axis=0)
        x = np.mean(ends, axis=0) - h / alpha
        np.testing.assert_allclose(ours.round(cohort), x, rtol=1e-4, atol=1e-5)


def test_feddyn_reaches_the_optimum() -> None:
    ours = federation(FedDyn(alpha=0.5), steps=[30] * SITES)
    for _ in range(80):
        ended = ours.round([0, 1, 2, 3])
    assert np.linalg.norm(ended - optimum(quadratics())) < 1e-3


def test_fednova_is_the_papers_equation_for_unequal_steps() -> None:
    steps = [1, 2, 5, 9]
    ours, sites, x = federation(FedNova(), steps=steps), quadratics(), np.zeros(DIMENSION)
    for cohort in COHORTS:
        per_step: list[np.ndarray] = []
        for k in cohort:
            w = x.copy()
            for _ in range(steps[k]):
                w = w - 0.1 * sites[k].gradient(w)
            per_step.append((w - x) / steps[k])
        x = x + np.mean([steps[k] for k in cohort]) * np.mean(per_step, axis=0)
        np.testing.assert_allclose(ours.round(cohort), x, rtol=1e-5, atol=1e-6)


def test_fednova_with_equal_steps_is_the_mean() -> None:
    ours, plain = federation(FedNova()), federation(NoObjective())
    for cohort in COHORTS:
        np.testing.assert_allclose(ours.round(cohort), plain.round(cohort), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("momentum", "steps"), [(0.0, 7), (0.5, 1), (0.9, 4), (0.99, 20)])
def test_effective_steps_are_what_a_constant_gradient_moves(momentum: float, steps: int) -> None:
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    sgd = torch.optim.SGD([weight], 0.3, momentum=momentum)
    for _ in range(steps):
        weight.grad = torch.ones(1, dtype=torch.float64)
        sgd.step()
    expected = effective_steps(SGD(learning_rate=0.3, momentum=momentum), steps)
    assert -float(weight.detach()) / 0.3 == pytest.approx(expected, rel=1e-12)


def test_q_zero_is_the_mean_and_a_high_q_follows_the_worst_site() -> None:
    updates = [{NAME: torch.tensor([1.0, 0.0])}, {NAME: torch.tensor([0.0, 1.0])}]

    def combined(q: float) -> torch.Tensor:
        strategy = build_strategy(FedIT(objective=QFedAvg(q=q)))
        aggregator = strategy.server.aggregator({NAME: torch.zeros(2)}, ServerState())
        for update, loss in zip(updates, (1.0, 3.0), strict=True):
            aggregator.accumulate(Contribution(update, 1.0, metrics={"noisy_training_loss": loss}))
        return aggregator.result()[NAME]

    torch.testing.assert_close(combined(0.0), torch.tensor([0.5, 0.5]))
    skewed = combined(4.0)
    assert skewed[1] > 50 * skewed[0]


def test_q_fedavg_takes_no_reply_without_a_loss() -> None:
    strategy = build_strategy(FedIT(objective=QFedAvg()))
    aggregator = strategy.server.aggregator({NAME: torch.zeros(2)}, ServerState())
    with pytest.raises(ReplyRejected, match="needs a training loss and the site released none"):
        aggregator.accumulate(Contribution({NAME: torch.ones(2)}, 1.0))


@pytest.mark.parametrize("loss", [1e300, float("inf"), float("nan"), -1e300])
def test_q_fedavg_takes_no_loss_whose_power_would_overflow(loss: float) -> None:
    aggregator = build_strategy(FedIT(objective=QFedAvg(q=20))).server.aggregator({NAME: torch.zeros(2)}, ServerState())
    with pytest.raises(ReplyRejected, match=r"the reply states noisy_training_loss=.*, above 1e\+09 in size"):
        aggregator.accumulate(Contribution({NAME: torch.ones(2)}, 1.0, metrics={"noisy_training_loss": loss}))
    for allowed in (1e9, 1.0):
        aggregator.accumulate(Contribution({NAME: torch.ones(2)}, 1.0, metrics={"noisy_training_loss": allowed}))
    assert bool(aggregator.result()[NAME].isfinite().all())


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        ({"scaffold.common.other": torch.zeros(DIMENSION)}, "is no tensor of this adapter"),
        ({f"scaffold.common.{NAME}": torch.zeros(2)}, r"is torch.float32 \(2,\), expected torch.float32 \(6,\)"),
        ({f"scaffold.common.{NAME}": torch.full((DIMENSION,), torch.nan)}, "holds NaN or infinity"),
        ({"something": torch.zeros(1)}, "'something' is no tensor of this adapter"),
    ],
)
def test_a_site_refuses_control_variates_that_do_not_fit(extra: NamedTensors, problem: str) -> None:
    client = build_strategy(FedIT(objective=Scaffold())).client
    with pytest.raises(ReplyRejected, match=problem):
        client.verify_extras(extra, {NAME: torch.zeros(DIMENSION)})


def test_a_pull_needs_no_gradient_and_moves_no_memory() -> None:
    ours = federation(FedProx(mu=2.0))
    names = frozenset(ours.adapter)
    start = LocalStart(ours.adapter, {}, {}, names, names, LocalTraining(), 1.0)
    begun = ours.strategy.client.begin(start)
    parameter = nn.Parameter(torch.ones(DIMENSION))
    begun.correct({NAME: parameter})
    assert parameter.grad is not None
    torch.testing.assert_close(parameter.grad, 2.0 * torch.ones(DIMENSION))
    outcome = begun.finish({NAME: torch.ones(DIMENSION)})
    torch.testing.assert_close(outcome.update[NAME], torch.ones(DIMENSION))
    assert not outcome.memory
    assert replace(ours.strategy, has_memory=True) != ours.strategy
