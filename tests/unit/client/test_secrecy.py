"""What a server could learn or undo by asking cleverly: seeds, and noise that repeats where it must not."""

from typing import Any

import numpy as np
import pytest
import torch

from client.training import TrainingJob, _dropout_seed
from client.units import Units
from conf.compose import compose_experiment
from finetuning.batches import Example
from privacy.randomness import SecureStream
from protocol.instructions import InstructionHeader, client_plan
from simulations.population import site_file
from strategies.averaging import plain_round

SECRET = b"s" * 32
SEEDED = ("privacy.insecure_seed=5",)


def job(
    *overrides: str, site: str = "site", round_number: int = 1, records: tuple[int, ...] = (1, 2), **header: Any
) -> TrainingJob:
    experiment = compose_experiment(overrides)
    plan = client_plan(experiment, header.pop("run", "run"))
    asked = InstructionHeader(
        round=round_number,
        plan=plan,
        plan_digest=plan.digest,
        base_digest=header.pop("base", "base"),
        adapter_digest=header.pop("adapter", "adapter"),
    )
    examples = [Example(np.array([token], dtype=np.int32), np.array([True])) for token in records]
    units = Units(tuple((n,) for n in range(len(records))), tuple(str(token).encode() for token in records))
    file = site_file(experiment, site, 1000, state="nowhere")  # type: ignore[arg-type]
    return TrainingJob(file, asked, None, frozenset(), plain_round({}, frozenset(), plan.local), examples, units, None)  # type: ignore[arg-type]


def words(made: TrainingJob, secret: bytes = SECRET, attempt: int = 1) -> list[float]:
    return made.stream(secret, attempt).uniform(4).tolist()


def test_dropout_masks_are_secret_under_privacy() -> None:
    """With a public seed a record's mask would depend, predictably, on who else was drawn."""
    torch.manual_seed(0)
    once = _dropout_seed(job().stream(SECRET, 1))
    torch.manual_seed(0)
    assert _dropout_seed(job().stream(b"t" * 32, 1)) != once


@pytest.mark.parametrize("overrides", [SEEDED, ()])
def test_the_same_question_meets_the_same_noise(overrides: tuple[str, ...]) -> None:
    """A replay tells nothing new: sampling, noise and dropout all come from this stream."""
    assert words(job(*overrides)) == words(job(*overrides))


def test_a_seeded_run_repeats_under_any_name_and_with_any_secret() -> None:
    once = words(job(*SEEDED))
    assert words(job(*SEEDED, run="again"), secret=b"t" * 32) == once
    assert words(job(*SEEDED), attempt=2) != once


def test_a_real_stream_is_bound_to_secret_run_and_attempt() -> None:
    streams = [words(job()), words(job(), b"t" * 32), words(job(run="again")), words(job(), attempt=2)]
    assert len({tuple(stream) for stream in streams}) == 4
    assert words(job()) != words(job(*SEEDED))


@pytest.mark.parametrize("seeded", [SEEDED, ()])
@pytest.mark.parametrize(
    "other",
    [
        {"overrides": ("strategy=fedit",)},
        {"overrides": ("seed=1",)},
        {"overrides": ("privacy.clip_norm=3",)},
        {"site": "other"},
        {"round_number": 2},
        {"records": (1, 3)},
        {"records": (1,)},
        {"adapter": "another adapter"},
        {"base": "another base"},
    ],
)
def test_no_two_different_questions_share_their_noise(seeded: tuple[str, ...], other: dict[str, Any]) -> None:
    """Equal noise on different inputs cancels in the difference, for somebody who does not even know the seed."""
    changed = dict(other)
    assert words(job(*seeded, *changed.pop("overrides", ()), **changed)) != words(job(*seeded))


def test_the_stream_that_is_refused_outside_simulation_is_the_only_one_without_a_secret() -> None:
    assert words(job(*SEEDED)) == SecureStream.insecure(5, 1, job(*SEEDED)._plain_inputs, 1).uniform(4).tolist()


def test_what_the_ledger_stores_of_the_records_cannot_be_tested_without_the_secret() -> None:
    """Whoever knows all records but one could try candidates for the last against a plain hash."""
    assert job().inputs(SECRET) != job().inputs(b"t" * 32)
    assert job().inputs(SECRET) != job()._plain_inputs
    assert job().inputs(SECRET) == job().inputs(SECRET) != job(records=(1, 3)).inputs(SECRET)
