"""One real round at a watched site, as its owner, its ledger and the server see it."""

from __future__ import annotations

import random
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from conf.schema.experiment import Experiment
from privacy.doctor.subject import ObservedRound
from privacy.ledger import load_or_create_keys
from protocol.errors import CloisterError, ConfigError
from protocol.instructions import Instruction, Reply, ReplyHeader
from protocol.tensors import NamedTensors, add, digest
from simulations.patient import Patient
from simulations.watching import StepLog, WatchedSite

__all__ = ["fresh_secrets", "observed_round"]

_SECRETS = 32
_STATE = 20260


def observed_round(
    site: WatchedSite,
    patient: Patient,
    experiment: Experiment,
    number: int,
    adapter: NamedTensors,
    log: StepLog,
    *,
    may_refuse: bool = False,
) -> tuple[ObservedRound, NamedTensors]:
    """Return what was seen of one real round, and the adapter after it.

    Raises:
        ConfigError: the site refuses, unless it `may_refuse`: then the refusal, or the error, is what was seen.
    """
    instruction = patient.instruction(experiment, number, adapter, patient.update_clip)
    log.take()
    reply = _tolerant(site, instruction) if may_refuse else site.answer(instruction)
    if reply.header.status == "refused" and not may_refuse:
        raise ConfigError(f"the examined site refuses round {number} ({reply.header.code}): {reply.header.reason}")
    moved = {name: float(tensor.double().norm()) for name, tensor in reply.tensors.items()}
    booked = site.booked(instruction.header.plan.run)
    seen = ObservedRound(log.take(), reply.header, moved, booked, digest(reply.tensors))
    return seen, add(adapter, reply.tensors) if reply.tensors else adapter


def _tolerant(site: WatchedSite, instruction: Instruction) -> Reply:
    """Return the answer; an error is one too, which a server learns about."""
    header = instruction.header
    try:
        return site.answer(instruction)
    except (CloisterError, ArithmeticError, RuntimeError, ValueError) as error:
        code = type(error).__name__
        return Reply(
            ReplyHeader(status="refused", site="", round=header.round, plan_digest=header.plan_digest, code=code)
        )


def fresh_secrets(scratch: Path) -> tuple[bytes, ...]:
    """Return the secrets of fresh state directories, with the global random generators in one state each time."""
    secrets: list[bytes] = []
    for number in range(_SECRETS):
        with _global_generators_set():
            secrets.append(load_or_create_keys(scratch / "secrets" / str(number)).secret)
    return tuple(secrets)


@contextmanager
def _global_generators_set() -> Generator[None]:
    """Put Python's, numpy's and torch's global generators into one state, and back."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(_STATE)
        np.random.seed(_STATE)
        torch.manual_seed(_STATE)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
