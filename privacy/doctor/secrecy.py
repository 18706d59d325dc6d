"""Checks of what must not be foreseen: whoever knows all that is public, and the records, foresees no random number."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np
from scipy import stats

from privacy.doctor.sampler import overlap_fault
from privacy.doctor.subject import FALSE_ALARM, ObservedRound, Subject, Verdict
from protocol.instructions import ReplyHeader
from protocol.refusals import sentence

__all__ = ["randomness_is_secret", "repeatable_noise_is_refused"]

_SECRET = "randomness follows from the site's secret alone"
_REFUSED = "repeatable noise is refused"
_SHARE = FALSE_ALARM / 4
"""Two tests of draws and two of secrets share the error rate. The rest compares hundreds of bits for equality."""


def randomness_is_secret(subject: Subject) -> Verdict:
    """Sites that differ in their secret alone draw other units, other noise and other dropout masks.

    And one site that is asked the same again answers with the same bits, or books again; asked something else, it
    draws other noise.

    A secret that is computed from something that these sites do not share, such as the time or the path of the state
    directory, looks random from here.
    """
    if not subject.plan.is_private:
        return Verdict(_SECRET, None, "nothing is promised")
    faults = [fault for fault in (*_of_twins(subject), *_of_draws(subject), _of_secrets(subject.secrets)) if fault]
    if faults:
        return Verdict(_SECRET, False, "; ".join(faults))
    steps = sum(len(observed.steps) for observed in _rounds(subject))
    return Verdict(
        _SECRET,
        True,
        f"noise, draws and dropout seeds of {steps} steps and {len(subject.secrets)} fresh secrets are unrelated "
        f"(error rate {FALSE_ALARM:g})",
    )


def repeatable_noise_is_refused(subject: Subject) -> Verdict:
    """A site that no simulation made refuses `insecure_seed`, wherever in a plan it stands."""
    accepted = [where for where, header in subject.refusals.items() if _code(header) != "insecure_seed"]
    if accepted:
        return Verdict(_REFUSED, False, f"{'; '.join(accepted)} was not refused")
    told = [where for where, header in subject.refusals.items() if _says_more(header)]
    if told:
        return Verdict(_REFUSED, False, f"the refusal of {'; '.join(told)} says more than its code's sentence")
    return Verdict(_REFUSED, True, f"in {len(subject.refusals)} places of a plan, with a fixed sentence")


def _code(header: ReplyHeader) -> str:
    return header.code if header.status == "refused" else ""


def _says_more(header: ReplyHeader) -> bool:
    silent = not header.metrics and not header.ledger_heads and header.privacy is None and header.steps == 0
    return not silent or header.reason != sentence(header.code)


def _rounds(subject: Subject) -> Iterator[ObservedRound]:
    """Yield every round that must have randomness of its own."""
    yield from subject.trained
    yield from subject.silenced
    yield from (subject.starved.first, subject.starved.elsewhere, subject.starved.twin)


def _of_twins(subject: Subject) -> Iterator[str]:
    starved = subject.starved
    if starved.twin.update == starved.first.update:
        yield "two sites with different secrets send the same update"
    if starved.elsewhere.update == starved.first.update or _same_noise(starved.elsewhere, starved.first):
        yield "a round of another adapter gets the same noise, which cancels in the difference"
    if starved.repeated.update != starved.first.update and len(starved.repeated.booked) <= len(starved.first.booked):
        yield "the same question is answered with other noise, and that is not booked"
    for left, right in combinations(_rounds(subject), 2):
        if left.steps and right.steps and left.steps[0].dropout_seed == right.steps[0].dropout_seed:
            yield "two rounds have one dropout seed, so it does not follow from the secret"
            return


def _same_noise(left: ObservedRound, right: ObservedRound) -> bool:
    """Return whether a step's gradient, which is all noise, is the other's."""
    return any(
        all(bool((a == b).all()) for a, b in zip(one.gradient, other.gradient, strict=True))
        for one, other in zip(left.steps, right.steps, strict=False)
    )


def _of_draws(subject: Subject) -> Iterator[str]:
    """Two rules, and two sites that differ in one unit, draw independently of each other."""
    slots = subject.plan.sampling.slots
    pairs = list(zip(subject.draws, subject.draws_again, strict=False))
    fault = overlap_fault(pairs, slots, _SHARE)
    if fault:
        yield f"two rules draw the same units: {fault}"
    # Only slots that are filled at both.
    shared = min(subject.promise.num_units - 1, slots)
    sites = [
        (_within(left.units, shared), _within(right.units, shared))
        for one, other in zip(subject.trained, subject.silenced, strict=True)
        for left, right in zip(one.steps, other.steps, strict=False)
    ]
    fault = overlap_fault(sites, shared, _SHARE)
    if fault:
        yield f"two sites draw the same units: {fault}"


def _within(units: frozenset[int], shared: int) -> np.ndarray:
    return np.asarray(sorted(unit for unit in units if unit < shared), dtype=np.int64)


def _of_secrets(secrets: tuple[bytes, ...]) -> str:
    """Return a fault or "": none repeats, ones and zeros are as many, no bit is the same in all."""
    if len(set(secrets)) < len(secrets):
        return "fresh state directories get the same secret"
    if min(map(len, secrets)) < 32 or len(set(map(len, secrets))) > 1:
        return f"a secret has {min(map(len, secrets))} bytes"
    bits = np.unpackbits(np.frombuffer(b"".join(secrets), dtype=np.uint8)).reshape(len(secrets), -1)
    ones = int(bits.sum())
    chance = 2 * min(stats.binom.cdf(ones, bits.size, 0.5), stats.binom.sf(ones - 1, bits.size, 0.5))
    if chance < _SHARE:
        return f"{ones} of {bits.size} bits of fresh secrets are ones"
    fixed = int(((bits.sum(axis=0) == 0) | (bits.sum(axis=0) == len(secrets))).sum())
    # One fixed bit among 256 has the chance 2^(1 - secrets) · 256.
    return f"{fixed} bits are the same in all secrets" if fixed else ""
