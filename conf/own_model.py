"""What is set where a user brings a model of their own, and leaves how it is trained to the product.

The shipped configuration is made for the shipped model of 1.4 M values. A learning rate that follows from a model is
none that a user of private data may search for: every try is charged. So the settings here follow from public facts
alone, the task and the protection, and move a value by about the same step whatever the model, the number of records
and the noise (docs/decisions/0018).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from conf.pooling import states_mean

__all__ = ["settings_for"]

_BY_HAND = ("experiment", "federation", "strategy", "server_optimizer", "objective", "peft")
"""Groups: whoever chooses one of them trains by hand."""
_VALUES = (
    "federation.local.steps",
    "federation.local.optimizer",
    "strategy.server_optimizer",
    "strategy.objective",
    "strategy.kind",
)
"""Values that the settings depend on; whoever sets one, or a value within, trains by hand."""
_ROBUST = ("robust", "strategy.robust")


def settings_for(overrides: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """Return the overrides that come before the user's own; none for the shipped model, or where one trains by hand.

    A checkpoint's own files are read where it is a folder here; they are as public as the model.

    Args:
        overrides: (path, value) of each of the user's.

    >>> settings_for([("model.path", "/models/llama")])[:2]
    ('federation=one_step', 'server_optimizer=adam')
    >>> settings_for([("model.path", "/models/bert"), ("task", "classification")])[-1]
    'peft=head'
    >>> settings_for([("model.path", "/models/llama"), ("federation.local.steps", "4")])
    ()
    """
    given = dict(overrides)
    path = given.get("model.path", "")
    by_hand = _is_set(given, _VALUES) or any(group in given for group in _BY_HAND)
    if not path or path.startswith("embedded:") or by_hand:
        return ()
    private = "none" not in (given.get("privacy"), given.get("privacy.kind"))
    classifies = "classification" in (given.get("task"), given.get("task.kind"))
    # Noise grows with the root of the number of values that are trained, and a head has few.
    head_alone = private and classifies and not any(key.startswith("peft.") for key in given)
    # A summary of a text is computed once, so that a step on every record costs no more than one on few.
    summarizes = head_alone and _reads_mean(given, path)
    chosen = [f"federation={'every_record' if summarizes else 'one_step'}", "server_optimizer=adam"]
    if not _is_set(given, _ROBUST):  # a site that is not trusted could claim any count
        chosen.append("strategy.weights=published_records")
    return (*chosen, "peft=head") if head_alone else tuple(chosen)


def _reads_mean(given: Mapping[str, str], path: str) -> bool:
    """Whether a new head reads the mean of the last layer (`task.pooling`)."""
    pooling = given.get("task.pooling", "auto")
    return pooling == "mean" or (pooling == "auto" and states_mean(Path(path).expanduser()))


def _is_set(given: Mapping[str, str], names: Sequence[str]) -> bool:
    """Whether a path, or one within it, is given."""
    return any(key == name or key.startswith(f"{name}.") for key in given for name in names)
