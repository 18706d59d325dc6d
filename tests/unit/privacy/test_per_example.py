"""Every rule against autograd on one example, and every way a per-example gradient could go wrong unnoticed."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from privacy.per_example import PatchedForwards, Recorder, layers_without_native_rule
from protocol.errors import PrivacyError

EXAMPLES, LENGTH, WIDTH = 5, 7, 6


class Reused(nn.Module):
    """One linear layer used twice, then once more through a tied embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH, padding_idx=2)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.inner(torch.tanh(self.inner(self.embed(ids)))))


class PerHead(nn.Module):
    """An RMS norm over heads, as Qwen3 has: the input has four dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = LlamaRMSNorm(WIDTH // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.unflatten(-1, (2, -1))).flatten(-2)


def tokens(generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 11, (EXAMPLES, LENGTH), generator=generator)


def activations(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(EXAMPLES, LENGTH, WIDTH, generator=generator)


def pooled(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(EXAMPLES, WIDTH, generator=generator)


def four_dimensions(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(EXAMPLES, 2, LENGTH, WIDTH, generator=generator)


NETWORKS: list[tuple[Callable[[], nn.Module], Callable[[torch.Generator], torch.Tensor]]] = [
    (lambda: nn.Linear(WIDTH, 4), activations),
    (lambda: nn.Linear(WIDTH, 4, bias=False), four_dimensions),
    (lambda: nn.Sequential(nn.Linear(WIDTH, 4), nn.Tanh(), nn.Linear(4, 3)), pooled),
    (lambda: Conv1D(4, WIDTH), activations),
    (lambda: nn.LayerNorm(WIDTH), activations),
    (lambda: nn.LayerNorm(WIDTH, bias=False), pooled),
    (lambda: nn.RMSNorm(WIDTH), activations),
    (lambda: LlamaRMSNorm(WIDTH), activations),
    (lambda: GemmaRMSNorm(WIDTH), four_dimensions),
    (PerHead, activations),
    (lambda: nn.Embedding(11, WIDTH, padding_idx=2), tokens),
    (Reused, tokens),
]


def losses_of(network: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Return a loss per example that treats no position and no feature alike."""
    outputs = network(inputs).flatten(1)
    return (outputs * torch.linspace(-1, 2, outputs.shape[1])).sin().sum(1)


def recorded(network: nn.Module, trained: dict[str, nn.Parameter], inputs: torch.Tensor) -> list[torch.Tensor]:
    recorder = Recorder(trained)
    patched = PatchedForwards(network, trained, recorder)
    try:
        return recorder.backward(losses_of(network, inputs))
    finally:
        patched.close()


@pytest.mark.parametrize("case", range(len(NETWORKS)))
def test_a_rule_equals_autograd_on_one_example(case: int) -> None:
    generator = torch.Generator().manual_seed(case)
    make, make_inputs = NETWORKS[case]
    network, inputs = make(), make_inputs(generator)
    trained = dict(network.named_parameters())
    with torch.no_grad():
        for parameter in trained.values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    assert layers_without_native_rule(network, trained) == []
    rows = recorded(network, trained, inputs)
    assert all(parameter.grad is None for parameter in trained.values())
    for index in range(EXAMPLES):
        own = torch.autograd.grad(losses_of(network, inputs[index : index + 1])[0], list(trained.values()))
        for name, ours, theirs in zip(trained, rows, own, strict=True):
            assert theirs.norm() > 0
            torch.testing.assert_close(ours[index], theirs, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_forward_deposits_once(reentrant: bool) -> None:
    network = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3))
    trained = dict(network.named_parameters())
    # Reentrant checkpoints need an input that takes a gradient.
    inputs = activations(torch.Generator().manual_seed(1)).requires_grad_(reentrant)
    plain = recorded(network, trained, inputs)
    recorder = Recorder(trained)
    patched = PatchedForwards(network, trained, recorder)
    losses = losses_of(lambda x: checkpoint(network, x, use_reentrant=reentrant), inputs)  # type: ignore[arg-type]
    for ours, theirs in zip(recorder.backward(losses), plain, strict=True):
        torch.testing.assert_close(ours, theirs)
    patched.close()


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_only_what_trains_is_recorded(frozen: str) -> None:
    network = nn.Linear(WIDTH, 4)
    trained = {name: each for name, each in network.named_parameters() if name != frozen}
    getattr(network, frozen).requires_grad_(False)
    (rows,) = recorded(network, trained, activations(torch.Generator().manual_seed(2)))
    assert rows.shape == (EXAMPLES, *trained.popitem()[1].shape)


def test_reuse_in_sixteen_bits_is_summed_in_thirty_two() -> None:
    """256 + 1 is 256 in bfloat16."""
    network = nn.Linear(1, 1, bias=False).bfloat16()
    recorder = Recorder({"weight": network.weight})
    patched = PatchedForwards(network, {"weight": network.weight}, recorder)
    large, small = torch.full((1, 1), 256.0).bfloat16(), torch.ones(1, 1).bfloat16()
    assert recorder.backward((network(large) + network(small))[:, 0])[0].item() == 257.0
    patched.close()


@pytest.fixture
def linear() -> tuple[nn.Linear, Recorder]:
    network = nn.Linear(WIDTH, 1, bias=False)
    recorder = Recorder({"weight": network.weight})
    PatchedForwards(network, {"weight": network.weight}, recorder)
    return network, recorder


def test_a_second_backward_on_one_graph_is_refused(linear: tuple[nn.Linear, Recorder]) -> None:
    network, recorder = linear
    losses = network(torch.ones(3, WIDTH))[:, 0]
    recorder.backward(losses)
    with pytest.raises(PrivacyError, match=r"a second backward pass through the same graph would count every example"):
        recorder.backward(losses)


def test_a_backward_beside_the_rule_is_refused(linear: tuple[nn.Linear, Recorder]) -> None:
    network, _ = linear
    with pytest.raises(PrivacyError, match=r"weight met a backward pass that is not the gradient rule's own.*accumul"):
        network(torch.ones(3, WIDTH)).sum().backward()


def test_rows_that_are_no_examples_are_refused(linear: tuple[nn.Linear, Recorder]) -> None:
    """A position embedding sees one row for all examples; a mixture of experts sees tokens."""
    network, recorder = linear
    with pytest.raises(PrivacyError, match=r"weight belongs to a layer whose input has 1 rows for 3 examples.*one_by_"):
        recorder.backward(network(torch.ones(1, WIDTH)).expand(3, 1)[:, 0])


def test_a_parameter_that_took_no_part_is_named() -> None:
    """Without this its gradient would be taken for zero, while ε is spent on it."""
    network = nn.ModuleDict({"used": nn.Linear(2, 1, bias=False), "idle": nn.Linear(2, 1, bias=False)})
    trained = dict(network.named_parameters())
    recorder = Recorder(trained)
    PatchedForwards(network, trained, recorder)
    with pytest.raises(PrivacyError, match=r"idle\.weight left no gradient per example \(3 examples\); set privacy\.p"):
        recorder.backward(network["used"](torch.ones(3, 2))[:, 0])


def test_a_parameter_used_beside_its_layer_is_named(linear: tuple[nn.Linear, Recorder]) -> None:
    """Its gradient from there is a sum over examples, which nothing could clip."""
    network, recorder = linear
    with pytest.raises(PrivacyError, match=r"weight took part of its gradient outside of its layer's forward; set"):
        recorder.backward(network(torch.ones(3, WIDTH))[:, 0] + network.weight.sum())


def test_a_stale_gradient_is_not_taken_for_one(linear: tuple[nn.Linear, Recorder]) -> None:
    network, recorder = linear
    network.weight.grad = torch.full_like(network.weight, 9.0)
    assert torch.equal(recorder.backward(network(torch.ones(3, WIDTH))[:, 0])[0], torch.ones(3, 1, WIDTH))


class Offloaded(nn.Linear):
    """A subclass may compute anything."""


def test_what_no_rule_is_known_for_is_named() -> None:
    hooked = nn.Linear(2, 2)
    hooked.forward = hooked.forward  # type: ignore[method-assign] - as offloading libraries do
    network = nn.ModuleDict(
        {
            "mine": Offloaded(2, 2),
            "hooked": hooked,
            "experts": nn.ModuleList([nn.Linear(2, 2)]),
            "plane": nn.LayerNorm((2, 2)),
            "plane_rms": nn.RMSNorm((2, 2)),
            "renormed": nn.Embedding(3, 2, max_norm=1.0),
            "conv": nn.Conv1d(2, 2, 1),
            "raw": nn.ParameterDict({"a": nn.Parameter(torch.ones(1))}),
            "known": nn.Linear(2, 2),
        }
    )
    missing = layers_without_native_rule(network, dict(network.named_parameters()))
    assert missing == [
        "mine (Offloaded)",
        "hooked (Linear)",
        "experts.0 (Linear)",
        "plane (LayerNorm)",
        "plane_rms (RMSNorm)",
        "renormed (Embedding)",
        "conv (Conv1d)",
        " (ModuleDict)",
    ]
    with pytest.raises(ValueError, match=r"^mine \(Offloaded\) has no per-example gradient rule$"):
        PatchedForwards(network, dict(network.named_parameters()), Recorder(dict(network.named_parameters())))
    assert "forward" not in vars(network["known"]), "a refusal leaves no forward behind"


def test_every_forward_is_put_back() -> None:
    network = Reused()
    before = {name: vars(module).copy() for name, module in network.named_modules()}
    recorded(network, dict(network.named_parameters()), tokens(torch.Generator()))
    assert all("forward" not in vars(module) for module in network.modules())
    assert {name: vars(module).keys() for name, module in network.named_modules()} == {
        name: held.keys() for name, held in before.items()
    }
