"""From a strategy's configuration to its algorithm: the one place that knows the family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, assert_never

from conf.schema import objective as objectives
from conf.schema import server_optimizer as optimizers
from conf.schema import strategy as schema
from conf.schema.robust import NoRobustness
from strategies.base import Strategy
from strategies.lora.cores import fedsb, ravan
from strategies.lora.fedex import fedex
from strategies.lora.fedit import fedit
from strategies.lora.fedrot import fedrot
from strategies.lora.fedsa import fedsa
from strategies.lora.fedsvd import fedsvd
from strategies.lora.ffa_lora import ffa_lora
from strategies.lora.flasc import flasc
from strategies.lora.flexlora import flexlora
from strategies.lora.flora import flora
from strategies.lora.hetlora import hetlora
from strategies.lora.rolora import rolora
from strategies.objectives.feddyn import DynamicClient, DynamicServer
from strategies.objectives.fednova import NormalizedServer
from strategies.objectives.fedprox import ProximalClient
from strategies.objectives.qfedavg import FairServer
from strategies.objectives.scaffold import ScaffoldClient, ScaffoldServer
from strategies.robust.server import RobustServer
from strategies.server_optimizers.adaptive import fedadagrad, fedadam, fedyogi
from strategies.server_optimizers.fedavgm import fedavgm
from strategies.server_optimizers.optimized import OptimizedServer

__all__ = ["STRATEGIES", "build_strategy"]

STRATEGIES: dict[type[schema.Strategy], Callable[[Any], Strategy]] = {
    schema.FedIT: lambda config: fedit(),
    schema.FFALoRA: lambda config: ffa_lora(),
    schema.RoLoRA: lambda config: rolora(),
    schema.FedSALoRA: lambda config: fedsa(),
    schema.FedSVD: lambda config: fedsvd(),
    schema.FedRot: lambda config: fedrot(),
    schema.FLASC: lambda config: flasc(config.download_density, config.upload_density),
    schema.FLoRA: lambda config: flora(),
    schema.FedEx: lambda config: fedex(),
    schema.FlexLoRA: lambda config: flexlora(),
    schema.HetLoRA: lambda config: hetlora(),
    schema.FedSB: lambda config: fedsb(),
    schema.Ravan: lambda config: ravan(),
}


def build_strategy(config: schema.Strategy) -> Strategy:
    """Return the algorithm that a validated configuration names, wrapped from the inside out: the server's optimizer,
    its robust rule, the sites' objective."""
    strategy = STRATEGIES[type(config)](config)
    return _with_objective(_robust(_optimized(strategy, config), config), config)


def _optimized(strategy: Strategy, config: schema.Strategy) -> Strategy:
    chosen = config.server_optimizer
    match chosen:
        case optimizers.NoServerOptimizer():
            return strategy
        case optimizers.FedAvgM():
            optimizer = fedavgm(chosen)
        case optimizers.FedAdagrad():
            optimizer = fedadagrad(chosen)
        case optimizers.FedAdam():
            optimizer = fedadam(chosen)
        case optimizers.FedYogi():
            optimizer = fedyogi(chosen)
        case _:
            assert_never(chosen)
    return replace(strategy, server=OptimizedServer(strategy.server, optimizer))


def _robust(strategy: Strategy, config: schema.Strategy) -> Strategy:
    if isinstance(config.robust, NoRobustness):
        return strategy
    return strategy.with_server(RobustServer(strategy.server, config.robust))


def _with_objective(strategy: Strategy, config: schema.Strategy) -> Strategy:
    server, client, chosen = strategy.server, strategy.client, config.objective
    match chosen:
        case objectives.NoObjective():
            return strategy
        case objectives.FedProx():
            return replace(strategy, client=ProximalClient(client, chosen.mu))
        case objectives.FedNova():
            return strategy.with_server(NormalizedServer(server))
        case objectives.QFedAvg():
            return strategy.with_server(FairServer(server, chosen.q))
        case objectives.Scaffold():
            server, client = ScaffoldServer(server), ScaffoldClient(client)
        case objectives.FedDyn():
            server, client = DynamicServer(server, chosen.alpha), DynamicClient(client, chosen.alpha)
        case _:
            assert_never(chosen)
    return replace(strategy.with_server(server), has_memory=True, client=client)
