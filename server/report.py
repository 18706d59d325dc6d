"""placeholder replaced below"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conf.schema.experiment import Experiment

__all__ = ["write_report"]


def write_report(path: Path, summary: dict[str, Any], experiment: Experiment) -> None:
    """Write it."""
