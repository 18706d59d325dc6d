"""Our server optimizers and robust rules against Flower's own, from the same arrays."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.supercore.task_identity import TaskIdentity

from conf.schema import robust, server_optimizer
from conf.schema.objective import QFedAvg
from conf.schema.strategy import FedIT
from protocol.tensors import NamedTensors
from strategies.base import Contribution, ServerState, Strategy
from strategies.build import build_strategy

SHAPES = {"q.lora_A.weight": (4, 12), "q.lora_B.weight": (12, 4), "score.weight": (3, 12), "score.bias": (3,)}
RATE = 0.25


@pytest.fixture(autouse=True)
def _flower_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for field, value in (("_run_id", 1), ("_node_id", 0), ("_task_id", 1)):
        monkeypatch.setattr(TaskIdentity, field, value)


def random(seed: int, size: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def record(tensors: NamedTensors) -> ArrayRecord:
    return ArrayRecord(OrderedDict((name, Array(tensors[name].numpy().copy())) for name in SHAPES))


def replies(models: list[NamedTensors], losses: list[float] | None = None) -> list[Message]:
    made: list[Message] = []
    for node, model in enumerate(models, 1):
        asked = Message(RecordDict({"config": ConfigRecord({})}), node, MessageType.TRAIN)
        asked.metadata._message_id = f"message-{node}"
        metrics: dict[str, Any] = {"num-examples": 1}
        if losses is not None:
            metrics["train_loss"] = losses[node - 1]
        content = RecordDict({"arrays": record(model), "metrics": MetricRecord(metrics)})
        made.append(Message(content, reply_to=asked))
    return made


def theirs(strategy: Any, round_number: int, current: NamedTensors, messages: list[Message]) -> dict[str, np.ndarray]:
    if hasattr(strategy, "current_arrays"):  # what `configure_train` sets
        arrays = record(current)
        is_momentum = isinstance(strategy, flower.FedAvgM)
        strategy.current_arrays = arrays if is_momentum else {name: array.numpy() for name, array in arrays.items()}
        if isinstance(strategy, flower.QFedAvg):
            strategy.current_arrays = arrays
    combined, _ = strategy.aggregate_train(round_number, messages)
    assert combined is not None
    return {name: array.numpy() for name, array in combined.items()}


def one_round(
    strategy: Strategy, adapter: NamedTensors, state: ServerState, updates: list[NamedTensors], **given: Any
) -> tuple[NamedTensors, ServerState]:
    aggregator = strategy.server.aggregator(adapter, state)
    losses: list[float] | None = given.pop("losses", None)
    for position, update in enumerate(updates):
        metrics = {} if losses is None else {"training_loss": losses[position]}
        aggregator.accumulate(Contribution(update, 1.0, start=adapter, metrics=metrics, **given))
    return strategy.server.step(adapter, aggregator.result(), state)


def assert_near(ours: NamedTensors, wanted: Mapping[str, np.ndarray]) -> None:
    assert ours.keys() == wanted.keys()
    for name, tensor in ours.items():
        np.testing.assert_allclose(tensor.numpy(), wanted[name], rtol=1e-6, atol=1e-6)


OPTIMIZERS = {
    "fedavgm": (
        server_optimizer.FedAvgM(learning_rate=0.7, momentum=0.9),
        lambda: flower.FedAvgM(server_learning_rate=0.7, server_momentum=0.9),
    ),
    "fedadagrad": (
        server_optimizer.FedAdagrad(learning_rate=0.05, tau=1e-2),
        lambda: flower.FedAdagrad(eta=0.05, tau=1e-2),
    ),
    "fedadam": (
        server_optimizer.FedAdam(learning_rate=0.05, beta1=0.8, beta2=0.95, tau=1e-2),
        lambda: flower.FedAdam(eta=0.05, beta_1=0.8, beta_2=0.95, tau=1e-2),
    ),
    "fedyogi": (
        server_optimizer.FedYogi(learning_rate=0.05, beta1=0.8, beta2=0.95, tau=1e-2),
        lambda: flower.FedYogi(eta=0.05, beta_1=0.8, beta_2=0.95, tau=1e-2),
    ),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_server_optimizers_equal_flowers_over_several_rounds(kind: str) -> None:
    config, make = OPTIMIZERS[kind]
    ours, flowers = build_strategy(FedIT(server_optimizer=config)), make()
    adapter: NamedTensors = random(0)
    state = ours.server.init(adapter)
    for number in (1, 2, 3, 4):
        updates = [random(100 * number + site, 0.3) for site in range(5)]
        models = [{name: adapter[name] + update[name] for name in SHAPES} for update in updates]
        wanted = theirs(flowers, number, adapter, replies(models))
        adapter, state = one_round(ours, adapter, state, updates)
        assert_near(adapter, wanted)
    plain = build_strategy(FedIT())
    moved, _ = one_round(plain, random(0), plain.server.init(adapter), [random(100, 0.3)])
    assert not torch.allclose(moved["score.weight"], adapter["score.weight"], atol=1e-3), "the optimizer did nothing"


RULES = {
    "median": (robust.CoordinateMedian(attackers=2), flower.FedMedian),
    "trimmed_mean": (robust.TrimmedMean(attackers=2), lambda: flower.FedTrimmedAvg(beta=0.2)),
    "krum": (robust.Krum(attackers=2, distance="factors"), lambda: flower.Krum(num_malicious_nodes=2)),
    "multi_krum": (
        robust.MultiKrum(attackers=2, selected=4, distance="factors"),
        lambda: flower.MultiKrum(num_malicious_nodes=2, num_nodes_to_select=4),
    ),
    "bulyan": (robust.Bulyan(attackers=2, distance="factors"), lambda: flower.Bulyan(num_malicious_nodes=2)),
}


@pytest.mark.parametrize("sites", [11, 12])
@pytest.mark.parametrize("kind", RULES)
def test_robust_rules_equal_flowers(kind: str, sites: int) -> None:
    """Two of the sites send something far off, so that the rules have something to leave out."""
    config, make = RULES[kind]
    updates = [random(site, 30.0 if site < 2 else 1.0) for site in range(sites)]
    zero = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    wanted = theirs(make(), 1, zero, replies(updates))
    ours = build_strategy(FedIT(robust=config))
    combined, _ = one_round(ours, zero, ours.server.init(zero), updates)
    assert_near(combined, wanted)
    mean, _ = one_round(build_strategy(FedIT()), zero, ServerState(), updates)
    assert not torch.allclose(mean["score.weight"], combined["score.weight"], atol=0.1), "the rule did nothing"


@pytest.mark.parametrize("q", [0.0, 0.2, 2.0])
def test_q_fedavg_equals_flowers(q: float) -> None:
    adapter, losses = random(0), [0.4, 1.0, 2.5, 6.0]
    updates = [random(site, 0.2) for site in range(1, 5)]
    models = [{name: adapter[name] + update[name] for name in SHAPES} for update in updates]
    wanted = theirs(
        flower.QFedAvg(client_learning_rate=RATE, q=q, train_loss_key="train_loss"), 1, adapter, replies(models, losses)
    )
    ours = build_strategy(FedIT(objective=QFedAvg(q=q)))
    moved, _ = one_round(ours, adapter, ours.server.init(adapter), updates, losses=losses, learning_rate=RATE)
    assert_near(moved, wanted)
