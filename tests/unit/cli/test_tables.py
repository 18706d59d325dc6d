"""Tables on a narrow terminal: names may fold, figures stay whole."""

import io
from typing import Any

from rich.console import Console

from cli.tables import outcome_table, sweep_table


def drawn(table: object) -> str:
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def site(epsilon: float) -> dict[str, Any]:
    return {
        "quality": {"first": 0.5123, "last": 0.9876},
        "privacy": {"epsilon_run": epsilon, "epsilon_budget": 12.5, "delta": 1.3e-10},
        "bytes": {"up": 999_900_000, "down": 999_900_000},
    }


SUMMARY: dict[str, Any] = {
    "final": {"metric": "accuracy", "base": 0.5123, "value": 0.9876},
    "sites": {"university-hospital-of-the-northern-district": site(11.987), "south": site(3.456)},
    "bytes": {"up": 999_900_000, "down": 999_900_000},
    "seconds": {"total": 1234.5},
    "privacy": {
        "unit": "record",
        "epsilon": 11.987,
        "delta": 1.3e-10,
        "joint": [
            {"unit": "record", "epsilon": 11.987, "delta": 1.3e-10},
            {"unit": "site", "epsilon": 10.654, "delta": 2.7e-10},
        ],
    },
}


def test_a_joint_report_keeps_every_figure() -> None:
    shown = drawn(outcome_table(SUMMARY))
    assert "…" not in shown
    for figure in ("11.99", "3.46", "10.66", "12.50", "1.3e-10", "2.7e-10", "51.2%", "98.8%", "999.9 MB"):
        assert figure in shown
    assert "all, per" in shown


def test_a_sweep_keeps_every_figure() -> None:
    jobs = [((f"privacy.target_epsilon={epsilon}", "peft.rank=16"), SUMMARY) for epsilon in (4, 8)]
    shown = drawn(sweep_table([*jobs]))
    assert "…" not in shown
    assert shown.count("11.99") == 2
    assert shown.count("999.9 MB") == 2
