"""What a strategy keeps at a site from round to round: a personal factor, a control variate, an error to feed back.

A file per run and round, so that a repeated instruction starts from what it started from the first time.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path

from finetuning.checkpoints import load_tensors, save_tensors
from protocol.tensors import NamedTensors

__all__ = ["SiteMemory"]

_KEPT = 3


class SiteMemory:
    """The memory of one run, below a site's state directory; kinds do not see each other."""

    def __init__(self, folder: Path, run: str, kind: str = "memory", most_runs: int | None = None) -> None:
        """Name a memory; nothing is made yet.

        Args:
            folder: the site's state directory.
            run: whose memory it is.
            kind: which memory of the run.
            most_runs: how many runs are kept of this kind, the latest to be written; None: all.
        """
        self._most_runs = most_runs
        # A run's name comes from the server: as a digest it cannot lead anywhere else.
        self._folder = folder / kind / hashlib.sha256(run.encode()).hexdigest()[:32]

    def before(self, round_number: int) -> NamedTensors:
        """Return what the newest round before `round_number` left; empty when there is none."""
        earlier = [path for path in self._files() if int(path.stem) < round_number]
        return load_tensors(earlier[-1])[0] if earlier else {}

    def keep(self, round_number: int, tensors: NamedTensors) -> None:
        """Store what a round leaves, and drop all but the newest few up to it, and the oldest runs.

        Later rounds stay: a server that goes on from an earlier round repeats them.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        save_tensors(self._file(round_number), tensors)
        earlier = [path for path in self._files() if int(path.stem) <= round_number]
        # The hidden ones are what a process that was killed left of a file.
        for old in (*earlier[:-_KEPT], *self._folder.glob(".*")):
            old.unlink(missing_ok=True)
        self._drop_oldest_runs()

    def forget(self, rounds: Iterable[int]) -> None:
        """Drop what these rounds left, so that the next one starts from what was before them."""
        for number in rounds:
            self._file(number).unlink(missing_ok=True)

    def _file(self, round_number: int) -> Path:
        return self._folder / f"{round_number:06d}.safetensors"

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("*.safetensors"))

    def _drop_oldest_runs(self) -> None:
        """Keep the runs that were written last, this one whatever the clock says."""
        if self._most_runs is None:
            return
        others = [path for path in self._folder.parent.iterdir() if path != self._folder]
        others.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
        for old in others[self._most_runs - 1 :]:
            shutil.rmtree(old)
