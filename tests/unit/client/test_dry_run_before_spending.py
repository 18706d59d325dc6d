"""Whole rounds on models that break a rule: what is refused books nothing, and recomputing changes no update."""

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

import client.training
from client.rounds import answer
from finetuning.adapters import attach
from finetuning.models import load_base
from protocol.errors import ModelError, PrivacyError
from protocol.instructions import client_plan

Make = Callable[..., Any]
MLP = "base_model.model.model.layers.0.mlp"


@contextmanager
def wrapped(experiment: Any, mixes: bool) -> Generator[None]:
    adapted = attach(load_base(experiment.model, experiment.task, "cpu"), experiment.peft, experiment.task)
    inner = adapted.network.get_submodule(MLP)
    plain = inner.forward

    def flattening(x: torch.Tensor) -> torch.Tensor:
        y = plain(x.flatten(0, 1)).view_as(x)
        return y + 0.1 * y.mean(dim=0) if mixes else y

    adapted.checked.clear()
    inner.forward = flattening
    try:
        yield
    finally:
        del inner.forward
        adapted.checked.clear()


def test_a_flattening_layer_costs_a_warning_and_no_round(
    make_site: Make, small: Make, instruct: Make, caplog: pytest.LogCaptureFixture
) -> None:
    experiment = small()
    site = make_site(experiment)
    with wrapped(experiment, mixes=False), caplog.at_level(logging.WARNING):
        replies = [site.handle(instruct(experiment, number)) for number in (1, 2)]
    assert [reply.header.status for reply in replies] == ["trained", "trained"]
    assert replies[1].header.privacy.steps_executed == 4
    (warning,) = [line for line in caplog.messages if "one by one" in line]
    assert "layers.0.mlp." in warning

    # The layer computes what it did without the flattening: by the same noise, the same update.
    other = make_site(experiment, state="plain")
    again = other.handle(instruct(experiment))
    for name, tensor in replies[0].tensors.items():
        torch.testing.assert_close(tensor, again.tensors[name], rtol=1e-3, atol=1e-5)


def test_refused_before_anything_is_booked(make_site: Make, small: Make, instruct: Make) -> None:
    experiment = small()
    site = make_site(experiment)
    with wrapped(experiment, mixes=True):
        with pytest.raises(PrivacyError, match=r"^an example's gradient depends on what it is batched with"):
            site.handle(instruct(experiment))
        with pytest.raises(PrivacyError, match=r"^an example's gradient depends on what it is batched with"):
            site.rehearse(client_plan(experiment, "run"))
    refusing = small("privacy.without_rule=refuse")
    with wrapped(experiment, mixes=False), pytest.raises(PrivacyError, match=r"^a dry run of .*; set privacy\.per_exa"):
        site.handle(instruct(refusing))
    reply = site.handle(instruct(experiment))
    assert reply.header.privacy.steps_executed == 2, "what was refused left something in the ledger"


def test_losses_that_couple_examples_are_refused(
    make_site: Make, small: Make, instruct: Make, coupled_objective: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `labels=` of transformers does: the mean over the tokens of the whole batch."""
    monkeypatch.setattr(client.training, "build_objective", coupled_objective)
    experiment = small()
    with pytest.raises(PrivacyError, match=r"^an example's gradient depends on what it is batched with"):
        make_site(experiment).handle(instruct(experiment))


@pytest.mark.parametrize("way", ["native", "one_by_one", "opacus"])
def test_gradient_checkpointing_changes_no_update(
    way: str, make_site: Make, small: Make, instruct: Make, caplog: pytest.LogCaptureFixture
) -> None:
    experiment = small(f"privacy.per_example_gradients={way}", "peft.dropout=0.1")
    base = load_base(experiment.model, experiment.task, "cpu").network
    adapted = attach(load_base(experiment.model, experiment.task, "cpu"), experiment.peft, experiment.task)
    adapted.checked.clear()
    plain = make_site(experiment, state="plain").handle(instruct(experiment)).tensors

    work = make_site(experiment, state="recomputed").work()
    runtime = work.file.runtime.model_copy(update={"gradient_checkpointing": True})
    runs: list[int] = []
    counted = base.get_submodule("model.layers.0.self_attn").q_proj.register_forward_pre_hook(lambda *_: runs.append(1))
    try:
        with caplog.at_level(logging.WARNING):
            reply = answer(instruct(experiment), replace(work, file=work.file.model_copy(update={"runtime": runtime})))
        recomputed, runs[:] = len(runs), []
        answer(instruct(experiment, run="other"), make_site(experiment, state="third").work())
        assert recomputed > len(runs) * (1.0 if way == "opacus" else 1.5), "nothing was recomputed"
    finally:
        counted.remove()
    assert ("one by one" in caplog.text) == (way == "opacus")
    for name, tensor in reply.tensors.items():
        # Dropout's masks depend on the batch, so only the way that was kept compares under it.
        if way != "opacus":
            torch.testing.assert_close(tensor, plain[name], rtol=1e-5, atol=1e-6)
    assert not base.is_gradient_checkpointing


def test_an_architecture_that_cannot_recompute(
    make_site: Make, small: Make, instruct: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = small("runtime.gradient_checkpointing=true")
    base = load_base(experiment.model, experiment.task, "cpu").network
    attach(load_base(experiment.model, experiment.task, "cpu"), experiment.peft, experiment.task).checked.clear()
    monkeypatch.setattr(type(base), "supports_gradient_checkpointing", False)
    with pytest.raises(ModelError, match=r"gradient_checkpointing=true, but LlamaForCausalLM does not support it; set"):
        make_site(experiment).handle(instruct(experiment))
