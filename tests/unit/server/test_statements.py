"""What a site states is checked when it arrives, so that nothing stated can end a run or fill its files."""

from typing import Any

import pytest

from privacy.mechanisms import SubsampledGaussian
from protocol.errors import ReplyRejected
from protocol.instructions import PrivacyStatement
from server.statements import checked_statement, epsilon_over_several

MECHANISM = SubsampledGaussian(0.1, 1.0, 4).to_json()


def statement(**changed: Any) -> PrivacyStatement:
    stated: dict[str, Any] = {
        "delta": 1e-5,
        "sampling_rate": 0.1,
        "steps_executed": 4,
        "mechanisms": (MECHANISM,),
    } | changed
    return PrivacyStatement(unit="one record", relation="add or remove", **stated)


def test_an_honest_statement_passes() -> None:
    for honest in (None, statement(), statement(mechanism=MECHANISM, epsilon_budget=None, delta=None)):
        assert checked_statement(honest) is honest


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"delta": 1.0}, r"has delta=1, not in \[0, 1\)"),
        ({"delta": -0.1}, r"has delta=-0.1, not in \[0, 1\)"),
        ({"steps_executed": 10**4000}, r"has more than 1e\+09 steps"),
        ({"mechanisms": ({**MECHANISM, "steps": 2.5},)}, "cannot be read: .*steps=2.5, expected a whole number"),
        ({"mechanism": {**MECHANISM, "steps": -1}}, "cannot be read: .* is no mechanism"),
        ({"mechanism": {**MECHANISM, "matrix": [1]}}, "cannot be read: .*matrix"),
        ({"mechanisms": (MECHANISM,) * 257}, "has 257 mechanisms, above 256"),
    ],
)
def test_what_cannot_be_priced_is_a_malformed_reply(changed: dict[str, Any], problem: str) -> None:
    with pytest.raises(ReplyRejected, match=f"the privacy statement {problem}") as raised:
        checked_statement(statement(**changed))
    assert raised.value.code == "malformed_reply"


def test_statements_as_no_plan_gives_them_cost_an_upper_bound_at_once() -> None:
    exact = epsilon_over_several([statement(), statement()], 2)
    many = [{**MECHANISM, "steps": 1, "noise_multiplier": 1e9 + number} for number in range(70)]
    bound = epsilon_over_several([statement(), statement(mechanisms=(MECHANISM, *many))], 2)
    assert exact is not None
    assert bound is not None
    assert exact < bound < 2 * exact
