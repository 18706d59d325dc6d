"""All checks, in the order in which they are reported, and the exit code of the first that fails."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import MappingProxyType

from privacy.doctor.accounting import (
    booked_is_what_was_executed,
    delta_is_for_the_whole_run,
    empty_batches_are_steps,
    statement_is_true,
)
from privacy.doctor.bits import low_bits_tell_nothing
from privacy.doctor.gradients import (
    adapters_move,
    base_stays,
    gradients_match_loop,
    one_unit_moves_the_sum_by_at_most_the_clip_norm,
    release_scale_is_public,
    updates_are_clipped,
)
from privacy.doctor.losses import released_loss_is_noised
from privacy.doctor.metrics import no_metric_leaves_unprotected
from privacy.doctor.noise import (
    noise_does_not_depend_on_the_sum,
    noise_has_the_calibrated_deviation,
    noise_is_fresh_and_normal,
)
from privacy.doctor.sampler import sampler_is_poisson
from privacy.doctor.second_accountant import accountant_agrees_with_others
from privacy.doctor.secrecy import randomness_is_secret, repeatable_noise_is_refused
from privacy.doctor.subject import Subject, Verdict

__all__ = ["CHECKS", "Check", "diagnose", "exit_code"]

Check = Callable[[Subject], Verdict]

CHECKS: MappingProxyType[int, Check] = MappingProxyType(
    {
        10: adapters_move,
        11: base_stays,
        12: gradients_match_loop,
        13: one_unit_moves_the_sum_by_at_most_the_clip_norm,
        14: release_scale_is_public,
        15: noise_has_the_calibrated_deviation,
        16: noise_is_fresh_and_normal,
        17: sampler_is_poisson,
        18: booked_is_what_was_executed,
        19: empty_batches_are_steps,
        20: statement_is_true,
        21: delta_is_for_the_whole_run,
        22: no_metric_leaves_unprotected,
        23: updates_are_clipped,
        24: randomness_is_secret,
        25: noise_does_not_depend_on_the_sum,
        26: low_bits_tell_nothing,
        27: released_loss_is_noised,
        28: accountant_agrees_with_others,
        29: repeatable_noise_is_refused,
    }
)
"""Exit code of `cloister doctor` -> the check whose failure it tells. A code keeps its meaning."""


def diagnose(subject: Subject) -> dict[int, Verdict]:
    """Return every check's verdict, by exit code."""
    return {code: check(subject) for code, check in CHECKS.items()}


def exit_code(verdicts: Iterable[tuple[int, Verdict]]) -> int:
    """Return 0 when nothing failed, else the code of the first failure."""
    return next((code for code, verdict in verdicts if verdict.passed is False), 0)
