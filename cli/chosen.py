"""What a command says of the settings that the product chose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["print_chosen"]


def print_chosen(overrides: Sequence[str], console: Console) -> None:
    """Print what was set before the user's overrides; nothing where nothing was."""
    from conf.compose import chosen_settings

    if chosen := chosen_settings(overrides):
        console.print(
            f"chosen   {' '.join(chosen)}, for a model of your own; docs/choosing.md says why",
            soft_wrap=True,
            markup=False,
            highlight=False,
        )
