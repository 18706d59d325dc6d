"""What a strategy keeps at a site from round to round: a personal factor, a control variate, an error to feed back.

A file per run and round, so that a repeated instruction starts from what it started from the first time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from finetuning.checkpoints import load_tensors, save_tensors
from protocol.tensors import NamedTensors

__all__ = ["SiteMemory"]

_KEPT = 3


class SiteMemory:
    """The memory of one run, below a site's state directory; kinds do not see each other."""

    def __init__(self, folder: Path, run: str, kind: str = "memory") -> None:
        # A run's name comes from the server: as a digest it cannot lead anywhere else.
        self._folder = folder / kind / hashlib.sha256(run.encode()).hexdigest()[:32]

    def before(self, round_number: int) -> NamedTensors:
        """Return what the newest round before `round_number` left; empty when there is none."""
        earlier = [path for path in self._files() if int(path.stem) < round_number]
        return load_tensors(earlier[-1])[0] if earlier else {}

    def keep(self, round_number: int, tensors: NamedTensors) -> None:
        """Store what a round leaves, and drop all but the newest few up to it.

        Later rounds stay: a server that goes on from an earlier round repeats them.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        save_tensors(self._file(round_number), tensors)
        earlier = [path for path in self._files() if int(path.stem) <= round_number]
        for old in earlier[:-_KEPT]:
            old.unlink()

    def forget(self, rounds: Iterable[int]) -> None:
        """Drop what these rounds left, so that the next one starts from what was before them."""
        for number in rounds:
            self._file(number).unlink(missing_ok=True)

    def _file(self, round_number: int) -> Path:
        return self._folder / f"{round_number:06d}.safetensors"

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("*.safetensors"))
