"""Keeps the libraries' own chatter out of a display made for people."""

from __future__ import annotations

import logging
import os
import warnings

__all__ = ["quiet_libraries"]


def quiet_libraries() -> None:
    """Silence progress bars, telemetry and warnings that tell a user nothing they could act on.

    Call it before transformers, flwr and ray are imported: some read these variables when they are.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    # Opacus' hooks on the first trained layer of a frozen base; the gradients are tested against a loop.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    logging.getLogger("flwr").setLevel(logging.WARNING)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
