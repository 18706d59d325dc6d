"""A run killed with -9 at any moment goes on, and ends with the bits that an undisturbed run gives."""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from conf.compose import compose_experiment
from protocol.errors import ConfigError
from server.checkpoint import Checkpoint, load_newest, save_checkpoint
from server.downlink import Sent
from server.events import RoundStarted, RunResumed, RunStarted, parse_event, surviving
from server.run_directory import RunDirectory
from simulations.simulate import simulate
from strategies.base import ServerState

OVERRIDES = (
    "experiment=smoke",
    "data.max_records=60",
    "data.max_length=64",
    "federation.rounds=3",
    "federation.cohort_size=1",
    "federation.local.steps=1",
    "federation.local.expected_batch_size=3",
    "federation.local.optimizer.learning_rate=0.1",  # at the usual one so few records drown, and the run would end
    "evaluation.max_examples=4",
    "runtime.threads=1",
    "data.partition.sites=[harbor,northgate]",
    "privacy.insecure_seed=7",
)

KILLED = """
import os, signal, sys
from pathlib import Path
import finetuning.checkpoints, server.run_directory, server.rounds, client.rounds
from conf.compose import compose_experiment
from server.events import RoundStarted, SiteReplied, RoundFinished, RunFinished
from simulations.simulate import simulate
from strategies.averaging import Averaging

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def on(kind):
    return lambda event: die() if isinstance(event, kind) and event.round == 2 else None

path, point = Path(sys.argv[1]), sys.argv[2]
observe = lambda event: None
if point == "before sending":
    observe = on(RoundStarted)
elif point == "after the last reply":
    observe = on(SiteReplied)
elif point == "before the checkpoint":
    observe = on(RoundFinished)
elif point == "while sites train":
    train = client.rounds.train
    client.rounds.train = lambda job, stream: die() if job.header.round == 2 else train(job, stream)
elif point == "during aggregation":
    step, rounds = Averaging.step, []
    def stepped(*given):
        rounds.append(1)
        return die() if len(rounds) == 2 else step(*given)
    Averaging.step = stepped
elif point == "during the checkpoint":
    replace = os.replace
    finetuning.checkpoints.os.replace = (
        lambda source, to: die() if str(to).endswith("round-00002.safetensors") else replace(source, to)
    )
elif point == "before the summary":
    observe = lambda event: die() if isinstance(event, RunFinished) else None
elif point == "before the report":
    server.run_directory.write_report = die
simulate(compose_experiment(sys.argv[3:]), path, (observe,))
"""

POINTS = (
    "before sending",
    "while sites train",
    "after the last reply",
    "during aggregation",
    "before the checkpoint",
    "during the checkpoint",
)


@cache
def undisturbed(folder: Path) -> str:
    run = simulate(compose_experiment(OVERRIDES), folder / "run")
    return str(run.summary["adapter"]["digest"])


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    return undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_goes_on_to_the_same_adapter(point: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    died = subprocess.run(
        [sys.executable, "-c", KILLED, str(path), point, *OVERRIDES], capture_output=True, text=True, timeout=1800
    )
    assert died.returncode == -9, died.stderr[-2000:]
    assert not (path / "summary.json").exists()
    spent = {ledger.parent.name for ledger in path.glob("sites/*/ledger.db")}
    experiment = compose_experiment(OVERRIDES)
    resumed = simulate(experiment, path, resume=True)
    assert resumed.summary["adapter"]["digest"] == expected
    assert [each["round"] for each in resumed.summary["rounds"]] == [1, 2, 3]
    assert resumed.summary["status"] == "finished"
    assert spent <= set(resumed.summary["sites"])
    kinds = [json.loads(line)["kind"] for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert kinds.count("run_resumed") == 1
    # Repeated work is answered with the same bits, so it was booked once.
    for site in resumed.summary["sites"].values():
        if site["privacy"]:
            assert site["privacy"]["steps_executed"] <= 3
    with pytest.raises(ConfigError, match=r"run .* has finished; to repeat it: cloister simulate --from"):
        simulate(experiment, path, resume=True)


@pytest.mark.parametrize("point", ["before the summary", "before the report"])
def test_a_run_killed_after_its_last_round_leaves_its_summary_when_resumed(
    point: str, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    died = subprocess.run(
        [sys.executable, "-c", KILLED, str(path), point, *OVERRIDES], capture_output=True, text=True, timeout=1800
    )
    assert died.returncode == -9, died.stderr[-2000:]
    assert not (path / "report.html").exists()
    before = (path / "metrics.jsonl").read_text()
    resumed = simulate(compose_experiment(OVERRIDES), path, resume=True).summary
    assert (resumed["status"], resumed["adapter"]["digest"]) == ("finished", expected)
    assert [each["round"] for each in resumed["rounds"]] == [1, 2, 3]
    assert resumed["seconds"]["total"] > 0
    assert "finished" in (path / "report.html").read_text()
    assert (path / "metrics.jsonl").read_text() == before, "no site was asked, and nothing spent"
    with pytest.raises(ConfigError, match=r"run .* has finished; to repeat it: cloister simulate --from"):
        simulate(compose_experiment(OVERRIDES), path, resume=True)


def test_a_finished_run_whose_last_checkpoint_is_gone_says_so(tmp_path: Path) -> None:
    path = tmp_path / "run"
    overrides = (*OVERRIDES, "federation.rounds=1")
    simulate(compose_experiment(overrides), path)
    (path / "report.html").unlink()
    shutil.rmtree(path / "checkpoints")
    summary = (path / "summary.json").read_bytes()
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"finished with adapter .*, and no checkpoint there holds it; restore"):
            simulate(compose_experiment(overrides), path, resume=True)
    assert (path / "summary.json").read_bytes() == summary


@pytest.mark.rare
def test_encoded_changes_go_on_too(tmp_path: Path) -> None:
    """What sites hold, and what a change left out, is part of what a round leaves."""
    coded = ("quantization=eden", "quantization.bits=2", "quantization.downlink=same", "federation.cohort_size=null")
    overrides = (*OVERRIDES, *coded)
    expected = simulate(compose_experiment(overrides), tmp_path / "undisturbed" / "run").summary
    path = tmp_path / "run"
    died = subprocess.run(
        [sys.executable, "-c", KILLED, str(path), "while sites train", *overrides],
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert died.returncode == -9, died.stderr[-2000:]
    resumed = simulate(compose_experiment(overrides), path, resume=True).summary
    assert resumed["adapter"] == expected["adapter"]
    assert resumed["bytes"] == expected["bytes"]


CLIENT_LEVEL = (
    *(each for each in OVERRIDES if "insecure" not in each and "cohort_size" not in each),
    "evaluation.every=0",  # noise for two sites drowns everything, and a run whose model is seen to be ruined ends
)


@pytest.mark.parametrize(
    ("privacy", "point"),
    [
        (("privacy=client_level", "privacy.clipping.kind=adaptive"), "before the checkpoint"),
        (("privacy=client_level_tree",), "during the checkpoint"),
    ],
)
@pytest.mark.rare
def test_the_servers_own_noise_goes_on_too(privacy: tuple[str, ...], point: str, tmp_path: Path) -> None:
    """The noise comes from the server's key, so what was released once is released again, and is charged once.

    An undisturbed run has another key, so the killed run is compared with one that goes on from a copy of its folder.
    """
    overrides = (*CLIENT_LEVEL, *privacy)
    path = tmp_path / "first" / "run"
    died = subprocess.run(
        [sys.executable, "-c", KILLED, str(path), point, *overrides], capture_output=True, text=True, timeout=1800
    )
    assert died.returncode == -9, died.stderr[-2000:]
    released = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    norms = {event["round"]: event["update_norm"] for event in released if event["kind"] == "round_finished"}
    assert sorted(norms) == [1, 2]
    twin = tmp_path / "second" / "run"
    shutil.copytree(path, twin)
    experiment = compose_experiment(overrides)
    one, two = (simulate(experiment, each, resume=True).summary for each in (path, twin))
    assert one["adapter"]["digest"] == two["adapter"]["digest"]
    assert {each["round"]: each["update_norm"] for each in one["rounds"]} | norms == {
        each["round"]: each["update_norm"] for each in one["rounds"]
    }
    assert one["privacy"]["epsilon"] <= (experiment.privacy.target_epsilon or 0) * (1 + 1e-9)  # type: ignore[union-attr]


def test_only_an_interrupted_run_of_the_same_experiment_is_resumed(tmp_path: Path) -> None:
    experiment = compose_experiment(OVERRIDES)
    with pytest.raises(ConfigError, match=r"is no run directory: it has no config.json, so there is nothing to resume"):
        RunDirectory(tmp_path / "none", experiment, "base", resume=True)
    held = RunDirectory(tmp_path / "run", experiment, "base")
    with pytest.raises(ConfigError, match="is still going on in another process; stop that one first"):
        RunDirectory(tmp_path / "run", experiment, "base", resume=True)
    with pytest.raises(ConfigError, match="was started with another experiment; a run is resumed as it was"):
        RunDirectory(tmp_path / "run", compose_experiment([*OVERRIDES, "seed=3"]), "base", resume=True)
    assert held.newest_checkpoint() is None


def test_a_damaged_or_foreign_checkpoint_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    same = {"run": "run", "config_digest": "c", "base_digest": "b"}
    for number in (1, 2, 3):
        made = Checkpoint(number, {}, ServerState(numbers={"n": float(number)}), ("a",), {}, Sent(), {"a": (number,)})
        save_checkpoint(tmp_path, made, **(same if number < 3 else same | {"base_digest": "other"}))
    assert load_newest(tmp_path, **same) == Checkpoint(
        2, {}, ServerState({}, {"n": 2.0}), ("a",), {}, Sent(), {"a": (2,)}
    )
    assert "round-00003.safetensors is passed over: it has another base_digest" in caplog.text
    (tmp_path / "round-00002.safetensors").write_bytes(os.urandom(100))
    found = load_newest(tmp_path, **same)
    assert found is not None
    assert found.round == 1
    assert "round-00002.safetensors is passed over: it cannot be read" in caplog.text


def test_what_a_killed_server_left_of_a_checkpoint_is_removed(tmp_path: Path) -> None:
    held = RunDirectory(tmp_path / "run", compose_experiment(OVERRIDES), "base")
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir()
    (folder / ".round-00001.safetensors.x1y2").write_bytes(b"half")
    held.save_checkpoint(Checkpoint(1, {}, ServerState(numbers={}), ("a",), {}, Sent(), {}))
    assert [path.name for path in folder.iterdir()] == ["round-00001.safetensors"]


def test_events_of_work_done_again_are_told_once() -> None:
    started, rounds = RunStarted("run", 3, ("a",), 1), [RoundStarted(number, ("a",)) for number in (1, 2)]
    resumed = RunResumed("run", 1, 3, ("a",))
    assert surviving([started, *rounds, resumed, rounds[1]]) == [started, rounds[0], resumed, rounds[1]]
    assert surviving([started, *rounds, started, rounds[0]]) == [started, rounds[0]]
    with pytest.raises(ValueError):
        parse_event('{"kind": "unknown"}')
