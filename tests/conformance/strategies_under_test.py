"""Every strategy that can be configured, adapters as they are in the middle of a run, and what an adapter does.

Factors may be turned, stacked or folded; what an adapter *does* is the product of its factors. So adapters are compared
by their effect: the dense ΔW of each layer, and every other tensor as it is.
"""

import math
import typing
from collections.abc import Callable

import pytest
import torch
from pydantic import BaseModel

from conf.schema import strategy as schema
from protocol.tensors import NamedTensors
from strategies.base import Aggregator, Contribution, Strategy
from strategies.build import build_strategy

VARIANTS: tuple[type[BaseModel], ...] = typing.get_args(typing.get_args(schema.Strategy)[0])
STRATEGIES_BUILT = [build_strategy(variant()) for variant in VARIANTS]  # type: ignore[call-arg, arg-type]
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES_BUILT, ids=[each.__name__ for each in VARIANTS])


def those(fits: Callable[[Strategy], bool]) -> pytest.MarkDecorator:
    """Every strategy that fits."""
    named = [
        pytest.param(strategy, id=variant.__name__)
        for strategy, variant in zip(STRATEGIES_BUILT, VARIANTS, strict=True)
        if fits(strategy)
    ]
    return pytest.mark.parametrize("strategy", named)


summing = those(lambda strategy: strategy.is_linear)
not_summing = those(lambda strategy: not strategy.is_linear)
taking_ranks = those(lambda strategy: strategy.takes_ranks)
RANK = 4
SHAPES = {
    f"base_model.model.{name}": shape
    for name, shape in {
        "layers.0.q_proj.lora_A.weight": (RANK, 6),
        "layers.0.q_proj.lora_B.weight": (7, RANK),
        "layers.1.down_proj.lora_A.weight": (RANK, 5),
        "layers.1.down_proj.lora_B.weight": (8, RANK),
        "layers.1.down_proj.lora_magnitude_vector": (8,),
        "embed_tokens.lora_embedding_A": (RANK, 9),
        "embed_tokens.lora_embedding_B": (5, RANK),
        "score.weight": (2, 5),
    }.items()
}
ZERO_NAMES = {name for name in SHAPES if ".lora_B." in name or "lora_embedding_A" in name}
CORE_NAMES = {f"base_model.model.layers.{module}.lora_core" for module in ("0.q_proj", "1.down_proj")}
CORES = {id(strategy): variant().cores for strategy, variant in zip(STRATEGIES_BUILT, VARIANTS, strict=True)}  # type: ignore[attr-defined]


def shapes_of(strategy: Strategy) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter: with square cores where the strategy trains them, and then without embeddings."""
    heads = CORES[id(strategy)]
    if heads == 0:
        return SHAPES
    found = {name: shape for name, shape in SHAPES.items() if "embedding" not in name}
    for module in ("base_model.model.layers.0.q_proj", "base_model.model.layers.1.down_proj"):
        found[f"{module}.lora_core"] = (heads, RANK // heads, RANK // heads)
        found[f"{module}.lora_core_scale"] = (heads,)
    return found


def names_of(strategy: Strategy) -> frozenset[str]:
    return frozenset(shapes_of(strategy))


def random_tensors(strategy: Strategy, seed: int, names: frozenset[str] | None = None) -> dict[str, torch.Tensor]:
    generator, shapes = torch.Generator().manual_seed(seed), shapes_of(strategy)
    wanted = shapes.keys() if names is None else names
    return {name: torch.randn(shapes[name], generator=generator) for name in sorted(shapes) if name in wanted}


def zeros(strategy: Strategy, names: frozenset[str]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shapes_of(strategy)[name]) for name in names}


def adapter_of(strategy: Strategy) -> NamedTensors:
    """An adapter as it may be in the middle of a run."""
    drawn = random_tensors(strategy, 1)
    ones = {name: torch.ones_like(tensor) for name, tensor in drawn.items() if name.endswith("lora_core_scale")}
    return strategy.initial({**drawn, **ones})


def effect(adapter: NamedTensors) -> dict[str, torch.Tensor]:
    """The dense ΔW of every layer in float64, with what was folded into it, and every tensor that is no factor."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in adapter.items():
        if ".lora_B." in name:
            core = core_of(adapter, name.partition(".lora_B")[0])
            found[name] = tensor.double() @ core @ adapter[name.replace("lora_B", "lora_A")].double()
            found[name] += offset(adapter, name.partition(".lora_B")[0], found[name])
        elif name.endswith("lora_embedding_B"):
            found[name] = tensor.double() @ adapter[name.replace("embedding_B", "embedding_A")].double()
            found[name] += offset(adapter, name.partition(".lora_embedding_B")[0], found[name].T).T
        elif not any(part in name for part in ("lora_A", "lora_offset", "lora_core")) and not name.endswith(
            "lora_embedding_A"
        ):
            found[name] = tensor.double()
    return found


def core_of(adapter: NamedTensors, module: str) -> torch.Tensor:
    core = adapter.get(f"{module}.lora_core")
    if core is None:
        return torch.eye(adapter[f"{module}.lora_A.weight"].shape[0], dtype=torch.float64)
    return torch.block_diag(*(core * adapter[f"{module}.lora_core_scale"][:, None, None]).double())


def offset(adapter: NamedTensors, module: str, like: torch.Tensor) -> torch.Tensor:
    left, right = (adapter.get(f"{module}.lora_offset_{side}") for side in ("left", "right"))
    return torch.zeros_like(like) if left is None or right is None else left.double() @ right.double()


def fresh(strategy: Strategy) -> Aggregator:
    adapter = adapter_of(strategy)
    return strategy.server.aggregator(adapter, strategy.server.init(adapter))


def contribution(strategy: Strategy, update: NamedTensors, weight: float) -> Contribution:
    adapter = adapter_of(strategy)
    names = strategy.downloaded(names_of(strategy), 1)
    start = strategy.server.download(adapter, strategy.server.init(adapter), names, None)
    return Contribution(update, weight, start)


def combined(strategy: Strategy, updates: list[NamedTensors], weights: list[float]) -> NamedTensors:
    aggregator = fresh(strategy)
    for update, weight in zip(updates, weights, strict=True):
        aggregator.accumulate(contribution(strategy, update, weight))
    return aggregator.result()


def length(tensors: NamedTensors) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def clipped(update: NamedTensors, clip_norm: float) -> NamedTensors:
    factor = min(1.0, clip_norm / length(update))
    return {name: tensor * factor for name, tensor in update.items()}


def stepped(strategy: Strategy, update: NamedTensors) -> NamedTensors:
    adapter = adapter_of(strategy)
    return strategy.server.step(adapter, update, strategy.server.init(adapter))[0]


def assert_near(left: NamedTensors, right: NamedTensors, tolerance: float = 1e-6) -> None:
    assert left.keys() == right.keys()
    for name in right:
        torch.testing.assert_close(left[name], right[name], rtol=tolerance, atol=tolerance)


def assert_same_effect(left: NamedTensors, right: NamedTensors) -> None:
    assert_near(effect(left), effect(right), tolerance=1e-5)
