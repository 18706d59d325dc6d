"""Models whose code around a layer breaks its rule, made of real ones: found before a round, on made-up examples."""

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from client.dry_run import way_of_gradients
from client.trials import examples_for
from conf.schema.privacy import ExampleLevel
from conf.schema.site import SiteRuntime
from finetuning.tasks.build import build_objective
from privacy.per_example.recorder import ONE_BY_ONE
from protocol.errors import ModelError, PrivacyError

Make = Callable[..., Any]
LENGTHS = (5, 17, 2, 11)
MLP = "base_model.model.model.layers.0.mlp"


class Around(nn.Module):
    """Stands where a block's feed-forward network stood, and does something around it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


class Flattening(Around):
    """One row per position of any example, as routed layers see it, under a name that tells nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.flatten(0, 1)).view_as(x)


class Reordering(Around):
    """As many rows as examples, but each is another example's: no shape gives it away."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.flip(0)).flip(0)


class Mixing(Around):
    """Every example sees the mean of its batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        return y - 0.1 * y[:, 0].mean(dim=0)


class Remembering(Around):
    """A running mean of what was seen, as a batch norm keeps it, of which the output depends."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.register_buffer("seen", torch.zeros(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.seen.mul_(0.9).add_(x.mean(dim=(0, 1)), alpha=0.1)
        return self.inner(x) + self.seen


class Hoarding(Around):
    """The same, in no buffer."""

    last: torch.Tensor | float = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x) + self.last
        self.last = x.detach().mean()
        return y


class Shaking(Around):
    """Noise of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x * (1 + 0.3 * torch.rand_like(x)))


class Padded(Around):
    """What an example gives depends on how far it was padded."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * x.shape[1]


class Dropping(Around):
    """Dropout as a function, as attention calls it."""

    hidden_dropout_prob = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(self.inner(x), self.hidden_dropout_prob, self.training)


@contextmanager
def around(made: Any, kind: type[Around]) -> Generator[None]:
    network = made.adapted.network
    inner = network.get_submodule(MLP)
    made.adapted.checked.clear()
    network.set_submodule(MLP, kind(inner))
    try:
        yield
    finally:
        network.set_submodule(MLP, inner)
        made.adapted.checked.clear()


def way_of(made: Any, way: str = "native", without_rule: str = "one_by_one", **runtime: bool) -> str:
    asked = ExampleLevel.model_validate(
        {"noise_multiplier": 1.0, "per_example_gradients": way, "without_rule": without_rule}
    )
    plan, objective = made.plan, build_objective(made.bench.task)
    classes = 3 if made.bench.task.kind == "classification" else None
    return way_of_gradients(plan, asked, made.adapted, made.trained, objective, SiteRuntime(**runtime), classes)


class Made:
    """A bench and a plan."""

    def __init__(self, bench: Any, plan: Any) -> None:
        self.bench, self.plan = bench, plan
        self.adapted, self.trained = bench.adapted, bench.trained
        self.adapted.checked.clear()


@pytest.fixture
def made(bench: Make, make_plan: Make) -> Callable[..., Made]:
    return lambda *arguments, **options: Made(bench(*arguments, **options), make_plan(1.0, 1.0))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "phi", "gpt2", "bert", "roberta"])
@pytest.mark.parametrize("option", [{}, {"dora": True, "dropout": 0.3}, {"dtype": "bf16"}])
def test_what_has_rules_is_found_exact(
    family: str, option: dict[str, Any], made: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Also with dropout, whose masks would differ, and on a 16-bit base, which rounds."""
    with caplog.at_level(logging.WARNING):
        assert way_of(made(family, **option)) == "native"
    assert "one by one" not in caplog.text


@pytest.mark.parametrize("way", ["native", "opacus"])
@pytest.mark.parametrize("kind", [Flattening, Reordering])
def test_a_layer_that_rearranges_its_batch_is_trained_one_by_one(
    kind: type[Around], way: str, made: Make, make_examples: Make, error_of: Make, caplog: pytest.LogCaptureFixture
) -> None:
    here = made("llama")
    examples = make_examples(LENGTHS)
    with around(here, kind):
        with caplog.at_level(logging.WARNING):
            assert way_of(here, way) == "one_by_one"
        (warning,) = [record.getMessage() for record in caplog.records]
        assert warning.startswith(f"a dry run of privacy.per_example_gradients={way} ")
        assert "layers.0.mlp." in warning
        assert warning.endswith("; every layer is trained one by one instead: exact, and slower on a GPU")
        truth = here.bench.one_at_a_time(examples, 0.05)
        assert error_of(here.bench.batched(examples, 0.05, "one_by_one"), truth) < 1e-5
        with pytest.raises(PrivacyError, match=rf"^a dry run of .*={way} .*layers\.0\.mlp\..*; set privacy\.per_exam"):
            way_of(here, way, "refuse")


def test_rows_of_other_examples_would_have_passed_unseen(made: Make, make_examples: Make, error_of: Make) -> None:
    """Why numbers are compared: the engine alone has nothing to complain of."""
    here = made("llama")
    examples = make_examples((5, 9, 2, 11))  # padded alike, so that they meet
    with around(here, Reordering):
        truth = here.bench.one_at_a_time(examples, 0.05)
        ours = here.bench.batched(examples, 0.05, "native", alike=lambda shape: True)
        assert error_of(ours, truth) > 0.1
        # The check of rows sees it too: these train alone.
        assert error_of(here.bench.batched(examples, 0.05, "native"), truth) < 1e-5


@pytest.mark.parametrize("way", ["native", "opacus"])
def test_examples_that_interact_are_refused_in_batches(way: str, made: Make) -> None:
    here = made("llama")
    with around(here, Mixing):
        with pytest.raises(
            PrivacyError,
            match=r"^an example's gradient depends on what it is batched with \(a dry run saw it in \S+\), so one "
            r"record's influence has no bound; use a model that treats examples apart, or set privacy\.per_example_",
        ):
            way_of(here, way)
        assert way_of(here, "one_by_one") == "one_by_one"


@pytest.mark.parametrize("way", ["native", "opacus"])
def test_a_network_that_padding_changes_is_trained_unpadded(way: str, made: Make) -> None:
    """Each record's padding is its own, so its influence is bounded; but it is not the gradient that was meant."""
    here = made("llama")
    with around(here, Padded):
        assert way_of(here, way) == "one_by_one"
        with pytest.raises(PrivacyError, match=r"static shapes pad .*; set runtime\.static_shapes=false"):
            way_of(here, way, static_shapes=True)


def test_static_shapes_must_not_show(made: Make) -> None:
    here = made("llama")
    assert way_of(here, "one_by_one", static_shapes=True) == "one_by_one"
    with (
        around(here, Padded),
        pytest.raises(PrivacyError, match=r"depends on its padding \(.*\), and static shapes .*; set runtime\.static_"),
    ):
        way_of(here, "one_by_one", static_shapes=True)


@pytest.mark.parametrize("way", ["native", "opacus", "one_by_one"])
@pytest.mark.parametrize(("kind", "what"), [(Remembering, rf"{MLP}\.seen"), (Hoarding, r"\S+weight")])
def test_a_network_that_remembers_is_refused_in_every_way(kind: type[Around], what: str, way: str, made: Make) -> None:
    here = made("llama")
    with around(here, kind):
        with pytest.raises(
            PrivacyError,
            match=rf"^(an example's gradient depends|the network remembers .* changed {what}, so one record's inf)",
        ):
            way_of(here, way)
        if kind is Remembering:
            assert not here.adapted.network.get_submodule(MLP).seen.any(), "its buffer was not put back"


def test_random_numbers_that_cannot_be_switched_off(made: Make, caplog: pytest.LogCaptureFixture) -> None:
    here = made("llama")
    with around(here, Shaking), caplog.at_level(logging.WARNING):
        assert way_of(here) == "one_by_one"
    assert "; the network draws random numbers, so it cannot be compared; every layer is" in caplog.text


def test_dropout_in_any_form_is_switched_off(made: Make) -> None:
    here = made("llama", dropout=0.4)
    with around(here, Dropping):
        layer = here.adapted.network.get_submodule(MLP)
        layer.hidden_dropout_prob = 0.5
        assert way_of(here) == "native"
        assert layer.hidden_dropout_prob == 0.5


def test_a_network_that_fails_on_any_tokens(made: Make) -> None:
    class Failing(Around):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no such operator\nand more")

    here = made("llama")
    with (
        around(here, Failing),
        pytest.raises(ModelError, match=r"^the network fails on a few made-up tokens: no such operator$"),
    ):
        way_of(here)


@pytest.mark.parametrize("way", ["native", "opacus", "one_by_one"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_nothing_is_left_behind(way: str, checkpointing: bool, made: Make) -> None:
    here = made("gpt2", dropout=0.1)
    network = here.adapted.network.eval()
    network.base_model.model.transformer.h[0].train()
    some = next(iter(here.trained.values()))
    some.grad = torch.full_like(some, 3.0)
    before = state_of(network)
    way_of(here, way, gradient_checkpointing=checkpointing)
    after = state_of(network)
    some.grad = None
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name]
        assert same, f"{name}: {value} became {after[name]}"


def state_of(network: nn.Module) -> dict[str, Any]:
    held: dict[str, Any] = {f"tensor {name}": each.clone() for name, each in network.state_dict().items()}
    held |= {f"buffer {name}": each.clone() for name, each in network.named_buffers()}
    held |= {f"gradient {n}": None if p.grad is None else p.grad.clone() for n, p in network.named_parameters()}
    held |= {f"trains {n}": p.requires_grad for n, p in network.named_parameters()}
    ignored = {
        "_is_full_backward_hook",
        "_require_grads_hooks",
        "gradient_checkpointing",
        "_gradient_checkpointing_func",
    }
    held |= {f"module {n}": (m.training, set(vars(m)) - ignored) for n, m in network.named_modules()}
    held |= {
        f"hooks {n}": (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
        for n, m in network.named_modules()
    }
    return held | {"random": torch.get_rng_state()}


def test_it_runs_once_per_adapter_and_way(made: Make) -> None:
    here, seen = made("llama"), list[int]()
    counted = here.adapted.network.register_forward_hook(lambda *_: seen.append(1))
    try:
        way_of(here)
        passes = len(seen)
        assert passes > 10
        way_of(here)
        assert len(seen) == passes
        way_of(here, gradient_checkpointing=True)
        assert len(seen) == 2 * passes
    finally:
        counted.remove()


def test_made_up_examples_are_ordinary_ones(made: Make) -> None:
    here = made("bert")
    examples = examples_for(here.adapted, 3, (9, 6, 4))
    assert len({len(example) for example in examples}) == 3
    assert [example.label for example in examples] == [0, 1, 2]
    # What frames a text to be classified is there, as in a record; else no special token.
    tokenizer = here.adapted.base.tokenizer
    assert {tuple(example.input_ids[[0, -1]]) for example in examples} == {
        (tokenizer.cls_token_id, tokenizer.sep_token_id)
    }
    tokens = {int(token) for example in examples for token in example.input_ids[1:-1]}
    assert not tokens & {*here.adapted.base.tokenizer.all_special_ids, here.adapted.base.pad_token_id}
    assert max(tokens) < here.adapted.base.network.config.vocab_size


def test_gradient_checkpointing_under_opacus_falls_back(made: Make, caplog: pytest.LogCaptureFixture) -> None:
    here = made("llama")
    with caplog.at_level(logging.WARNING):
        assert way_of(here, "opacus", gradient_checkpointing=True) == "one_by_one"
    assert "a dry run of privacy.per_example_gradients=opacus failed (" in caplog.text
    assert "left no gradient per example (3 examples)); every layer is trained one by one" in caplog.text
    assert ONE_BY_ONE not in caplog.text
    with pytest.raises(PrivacyError, match=r"per_example_gradients=opacus failed \(.*; set privacy\.per_example"):
        way_of(here, "opacus", "refuse", gradient_checkpointing=True)
