"""What a server could learn or undo by asking cleverly: seeds, streams, and the order of checks."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from client.rounds import _dropout_seed, _stream
from conf.compose import compose_experiment
from finetuning.batches import Example
from privacy.randomness import SecureStream
from protocol.instructions import ClientPlan, client_plan


def examples(*tokens: int) -> Sequence[Example]:
    return [Example(np.array([token], dtype=np.int32), np.array([True])) for token in tokens]


def plan(*overrides: str, run: str = "run") -> ClientPlan:
    return client_plan(compose_experiment(overrides), run)


def words(stream: SecureStream) -> list[float]:
    return stream.uniform(4).tolist()


SEEDED = ("privacy.insecure_seed=5",)


def test_dropout_masks_are_secret_under_privacy() -> None:
    """With a public seed a record's mask would depend, predictably, on who else was drawn."""
    torch.manual_seed(0)
    once = _dropout_seed(_stream(plan(), "site", 1, examples(1)))
    torch.manual_seed(0)
    assert _dropout_seed(_stream(plan(), "site", 1, examples(1))) != once


def test_a_seeded_run_repeats_under_any_name() -> None:
    once = words(_stream(plan(*SEEDED), "site", 1, examples(1, 2)))
    assert words(_stream(plan(*SEEDED, run="again"), "site", 1, examples(1, 2))) == once


@pytest.mark.parametrize(
    ("overrides", "site", "round_number", "records"),
    [
        (("strategy=fedit",), "site", 1, (1, 2)),
        (("seed=1",), "site", 1, (1, 2)),
        (("privacy.clip_norm=3",), "site", 1, (1, 2)),
        ((), "other", 1, (1, 2)),
        ((), "site", 2, (1, 2)),
        ((), "site", 1, (1, 3)),
        ((), "site", 1, (1,)),
    ],
)
def test_no_two_different_runs_share_their_noise(
    overrides: tuple[str, ...], site: str, round_number: int, records: tuple[int, ...]
) -> None:
    """Equal noise on different inputs cancels in the difference, for somebody who does not even know the seed."""
    once = words(_stream(plan(*SEEDED), "site", 1, examples(1, 2)))
    assert words(_stream(plan(*SEEDED, *overrides), site, round_number, examples(*records))) != once
