"""Which layers have a rule, which could ever pair a row with the wrong example, and the exchange of their forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import nn

from privacy.per_example.cores import cores_rule
from privacy.per_example.dora import dora_rule
from privacy.per_example.embedding import embedding_rule, lora_embedding_rule
from privacy.per_example.linear import linear_rule, row_by_row
from privacy.per_example.recorder import Forward, Recorder
from privacy.per_example.scale import norm_rule

__all__ = ["IndependentRows", "PatchedForwards", "couples_examples", "layers_without_native_rule"]

_RULES: tuple[Callable[[nn.Module, Recorder], Forward | None], ...] = (
    linear_rule,
    norm_rule,
    embedding_rule,
    lora_embedding_rule,
    dora_rule,
    cores_rule,
)
_OF_EMBEDDINGS = (embedding_rule, lora_embedding_rule)
_POSITIONS = ("position", "pos_emb", "wpe")
"""Parts of the names that models give to embeddings of positions (GPT-2 `wpe`, BERT `position_embeddings`, ...)."""
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class _ExchangedForwards:
    """Forwards set on module objects, beside those of their classes, so that `close` only has to delete them."""

    def __init__(self) -> None:
        self._modules: list[nn.Module] = []

    def _exchange(self, module: nn.Module, forward: Forward) -> None:
        module.forward = forward
        self._modules.append(module)

    def close(self) -> None:
        """Put every module's own forward back."""
        for module in self._modules:
            del module.forward
        self._modules = []


class IndependentRows(_ExchangedForwards):
    """Frozen linear layers multiply inputs of two dimensions row by row, so that no row's rounding knows the others."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        for module in network.modules():
            # A forward set by somebody else does more than the class says: it stays.
            if "forward" not in vars(module) and (forward := row_by_row(module)) is not None:
                self._exchange(module, forward)


class PatchedForwards(_ExchangedForwards):
    """The exchanged forwards of all layers that hold a trained parameter; every layer must have a rule."""

    def __init__(self, network: nn.Module, trained: Mapping[str, nn.Parameter], recorder: Recorder) -> None:
        super().__init__()
        tokens = _token_embedding(network)
        for name, module in _layers(network, trained):
            forward = _rule_for(name, module, recorder, tokens)
            if forward is None:
                self.close()
                raise ValueError(f"{name} ({type(module).__name__}) has no per-example gradient rule")
            self._exchange(module, forward)


def layers_without_native_rule(network: nn.Module, trained: Mapping[str, nn.Parameter]) -> list[str]:
    """Return `name (type)` of every layer that holds a trained parameter and has no rule."""
    recorder, tokens = Recorder(trained), _token_embedding(network)
    return [
        f"{name} ({type(module).__name__})"
        for name, module in _layers(network, trained)
        if _rule_for(name, module, recorder, tokens) is None
    ]


def couples_examples(network: nn.Module) -> list[str]:
    """Return `name (type)` of every batch norm, trained or frozen: it mixes the examples of a batch.

    No rule can undo that: the gradient of one example's loss would depend on the others, and no clip bounds it.
    """
    return [
        f"{name} ({type(module).__name__})"
        for name, module in network.named_modules()
        if isinstance(module, _BATCH_NORMS)
    ]


def _layers(network: nn.Module, trained: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, nn.Module]]:
    """Yield each layer that computes with a trained parameter: the holder, or for a dictionary of them its parent."""
    wanted = {id(parameter) for parameter in trained.values()}
    seen: set[int] = set()
    for name, module in network.named_modules():
        if not any(id(parameter) in wanted for parameter in module.parameters(recurse=False)):
            continue
        if isinstance(module, nn.ParameterDict | nn.ParameterList):
            name = name.rpartition(".")[0]
            module = network.get_submodule(name)
        if id(module) not in seen:
            seen.add(id(module))
            yield name, module


def _token_embedding(network: nn.Module) -> nn.Module | None:
    """Return what looks up the examples' own tokens; None for a network that does not say."""
    get = getattr(network, "get_input_embeddings", None)
    found = get() if callable(get) else None
    return found if isinstance(found, nn.Module) else None


def _rule_for(name: str, module: nn.Module, recorder: Recorder, tokens: nn.Module | None) -> Forward | None:
    # Rows of a routed expert are tokens picked from many examples; a few of them may look like a batch. A forward set
    # by somebody else (offloading) does more than the class says.
    if "expert" in name or "forward" in vars(module):
        return None
    # What is looked up with anything but an example's tokens (positions, distances between them) is looked up once for
    # the whole batch, so a row is no example's own, however many rows there are.
    held = {id(each) for each in module.parameters()}
    own = tokens is None or any(id(each) in held for each in tokens.parameters())
    if any(part in name.lower() for part in _POSITIONS):
        own = False
    rules = [rule for rule in _RULES if own or rule not in _OF_EMBEDDINGS]
    return next((forward for rule in rules if (forward := rule(module, recorder)) is not None), None)
