"""Client-level rounds: the whole server, from cohort to ledger, over sites whose updates are known."""

import hashlib
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import server.budget
from client.app import client_app
from conf.compose import compose_experiment
from finetuning.checkpoints import load_tensors
from protocol.cards import SiteCard
from protocol.errors import FederationError, PrivacyError, SiteRefusal
from protocol.instructions import Instruction, PrivacyStatement, Reply, ReplyHeader
from protocol.tensors import NamedTensors
from server.app import Launch, serve
from server.events import Event, Observer, RoundStarted
from simulations.in_process import InProcessGrid
from simulations.simulate import simulate

POPULATION = 10
CLIP = 0.5


@dataclass
class KnownSite:
    """Sends the same direction every time, clipped to what it was told; keeps what it was asked."""

    name: str
    asked: list[Instruction] = field(default_factory=list)
    factor: float = 1.0
    says_below: bool | None = None
    silent_after: int = 10**9
    """The last round in which it does its work."""

    def card(self, challenge: bytes = b"") -> SiteCard:
        return SiteCard(cloister_version="0", site=self.name, published_records=100)

    def handle(self, instruction: Instruction) -> Reply:
        header = instruction.header
        self.asked.append(instruction)
        if header.round > self.silent_after:
            raise SiteRefusal("stopping", "away")
        assert header.clip_norm is not None
        values = sum(tensor.numel() for tensor in instruction.tensors.values())
        size = self.factor * header.clip_norm / math.sqrt(values)
        update = {name: torch.full_like(tensor, size) for name, tensor in instruction.tensors.items()}
        return Reply(
            ReplyHeader(
                status="trained",
                site=self.name,
                round=header.round,
                plan_digest=header.plan_digest,
                base_digest=header.base_digest,
                adapter_digest=header.adapter_digest,
                steps=header.plan.local.steps,
                below_clip=self.says_below,
                ledger_heads={"site": hashlib.sha256(f"{self.name} {header.round}".encode()).hexdigest()},
            ),
            update,
        )


@dataclass
class Run:
    """What a run left, and what its sites saw."""

    path: Path
    sites: list[KnownSite]

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.path / "summary.json").read_text())

    def adapter(self, round_number: int) -> NamedTensors:
        stored = load_tensors(self.path / "checkpoints" / f"round-{round_number:05d}.safetensors")[0]
        return {name.removeprefix("adapter/"): tensor for name, tensor in stored.items()}

    def moved(self, after: int, before: int) -> torch.Tensor:
        """All values of the difference of two rounds' adapters that were trained."""
        new, old = self.adapter(after), self.adapter(before)
        return torch.cat(
            [(new[name] - old[name]).flatten() for name in sorted(new) if not torch.equal(new[name], old[name])]
        )


@pytest.fixture
def run(tmp_path: Path, tiny_model: Callable[..., Path]) -> Callable[..., Run]:
    def start(
        *overrides: str,
        privacy: str = "client_level",
        sites: list[KnownSite] | None = None,
        observe: Observer = lambda event: None,
        resume: bool = False,
    ) -> Run:
        sites = sites or [KnownSite(f"site-{number}") for number in range(POPULATION)]
        experiment = compose_experiment(
            (
                f"privacy={privacy}",
                f"privacy.clip_norm={CLIP}",
                f"model.path={tiny_model('llama')}",
                "peft.rank=16",
                "strategy=fedit",
                "federation.rounds=3",
                "evaluation.every=0",
                "logging.keep_checkpoints=100",
                *overrides,
            )
        )
        app = client_app(lambda context: sites[int(context.node_config["partition-id"])])  # type: ignore[arg-type, return-value]
        grid = InProcessGrid(app, [{"partition-id": position} for position in range(len(sites))])
        launch = Launch(experiment, tmp_path / "run", (observe,), (), expected_sites=len(sites), resume=resume)
        serve(grid, launch)
        return Run(tmp_path / "run", sites)

    return start


def test_the_noise_on_the_mean_is_the_calibrated_one(run: Callable[..., Run]) -> None:
    """Two rounds' difference: an estimate of a known deviation; five of its own are allowed (error rate 6e-7)."""
    made = run("privacy.target_epsilon=6")
    statement = finished(made)[-1]
    assert statement.delta == pytest.approx(1 / (10 * POPULATION))
    moved = made.moved(2, 1)
    expected = statement.noise_multiplier * CLIP / POPULATION
    mean = CLIP / math.sqrt(len(moved))
    deviation = float((moved.double() - mean).square().mean().sqrt())
    assert deviation == pytest.approx(expected, rel=5 / math.sqrt(2 * len(moved)))
    assert float(moved.mean()) == pytest.approx(mean, abs=5 * expected / math.sqrt(len(moved)))


def test_the_statement_adds_up_to_the_target_and_says_who_adds_the_noise(run: Callable[..., Run]) -> None:
    made = run("privacy.target_epsilon=6")
    spent = [statement.epsilon_run for statement in finished(made)]
    assert spent == sorted(spent)
    assert 0.99 * 6 <= spent[-1] <= 6
    privacy = made.summary["privacy"]
    assert (privacy["unit"], privacy["epsilon"]) == ("site", spent[-1])
    assert "the server being trusted to add the noise" in privacy["relation"]
    assert [part["unit"] for part in privacy["joint"]] == ["site"]
    assert "whole site" in (made.path / "report.html").read_text()


def test_the_budget_is_reserved_before_anybody_is_asked_and_committed_before_the_adapter_is_stored(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[tuple[str, int, int]] = []
    sites = [KnownSite("only"), KnownSite("other")]
    for name in ("reserve", "commit"):
        original = getattr(server.budget.RunBudget, name)

        def watched(self: Any, *values: Any, name: str = name, original: Any = original) -> Any:
            stored = len(list((tmp_path / "run" / "checkpoints").glob("*")))
            seen.append((name, len(sites[0].asked), stored))
            return original(self, *values)

        monkeypatch.setattr(server.budget.RunBudget, name, watched)
    run("federation.rounds=2", sites=sites)
    assert seen == [("reserve", 0, 0), ("commit", 1, 0), ("reserve", 1, 1), ("commit", 2, 1)]


def test_correlated_noise_is_reserved_once_and_sites_rest(run: Callable[..., Run]) -> None:
    made = run("federation.rounds=8", "federation.cohort_size=5", privacy="client_level_blt")
    spent = [statement.epsilon_run for statement in finished(made)]
    assert spent[0] == spent[-1] == pytest.approx(8.0, rel=2e-3)
    for site in made.sites:
        rounds = [instruction.header.round for instruction in site.asked]
        assert len(rounds) == 4
        assert all(later - earlier == 2 for earlier, later in itertools.pairwise(rounds))


def test_a_schedule_that_the_limits_forbid_asks_nobody(run: Callable[..., Run]) -> None:
    sites = [KnownSite(f"site-{number}") for number in range(4)]
    with pytest.raises(PrivacyError, match=r"min_separation=2 with 4 of 4 sites in every round needs 8 sites"):
        run("privacy.noise.min_separation=2", privacy="client_level_banded", sites=sites)
    assert not any(site.asked for site in sites)


def test_an_empty_secret_cohort_is_noised_and_stepped_and_names_nobody(run: Callable[..., Run]) -> None:
    made = run(
        "federation.cohort_sampling=poisson",
        "federation.cohort_size=1",
        "federation.rounds=8",
        "privacy.insecure_seed=3",
        "privacy.noise_multiplier=1",
        "privacy.target_epsilon=null",
    )
    asked = [sum(i.header.round == number for s in made.sites for i in s.asked) for number in range(1, 9)]
    assert 0 in asked[1:]
    assert sum(asked) > 0
    empty = asked.index(0, 1) + 1
    moved = made.moved(empty, empty - 1)
    assert float(moved.double().square().mean().sqrt()) == pytest.approx(CLIP, rel=5 / math.sqrt(2 * len(moved)))
    assert made.summary["privacy"]["insecure_seed"]
    first, *events = (made.path / "metrics.jsonl").read_text().splitlines()
    assert "site-3" in first, "who is enrolled is public"
    assert not any("site-" in event for event in events)
    assert made.summary["bytes"] == {"down": None, "up": None}
    assert all(site["bytes"] == {"down": None, "up": None} for site in made.summary["sites"].values())
    assert "withheld" in (made.path / "report.html").read_text()
    finished = [json.loads(event) for event in events if '"round_finished"' in event]
    assert len(finished) == 8
    # An empty cohort is not waited for, and what is folded takes time: either would tell.
    for told in ("accepted", "rejected", "train_s", "aggregate_s", "other_s"):
        assert {event[told] for event in finished} == {None}, told
    assert json.loads(events[-1]) | {"adapter_digest": ""} == {
        "kind": "run_finished",
        "run": made.path.name,
        "seconds": None,
        "adapter_digest": "",
    }
    for seconds in (made.summary["seconds"], *(item["seconds"] for item in made.summary["rounds"])):
        assert {phase for phase, value in seconds.items() if value is not None} == {"evaluate"}
    page = (made.path / "report.html").read_text()
    assert "it would tell how many sites were in a secret cohort" in page
    assert "could not be drawn" not in page


MOST_OF_THEM = ("federation.cohort_sampling=poisson", "federation.cohort_size=9", "federation.rounds=3")


def test_noise_alone_is_not_handed_out_as_an_adapter(run: Callable[..., Run], tmp_path: Path) -> None:
    """Rounds of a secret cohort must not fail one by one; a run in which nobody ever replied must."""
    sites = [KnownSite(f"site-{number}", silent_after=0) for number in range(POPULATION)]
    with pytest.raises(FederationError, match="no update of any site was used in any of the 3 rounds") as caught:
        run(*MOST_OF_THEM, sites=sites)
    assert any(site.asked for site in sites)
    made = Run(tmp_path / "run", sites)
    assert made.summary["status"] == "failed"
    assert str(caught.value) in made.summary["error"]
    assert not (made.path / "adapter").exists()
    assert "site-" not in made.summary["error"]
    assert all(item["accepted"] == [] for item in made.summary["rounds"])
    assert "run_finished" not in (made.path / "metrics.jsonl").read_text()


class Killed(BaseException):
    """Ends a run without a word."""


@pytest.mark.parametrize(("silent_after", "fails"), [(0, True), (1, False)])
def test_whether_anybody_replied_is_remembered_over_a_resume(
    run: Callable[..., Run], silent_after: int, fails: bool, tmp_path: Path
) -> None:
    def die(event: Event) -> None:
        if isinstance(event, RoundStarted) and event.round == 3:
            raise Killed

    sites = [KnownSite(f"site-{number}", silent_after=silent_after) for number in range(POPULATION)]
    with pytest.raises(Killed):
        run(*MOST_OF_THEM, sites=sites, observe=die)
    if fails:
        with pytest.raises(FederationError, match="no update of any site was used"):
            run(*MOST_OF_THEM, sites=sites, resume=True)
    else:
        run(*MOST_OF_THEM, sites=sites, resume=True)
        assert (tmp_path / "run" / "adapter").is_dir()


def test_a_checkpoint_does_not_tell_who_has_replied_nor_whether_anybody_has(
    run: Callable[..., Run], tmp_path: Path
) -> None:
    sites = [KnownSite(f"site-{number}", silent_after=1) for number in range(POPULATION)]
    run(*MOST_OF_THEM, sites=sites)
    stored = [
        json.loads(load_tensors(tmp_path / "run" / "checkpoints" / f"round-{number:05d}.safetensors")[1]["cloister"])
        for number in (1, 2, 3)
    ]
    marks = {each["protection"].pop("heard") for each in stored}
    assert len(marks) == 3, "the same answer under another name each time"
    assert {len(mark) for mark in marks} == {64}
    assert [each["protection"].keys() for each in stored] == [{"rounds", "clip_norm", "inputs"}] * 3
    assert all(each["heads"] == each["unused"] == {} for each in stored)
    reminded = [instruction.header.ledger_heads for site in sites for instruction in site.asked]
    assert any(reminded), "this server remembers all the same"


@pytest.mark.parametrize(
    ("site", "overrides", "code", "reason"),
    [
        (
            KnownSite("liar", factor=1.01),
            (),
            "norm_above_clip",
            "the update has norm 0.505, the site was to clip it to 0.5",
        ),
        (
            KnownSite("liar"),
            ("privacy.clipping.kind=adaptive", "+privacy.clipping.count_noise=20"),
            "missing_bit",
            "the reply does not say whether its norm was below the clip",
        ),
    ],
)
def test_a_reply_that_breaks_the_clip_is_not_summed(
    run: Callable[..., Run], site: KnownSite, overrides: tuple[str, ...], code: str, reason: str
) -> None:
    honest = [KnownSite(f"site-{number}", says_below=True) for number in range(3)]
    made = run(*overrides, "federation.rounds=1", sites=[*honest, site])
    (rejected,) = made.summary["rounds"][0]["rejected"]
    assert (rejected["site"], rejected["code"]) == ("liar", code)
    assert reason in rejected["reason"]


def test_an_adaptive_clip_norm_travels_to_the_sites(run: Callable[..., Run]) -> None:
    """All say "not below": the norm grows from round to round, but for the count's noise."""
    sites = [KnownSite(f"site-{number}", says_below=False) for number in range(POPULATION)]
    made = run("privacy.clipping.kind=adaptive", "+privacy.clipping.count_noise=1", "privacy.noise_multiplier=1.9",
               "privacy.target_epsilon=null", "privacy.insecure_seed=1", sites=sites)  # fmt: skip
    norms = [instruction.header.clip_norm for instruction in sites[0].asked]
    assert norms[0] == CLIP
    assert norms == sorted(set(norms))  # type: ignore[type-var]
    assert not any("below_clip" in line for line in (made.path / "metrics.jsonl").read_text().splitlines())


def test_real_sites_protect_both_units(tmp_path: Path) -> None:
    """End to end with trained updates: each site clips, and its own promise stands beside the server's."""
    experiment = compose_experiment(
        (
            "experiment=smoke",
            "privacy=client_level",
            "privacy.clip_norm=0.1",
            "privacy.local.kind=example_level",
            "+privacy.local.noise_multiplier=2",
            "data.max_records=80",
            "data.max_length=96",
            "federation.rounds=1",
            "federation.sites_per_person=2",
            "federation.local.steps=1",
            "federation.local.expected_batch_size=2",
            "evaluation.every=0",
            "runtime.threads=1",
        )
    )
    summary = simulate(experiment, tmp_path / "run").summary
    assert len(summary["rounds"][0]["accepted"]) == 4
    site, record = summary["privacy"]["joint"]
    assert site["sites_per_person"] == record["sites_per_person"] == 2
    assert site["epsilon"] < site["epsilon_over_sites"]
    assert record["epsilon"] < record["epsilon_over_sites"] < 2 * record["epsilon"] + 1
    assert "For a person known at up to 2 sites together" in (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert (site["unit"], record["unit"]) == ("site", "record")
    assert record["delta"] < site["delta"]
    assert 0 < record["epsilon"] == max(s["privacy"]["epsilon_run"] for s in summary["sites"].values())
    page = (tmp_path / "run" / "report.html").read_text()
    assert site["relation"] in page
    assert record["relation"] in page
    assert "for one site and " in page
    assert "For a person known at up to <strong>2 sites</strong>" in page


def finished(made: Run) -> list[PrivacyStatement]:
    events = [json.loads(line) for line in (made.path / "metrics.jsonl").read_text().splitlines()]
    return [PrivacyStatement(**event["privacy"]) for event in events if event["kind"] == "round_finished"]


def test_the_log_of_a_secret_cohort_names_no_site(run: Callable[..., Run], caplog: pytest.LogCaptureFixture) -> None:
    sites = [KnownSite(f"site-{number}", factor=1.5) for number in range(POPULATION)]
    with pytest.raises(FederationError, match="no update of any site was used in any of the 1 rounds"):
        run("federation.cohort_sampling=poisson", "federation.cohort_size=9", "federation.rounds=1", sites=sites)
    assert "a reply was not used: norm_above_clip" in caplog.text
    assert "site-" not in "".join(record.getMessage() for record in caplog.records if "not used" in record.getMessage())
