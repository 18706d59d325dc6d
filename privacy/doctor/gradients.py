"""Checks of the noiseless path: what moves, whose gradient it is, and how far one unit can move it."""

from __future__ import annotations

import math

import torch

from privacy.doctor.subject import Subject, Verdict

__all__ = [
    "adapters_move",
    "base_stays",
    "gradients_match_loop",
    "one_unit_moves_the_sum_by_at_most_the_clip_norm",
    "release_scale_is_public",
    "updates_are_clipped",
]


_ROUNDING = 1e-6


def adapters_move(subject: Subject) -> Verdict:
    """Every tensor that leaves the site has moved, and is finite: an adapter that is not wired in trains nothing."""
    stuck = [
        f"{name} in round {number}"
        for number, observed in enumerate(subject.trained, start=1)
        for name, norm in observed.moved.items()
        if not 0 < norm < float("inf")
    ]
    count = min(len(observed.moved) for observed in subject.trained)
    if not count:
        return Verdict("adapters move", False, "a reply held no tensor")
    if stuck:
        return Verdict("adapters move", False, f"{len(stuck)} tensor(s) did not move or are not finite, {stuck[0]}")
    return Verdict("adapters move", True, f"{count} tensors moved in each of {len(subject.trained)} rounds")


def base_stays(subject: Subject) -> Verdict:
    """Nothing but the adapter moved."""
    same = subject.base_before == subject.base_after
    words = "is unchanged" if same else f"became {subject.base_after[:12]}"
    return Verdict("base stays", same, f"digest {subject.base_before[:12]} of all frozen tensors {words}")


def gradients_match_loop(subject: Subject) -> Verdict:
    """The batched clipped sum equals a loop over single units, each clipped over all parameters together.

    Abadi et al. 2016 (arXiv 1607.00133), algorithm 1.
    """
    probe = subject.probe
    expected = torch.stack([_clipped(each, probe.clip_norm) for each in probe.alone]).sum(dim=0)
    made = probe.whole * _scale(expected, probe.whole)
    error = float((made - expected).norm() / expected.norm())
    clipped = sum(float(each.norm()) > probe.clip_norm for each in probe.alone)
    evidence = (
        f"relative error {error:.1e} (at most {subject.precision:.0e}) over {len(probe.alone)} units, {clipped} clipped"
    )
    return Verdict("per-example gradients equal the loop", error <= subject.precision, evidence)


def one_unit_moves_the_sum_by_at_most_the_clip_norm(subject: Subject) -> Verdict:
    """Removing one unit's records from the site changes the sum by at most the clip norm: the sensitivity."""
    name = f"one {_unit(subject)} moves the sum by at most the clip norm"
    if not subject.plan.is_private:
        return Verdict(name, None, "nothing is clipped")
    probe = subject.probe
    moved = [float((probe.whole - rest).norm()) * probe.normalizer / probe.clip_norm for rest in probe.without]
    most = max(moved)
    evidence = f"at most {most:.4f} x the clip norm over {len(moved)} removals"
    if most < 1 - subject.precision:
        return Verdict(name, False, f"{evidence}; a clipped unit should reach 1: the sum is not what is promised")
    return Verdict(name, most <= 1 + subject.precision, evidence)


def release_scale_is_public(subject: Subject) -> Verdict:
    """The sum is divided by the plan's constant, not by the number of records that happened to be drawn."""
    name, probe = "release is scaled by a public constant", subject.probe
    asked = subject.promise.expected_batch
    if subject.plan.normalizer != asked:
        return Verdict(name, False, f"the plan divides by {subject.plan.normalizer:g}, the expected batch is {asked:g}")
    expected = torch.stack([_clipped(each, probe.clip_norm) for each in probe.alone]).sum(dim=0)
    divisor = _scale(expected, probe.whole)
    evidence = f"{len(probe.alone)} units were divided by {divisor:.4f}; the constant is {probe.normalizer:g}"
    return Verdict(name, abs(divisor / probe.normalizer - 1) <= subject.precision, evidence)


def updates_are_clipped(subject: Subject) -> Verdict:
    """Client-level: what leaves a site is at most the clip norm long, over all its tensors together.

    The clip norm of the examined rounds is so small that an update reaches it.
    """
    name, bound = "updates are clipped as a whole", subject.promise.update_clip
    if bound is None:
        return Verdict(name, None, "nobody promises a bound on the whole update")
    norms = [math.hypot(*observed.moved.values()) for observed in (*subject.trained, *subject.silenced)]
    evidence = f"norms of {len(norms)} updates at most {max(norms) / bound:.6f} x the clip norm"
    return Verdict(name, max(norms) <= bound * (1 + _ROUNDING), evidence)


def _clipped(gradient: torch.Tensor, clip_norm: float) -> torch.Tensor:
    return gradient * min(1.0, clip_norm / max(float(gradient.norm()), 1e-300))


def _scale(expected: torch.Tensor, made: torch.Tensor) -> float:
    """Return the factor that brings `made` closest to `expected` (least squares)."""
    return float(expected @ made) / max(float(made @ made), 1e-300)


def _unit(subject: Subject) -> str:
    return "record" if subject.plan.unit == "none" else subject.plan.unit
