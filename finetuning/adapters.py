"""The adapter: LoRA factors (and a classification head) on a shared frozen base, as named tensors in and out.

One network per process carries one set of adapter parameters. A site's adapter is *loaded into* it before training
and *copied out* after it, so sixty-four simulated sites need the memory of one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from conf.schema.model import LoRA
from conf.schema.task import Task
from finetuning.cores import Cores, check_cores, put_cores, renamed, reset_cores
from finetuning.models import FrozenBase
from finetuning.offsets import FrozenOffsets
from finetuning.targets import chosen_layers, trained_whole
from protocol.errors import ModelError
from protocol.offsets import is_offset
from protocol.tensors import NamedTensors, corner

__all__ = ["AdaptedModel", "attach"]

_log = logging.getLogger(__name__)
_ADAPTER = "default"
_MAGNITUDE = "lora_magnitude_vector"
_ATTACHED = "cloister_adapters"
"""Attribute of a base network that holds its adapters, so that all are freed together."""
_Key = tuple[LoRA, int, int]
"""Configuration, cores, rank of the plan."""


@dataclass(frozen=True, eq=False)
class AdaptedModel:
    """A base with adapter parameters attached. `parameters` maps PEFT state-dict names to them, in a fixed order."""

    base: FrozenBase
    network: PeftModel
    parameters: Mapping[str, nn.Parameter]
    magnitudes: Mapping[str, torch.Tensor]
    """DoRA's initial magnitudes, the column norms of the base weights: PEFT's reset leaves trained ones in place."""
    config: LoRA
    modules: Mapping[str, nn.Module]
    """What stands in the base network where adapted layers were, by their names there."""
    offsets: FrozenOffsets
    checked: dict[Hashable, str | None] = field(default_factory=lambda: dict[Hashable, str | None]())
    """What dry runs of this network found, for as long as the adapter is attached."""

    @property
    def names(self) -> frozenset[str]:
        """The adapter's tensor names."""
        return frozenset(self.parameters)

    def mount(self) -> None:
        """Put this adapter's layers into the base network, which several adapters of different ranks may share."""
        attached: dict[_Key, AdaptedModel] = getattr(self.base.network, _ATTACHED)
        for other in attached.values():
            if other is not self:
                other.unmount()
        for name, module in self.modules.items():
            self.base.network.set_submodule(name, module)

    def unmount(self) -> None:
        """Put the base's own layers back where this adapter's stand."""
        for name, module in self.modules.items():
            if self.base.network.get_submodule(name) is module:
                self.base.network.set_submodule(name, _original(module))

    def initial(self, seed: int, rank: int | None = None) -> dict[str, torch.Tensor]:
        """Return the adapter that every site starts from: PEFT's own initialization, drawn from `seed`.

        B is zero, so the first function is the base's own. The network's current values are overwritten. With `rank`,
        at least this adapter's own, the factors are cut from those that are drawn at that rank.
        """
        self.mount()
        self.offsets.clear()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for module in self.network.modules():
                if isinstance(module, LoraLayer):
                    _reset_on_cpu(module, rank or self.config.rank)
                elif isinstance(module, ModulesToSaveWrapper):
                    module.modules_to_save[_ADAPTER].load_state_dict(module.original_module.state_dict())
            for name, magnitude in self.magnitudes.items():
                self.parameters[name].copy_(magnitude)
        return self.extract()

    def load(self, tensors: NamedTensors) -> None:
        """Copy an adapter into the network, and apply the offsets that came with it.

        Raises:
            ModelError: when names or shapes differ from this network's.
        """
        own = {name: tensor for name, tensor in tensors.items() if not is_offset(name)}
        if own.keys() != self.parameters.keys():
            odd = sorted(own.keys() ^ self.parameters.keys())
            raise ModelError(f"the adapter does not fit this model: {len(odd)} tensor name(s) differ, first {odd[0]}")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if tensors[name].shape != parameter.shape:
                    raise ModelError(
                        f"the adapter does not fit this model: {name} has shape {tuple(tensors[name].shape)}, "
                        f"the model needs {tuple(parameter.shape)}"
                    )
                parameter.copy_(tensors[name])
                parameter.grad = None
        self.mount()
        self.offsets.load({name: tensor for name, tensor in tensors.items() if is_offset(name)})

    def extract(self) -> dict[str, torch.Tensor]:
        """Return a copy of the adapter as float32 CPU tensors."""
        # `.to` alone may return the parameter's own storage, which the next site would overwrite.
        return {name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in self.parameters.items()}

    def train_only(self, names: frozenset[str]) -> dict[str, nn.Parameter]:
        """Let exactly `names` take gradients, and return their parameters in a fixed order."""
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in names)
        return {name: parameter for name, parameter in self.parameters.items() if name in names}


def attach(base: FrozenBase, config: LoRA, task: Task, cores: int = 0, plan_rank: int | None = None) -> AdaptedModel:
    """Return the base with an adapter attached; a second call with the same configuration returns the same object.

    A base keeps adapters that differ in nothing but their rank, one of them mounted: simulated sites of different ranks
    and the server take turns.

    Args:
        base: shared by all that train on it.
        config: the adapter's.
        task: decides on a head.
        cores: square cores between the factors of every layer; 0: none.
        plan_rank: that of the whole plan, where this is a cut of its adapter: both are on the same layers.

    Raises:
        ModelError: an unknown or unsuitable target module, one that the task never runs, or a rank above a target
            layer's size.
    """
    attached: dict[_Key, AdaptedModel] = getattr(base.network, _ATTACHED, {})
    for other in attached.values():
        other.unmount()
    base.network.__dict__.pop("peft_config", None)
    key = (config, cores, config.rank if plan_rank is None else plan_rank)
    if key in attached:
        attached[key].mount()
        return attached[key]
    kept = _but_for_rank(config)
    attached = {each: other for each, other in attached.items() if _but_for_rank(other.config) == kept}
    chosen = _peft_config(base, config, task, cores, plan_rank)
    try:
        network = get_peft_model(base.network, chosen, adapter_name=_ADAPTER)
    except ValueError as error:
        raise ModelError(f"PEFT cannot put LoRA on {type(base.network).__name__}: {error}") from error
    _keep_head_in_float32(network)
    if cores:
        put_cores(base.network, cores)
    parameters = _named_parameters(network)
    magnitudes = {name: each.detach().clone() for name, each in parameters.items() if _MAGNITUDE in name}
    modules: dict[str, Any] = {
        name: module
        for name, module in base.network.named_modules()
        if isinstance(module, LoraLayer | ModulesToSaveWrapper)
    }
    offsets = FrozenOffsets({f"base_model.model.{n}": m for n, m in modules.items() if isinstance(m, LoraLayer)})
    adapted = AdaptedModel(base, network, parameters, magnitudes, config, modules, offsets)
    attached[key] = adapted
    setattr(base.network, _ATTACHED, attached)
    _log.info(
        "adapter: %d tensors, %d values", len(adapted.parameters), sum(p.numel() for p in adapted.parameters.values())
    )
    return adapted


def _but_for_rank(config: LoRA) -> LoRA:
    return config.model_copy(update={"rank": 1, "alpha": 1.0})


def _original(module: nn.Module) -> nn.Module:
    """Return what stood in the base where an adapter's module stands."""
    return module.original_module if isinstance(module, ModulesToSaveWrapper) else module.get_base_layer()  # type: ignore[operator]


def _peft_config(base: FrozenBase, config: LoRA, task: Task, cores: int, plan_rank: int | None) -> LoraConfig:
    classifies = task.kind == "classification"
    whole = trained_whole(base) if classifies else ()
    names = chosen_layers(base, config, whole, config.rank if plan_rank is None else plan_rank)
    modules = dict(base.network.named_modules())
    if cores:
        for name in names:
            check_cores(name, modules[name], config.rank, cores)
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType] - a float works; PEFT only divides by it
        lora_dropout=config.dropout,
        # PEFT's own word for "no layer": without it an adapter has to have some.
        target_modules=_short_names(names, modules) or DUMMY_TARGET_MODULES,
        use_rslora=config.rslora,
        use_dora=config.dora,
        fan_in_fan_out=any(isinstance(modules[name], Conv1D) for name in names),
        task_type=TaskType.SEQ_CLS if classifies else TaskType.CAUSAL_LM,
        modules_to_save=list(whole) or None,
    )


def _short_names(targets: Sequence[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the endings that select exactly `targets`, for a readable adapter_config.json; else the full names."""
    endings = sorted({name.rsplit(".", 1)[-1] for name in targets})
    selected = [name for name in modules if name.rsplit(".", 1)[-1] in endings]
    return endings if sorted(selected) == sorted(targets) else list(targets)


def _keep_head_in_float32(network: PeftModel) -> None:
    """A trained head is noised and averaged like the LoRA factors, so it needs their precision on a 16-bit base."""
    for module in network.modules():
        if isinstance(module, ModulesToSaveWrapper):
            head = module.modules_to_save[_ADAPTER].float()
            head.register_forward_pre_hook(lambda _, args: tuple(value.float() for value in args))


def _named_parameters(network: PeftModel) -> dict[str, nn.Parameter]:
    """Map PEFT's state-dict names to the parameters behind them. Both share storage, which is what identifies them."""
    by_storage = {parameter.data_ptr(): parameter for parameter in network.parameters()}
    state = get_peft_model_state_dict(network, adapter_name=_ADAPTER, save_embedding_layers=False)
    named = {renamed(name): by_storage[tensor.data_ptr()] for name, tensor in state.items()}
    return dict(sorted(named.items()))


def _reset_on_cpu(module: LoraLayer, rank: int) -> None:
    """Initialize as PEFT does, drawn at `rank` by the CPU's generator: a GPU's draws other numbers from the same seed.

    PEFT draws A of a linear layer by Kaiming's rule (a = √5) and B of an embedding from N(0, 1); the others are zero.
    """
    layer: Any = module
    if _ADAPTER in layer.lora_B and isinstance(layer.lora_B[_ADAPTER], Cores):
        values = nn.init.kaiming_uniform_(torch.empty(rank, layer.lora_A[_ADAPTER].weight.shape[1]), a=math.sqrt(5))
        layer.lora_A[_ADAPTER].weight.copy_(corner(values, layer.lora_A[_ADAPTER].weight.shape))
        reset_cores(layer.lora_B[_ADAPTER], rank)
        return
    if _ADAPTER in layer.lora_A:
        drawn, zero = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
        values = nn.init.kaiming_uniform_(torch.empty(rank, drawn.shape[1]), a=math.sqrt(5))
    else:
        drawn, zero = layer.lora_embedding_B[_ADAPTER], layer.lora_embedding_A[_ADAPTER]
        values = nn.init.normal_(torch.empty(drawn.shape[0], rank))
    drawn.copy_(corner(values, drawn.shape))
    zero.zero_()
