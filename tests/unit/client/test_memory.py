"""What a site keeps from round to round: what was before a round, and what is taken back."""

import os
from pathlib import Path

import torch

from client.memory import SiteMemory


def at(value: float) -> dict[str, torch.Tensor]:
    return {"x": torch.tensor([value])}


def found(memory: SiteMemory, number: int) -> float | None:
    kept = memory.before(number)
    return float(kept["x"]) if kept else None


def test_a_round_that_was_not_used_is_taken_back_however_long_ago_the_one_before_was(tmp_path: Path) -> None:
    memory = SiteMemory(tmp_path, "run")
    memory.keep(1, at(1.0))
    memory.keep(40, at(2.0))
    assert found(memory, 50) == 2.0
    memory.forget((40,))
    assert found(memory, 50) == 1.0
    memory.forget((40, 7))
    assert found(memory, 50) == 1.0


def test_the_newest_few_up_to_a_round_are_kept_and_later_ones_too(tmp_path: Path) -> None:
    memory = SiteMemory(tmp_path, "run")
    for number in (1, 5, 9, 12, 20):
        memory.keep(number, at(float(number)))
    assert [found(memory, number) for number in (9, 12, 20, 21)] == [None, 9.0, 12.0, 20.0]
    memory.keep(12, at(-12.0))
    assert [found(memory, number) for number in (20, 21)] == [-12.0, 20.0]


def test_only_the_latest_runs_are_kept_where_a_server_names_them(tmp_path: Path) -> None:
    memories = [SiteMemory(tmp_path, f"run {number}", most_runs=2) for number in range(4)]
    later = 2_000_000_000
    for number, memory in enumerate(memories):
        memory.keep(1, at(float(number)))
        # The first run comes out of a clock that was ahead.
        os.utime(memory._folder, times=(later, later) if number == 0 else (number, number))
    assert [found(memory, 2) for memory in memories] == [0.0, None, None, 3.0]
    unlimited = SiteMemory(tmp_path, "another")
    unlimited.keep(1, at(9.0))
    assert [found(memory, 2) for memory in (memories[0], memories[3], unlimited)] == [0.0, 3.0, 9.0]


def test_what_a_killed_process_left_of_a_file_is_removed(tmp_path: Path) -> None:
    memory = SiteMemory(tmp_path, "run")
    memory.keep(1, at(1.0))
    (memory._folder / ".000002.safetensors.x1y2").write_bytes(b"half")
    memory.keep(2, at(2.0))
    assert sorted(path.name for path in memory._folder.iterdir()) == ["000001.safetensors", "000002.safetensors"]
