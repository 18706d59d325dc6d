"""What client-level privacy refuses before anything is sent, at the server and on the wire."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from client.wire import _clipped
from conf.compose import compose_experiment
from protocol.cards import SiteCard
from protocol.errors import PrivacyError, SiteRefusal
from protocol.instructions import InstructionHeader, client_plan, decode_instruction
from server.budget import ServerBooks
from server.cohort import Member
from server.protection import ClientLevelProtection, protection_for
from strategies.build import build_strategy

MEMBERS = tuple(
    Member(node, SiteCard(cloister_version="0", site=f"site-{node}", published_records=100)) for node in range(1, 5)
)


def protection(path: Path, strategy: Any = None) -> ClientLevelProtection:
    experiment = compose_experiment(["privacy=client_level"])
    directory: Any = SimpleNamespace(path=path, run="run-1", books=ServerBooks(path / "server"))
    made = protection_for(experiment, strategy or build_strategy(experiment.strategy), MEMBERS, directory)
    assert isinstance(made, ClientLevelProtection)
    return made


@pytest.mark.parametrize(
    ("sensitivity", "post_processes_sum"), [("unbounded", True), ("weighted_clip_norm", False), ("unbounded", False)]
)
def test_a_strategy_that_is_no_sum_is_refused(tmp_path: Path, sensitivity: str, post_processes_sum: bool) -> None:
    strategy = SimpleNamespace(sensitivity=sensitivity, post_processes_sum=post_processes_sum)
    with pytest.raises(PrivacyError, match=r"strategy=ffa_lora is no weighted sum of updates, .* its clip norm"):
        protection(tmp_path, strategy)


def test_nothing_is_released_that_was_not_reserved(tmp_path: Path) -> None:
    made = protection(tmp_path)
    with pytest.raises(RuntimeError, match="a round must be reserved before anything of it is released"):
        made.combined()
    made.close()


@pytest.mark.parametrize(("privacy", "clip_norm"), [("client_level", None), ("none", 1.0), ("example_level", 1.0)])
def test_a_clip_norm_comes_with_client_level_privacy_and_with_nothing_else(
    privacy: str, clip_norm: float | None
) -> None:
    plan = client_plan(compose_experiment([f"privacy={privacy}"]), "run-1")
    right = InstructionHeader(
        round=1,
        plan=plan,
        plan_digest=plan.digest,
        base_digest="",
        adapter_digest="",
        clip_norm=1.0 if clip_norm is None else None,
    )
    wrong = right.model_copy(update={"clip_norm": clip_norm}).model_dump_json()
    assert decode_instruction(right.model_dump_json(), {}).header == right
    with pytest.raises(SiteRefusal, match="clip_norm belongs to client-level privacy, and to nothing else"):
        decode_instruction(wrong, {})


def test_an_update_that_cannot_be_clipped_is_sent_as_zeros(caplog: pytest.LogCaptureFixture) -> None:
    """A refusal would tell the server, exactly and for free, that the site's update was not finite."""
    for poison in (float("nan"), float("inf")):
        update, below = _clipped({"a": torch.tensor([poison, 1.0]), "b": torch.ones(2)}, 1.0)
        assert below
        assert [tensor.tolist() for tensor in update.values()] == [[0.0, 0.0], [0.0, 0.0]]
    assert "zeros are sent in place of the update: the update is not finite" in caplog.text
