"""A repeated question is answered with the same bits, for free; another one in the same round is refused."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from client import rounds
from client.site import Site
from client.training import Trained
from protocol.instructions import Instruction, Reply

Make = Callable[..., Any]


def stated(reply: Reply) -> int:
    assert reply.header.status == "trained", reply.header.reason
    assert reply.header.privacy is not None
    return reply.header.privacy.steps_executed


@pytest.fixture
def experiment(small: Make) -> Any:
    return small("privacy.insecure_seed=null", "federation.rounds=4")


@pytest.fixture
def site(make_site: Make, experiment: Any) -> Site:
    return make_site(experiment)


@pytest.fixture
def asked(instruct: Make, experiment: Any) -> Instruction:
    return instruct(experiment)


@pytest.fixture
def crashed(site: Site, asked: Instruction, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A site whose power failed while it trained for `asked`."""

    def crash(*_: Any) -> Trained:
        raise RuntimeError("power failure")

    with monkeypatch.context() as broken:
        broken.setattr(rounds, "train", crash)
        with pytest.raises(RuntimeError, match="power failure"):
            site.handle(asked)
    return site


def same(left: Reply, right: Reply) -> bool:
    return all(torch.equal(left.tensors[name], right.tensors[name]) for name in left.tensors)


def test_a_repeated_message_gets_the_same_bits_and_costs_nothing(site: Site, asked: Instruction) -> None:
    once, again = site.handle(asked), site.handle(asked)
    assert same(once, again)
    assert stated(once) == stated(again) == 2


def test_the_same_bits_after_a_restart(site: Site, asked: Instruction, make_site: Make, experiment: Any) -> None:
    once = site.handle(asked)
    site.close()
    again = make_site(experiment).handle(asked)
    assert same(once, again)
    assert stated(again) == 2


def moved(site: Site, asked: Instruction, instruct: Make, experiment: Any, round_number: int = 1) -> Instruction:
    """Another adapter."""
    initial = site._adapted(asked.header.plan).initial(experiment.seed)
    sent = {name: tensor + 1e-3 for name, tensor in initial.items() if name in asked.tensors}
    return instruct(experiment, round_number, adapter=initial | sent)


def test_another_adapter_in_a_round_that_was_answered_is_refused_by_the_ledger_alone(
    site: Site, asked: Instruction, instruct: Make, experiment: Any
) -> None:
    once = site.handle(asked)
    spent = site.state.spent()
    other = site.handle(moved(site, asked, instruct, experiment))
    assert (other.header.status, other.header.code) == ("refused", "replay_mismatch")
    assert site.state.spent() == spent
    assert same(once, site.handle(asked))
    assert stated(site.handle(moved(site, asked, instruct, experiment, 2))) == 4


def test_another_adapter_after_a_crash_is_charged_and_gets_other_noise(
    crashed: Site, asked: Instruction, instruct: Make, experiment: Any
) -> None:
    assert stated(crashed.handle(moved(crashed, asked, instruct, experiment))) == 4


def test_a_site_that_came_out_of_an_old_backup_is_noticed_by_what_the_server_remembers(
    site: Site, asked: Instruction, instruct: Make, experiment: Any, tmp_path: Path, make_site: Make
) -> None:
    site.handle(asked)
    folder, backup = Path(site.file.state_directory), tmp_path / "backup"
    site.close()
    shutil.copytree(folder, backup)
    site = make_site(experiment)
    heads = site.handle(instruct(experiment, 2)).header.ledger_heads
    assert heads.keys() == {"records"}
    third = instruct(experiment, 3)
    third = replace(third, header=third.header.model_copy(update={"ledger_heads": heads}))
    site.close()
    newest = tmp_path / "newest"
    folder.rename(newest)
    shutil.copytree(backup, folder)
    back = make_site(experiment)
    assert back.handle(third).header.code == "ledger_set_back"
    back.close()
    shutil.rmtree(folder)
    newest.rename(folder)
    assert stated(make_site(experiment).handle(third)) == 6


def test_a_crash_counts_as_spent_and_its_repetition_is_free(
    crashed: Site, asked: Instruction, instruct: Make, experiment: Any
) -> None:
    assert crashed.state.spent() > 0
    assert stated(crashed.handle(asked)) == 2
    assert stated(crashed.handle(instruct(experiment, round_number=2))) == 4


def test_other_bits_for_the_same_question_are_thrown_away_and_charged(
    site: Site, asked: Instruction, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an update of a library that rounds differently: released, they would differ by rounding alone."""
    once = site.handle(asked)
    honest, calls = rounds.train, []

    def on_another_machine(*arguments: Any) -> Trained:
        trained = honest(*arguments)
        calls.append(trained)
        return replace(trained, update={name: tensor + 1e-6 for name, tensor in trained.update.items()})

    monkeypatch.setattr(rounds, "train", on_another_machine)
    again = site.handle(asked)
    assert len(calls) == 2
    assert stated(again) == 4
    name = next(iter(once.tensors))
    assert (once.tensors[name] - again.tensors[name]).abs().max() > 1e-4, "independent noise, not the same noise again"
