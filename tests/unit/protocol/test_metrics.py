"""No metric leaves unprotected."""

import math

import pytest

from protocol.errors import PrivacyError
from protocol.metrics import METRICS, releasable


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.kind == "private"])
def test_a_private_metric_never_leaves_a_protected_site(name: str) -> None:
    with pytest.raises(
        PrivacyError, match=rf"metric '{name}' \(.*\) is private and no ε covers it; set privacy\.loss_"
    ):
        releasable({name: 1.0}, protected=True)
    assert releasable({name: 1.0}, protected=False) == {name: 1.0}


def test_public_and_noised_metrics_leave() -> None:
    metrics = {name: 2.0 for name, metric in METRICS.items() if metric.kind != "private"}
    assert len(metrics) >= 2
    assert releasable(metrics, protected=True) == metrics


def test_a_metric_without_a_class_is_refused() -> None:
    for protected in (True, False):
        with pytest.raises(PrivacyError, match=r"metric 'accuracy' has no class; declare it in protocol/metrics\.py"):
            releasable({"accuracy": 0.5}, protected=protected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_carry_is_left_out(value: float) -> None:
    assert releasable({"steps": 4.0, "noisy_training_loss": value}, protected=True) == {"steps": 4.0}
