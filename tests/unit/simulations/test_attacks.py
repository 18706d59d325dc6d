"""What attackers send, by their papers' formulas, and what the study makes of it."""

from pathlib import Path

import pytest
import torch

from conf.schema.data import LabelledColumns, PromptCompletionColumns, TextColumns
from protocol.errors import ConfigError, DataError
from simulations.attacks import ATTACKS, TARGET, TRIGGER, attack_named, triggered
from simulations.study_lines import LineFile
from simulations.study_robustness import (
    Cell,
    Result,
    cells_of,
    plot_results,
    run_robustness,
    study_experiment,
)

OWN = {"x": torch.tensor([1.0, -2.0])}
HONEST = [{"x": torch.tensor([1.0, 0.0])}, {"x": torch.tensor([3.0, 0.0])}]
TINY = (
    "data.partition.sites=3",
    "data.max_records=60",
    "data.max_length=48",
    "federation.rounds=1",
    "federation.local.steps=1",
    "federation.local.expected_batch_size=2",
    "evaluation.every=1",
    "evaluation.max_examples=4",
)


def sent(name: str) -> torch.Tensor:
    update = ATTACKS[name].update
    assert update is not None
    return update(OWN, HONEST, torch.Generator().manual_seed(0))["x"]


def test_what_attackers_send_follows_from_the_formulas() -> None:
    assert torch.equal(sent("sign_flip"), torch.tensor([-4.0, 8.0]))
    assert torch.equal(sent("scaling"), torch.tensor([10.0, -20.0]))
    # mean (2, 0), deviation (1, 0), z = 1.5
    assert torch.equal(sent("a_little_is_enough"), torch.tensor([0.5, 0.0]))
    assert torch.equal(sent("inner_product"), torch.tensor([-4.0, 0.0]))
    assert torch.equal(sent("backdoor"), torch.tensor([3.0, -6.0]))


def test_a_gauge_leaves_the_product_and_ruins_the_factors() -> None:
    drawn = torch.Generator().manual_seed(0)
    shapes = {"q.lora_A.weight": (2, 5), "q.lora_B.weight": (3, 2), "score.weight": (2, 2)}
    start, own = ({name: torch.randn(each, generator=drawn) for name, each in shapes.items()} for _ in range(2))
    factors = ATTACKS["gauge"].factors
    assert factors is not None
    made = factors(own, start)

    def product(update: dict[str, torch.Tensor]) -> torch.Tensor:
        return (start["q.lora_B.weight"] + update["q.lora_B.weight"]) @ (
            start["q.lora_A.weight"] + update["q.lora_A.weight"]
        )

    torch.testing.assert_close(product(dict(made)), product(own), rtol=1e-3, atol=1e-3)
    assert float(made["q.lora_B.weight"].norm()) > 500 * float(own["q.lora_B.weight"].norm())
    assert torch.equal(made["score.weight"], own["score.weight"])


def test_noise_is_four_times_the_update_long_and_repeats() -> None:
    update = ATTACKS["noise"].update
    assert update is not None
    own = {"x": torch.ones(20_000)}
    noise = update(own, [], torch.Generator().manual_seed(1))["x"] - own["x"]
    assert float(noise.norm() / own["x"].norm()) == pytest.approx(4.0, rel=0.03)
    assert torch.equal(update(own, [], torch.Generator().manual_seed(1))["x"] - own["x"], noise)


def test_collusion_without_anybody_to_overhear_is_refused() -> None:
    update = ATTACKS["inner_product"].update
    assert update is not None
    with pytest.raises(ConfigError, match="attackers that collude answer after the honest sites"):
        update(OWN, [], torch.Generator())


def test_poisoned_records() -> None:
    columns = PromptCompletionColumns()
    rows = [{"prompt": f"p{n}", "completion": f"c{n}", "site": "a"} for n in range(4)]
    flip, backdoor = ATTACKS["label_flip"].rows, ATTACKS["backdoor"].rows
    assert flip is not None
    assert backdoor is not None
    assert [row["completion"] for row in flip(rows, columns)] == ["c2", "c3", "c0", "c1"]
    poisoned = backdoor(rows, columns)
    assert [row["completion"] for row in poisoned] == [TARGET, "c1", TARGET, "c3"]
    assert poisoned[0]["prompt"] == "p0" + TRIGGER
    labelled = [{"text": "t", "label": label} for label in ("no", "yes", "no")]
    assert [row["label"] for row in flip(labelled, LabelledColumns())] == ["yes", "no", "yes"]
    assert {row["label"] for row in triggered(labelled, LabelledColumns())} == {"no"}
    for poison in (flip, backdoor):
        with pytest.raises(DataError, match="prompt_completion or labelled, not text"):
            poison([{"text": "t"}], TextColumns())


def test_unknown_names_and_shares_are_refused() -> None:
    with pytest.raises(ConfigError, match="attack 'rain' does not exist; choose among none, sign_flip"):
        attack_named("rain")
    with pytest.raises(ConfigError, match="rule 'vote' does not exist; choose among mean, norm_bound"):
        list(cells_of(["vote"], ["none"], [0.2]))
    with pytest.raises(ConfigError, match=r"fraction=0.5 of attackers must lie between 0 and 0.5"):
        list(cells_of(["mean"], ["noise"], [0.5]))


def test_a_study_runs_its_cells_goes_on_where_it_stopped_and_says_what_was_refused(tmp_path: Path) -> None:
    experiment = study_experiment(TINY)
    seen: list[Cell] = []

    def see(result: Result) -> None:
        seen.append(result.cell)

    cells = [Cell("median", "none", 0.0), Cell("median", "inner_product", 0.34), Cell("bulyan", "scaling", 0.34)]
    first = run_robustness(experiment, cells[:2], tmp_path, see)
    stamp = (tmp_path / "runs" / cells[0].name / "summary.json").stat().st_mtime_ns
    results = run_robustness(experiment, cells, tmp_path, see)
    assert (tmp_path / "runs" / cells[0].name / "summary.json").stat().st_mtime_ns == stamp, "it ran again"
    assert results[:2] == first
    assert seen == [*cells[:2], *cells]
    assert [each.attackers for each in results] == [0, 1, 1]
    assert all(each.quality is not None and each.backdoor_success == 0.0 for each in results[:2])
    assert results[0].quality != results[1].quality
    assert results[2].quality is None
    assert "robust=bulyan needs 7 replies in a round" in results[2].refused
    stored = LineFile(tmp_path / "results.csv", Result).read()
    assert stored == results
    other = study_experiment([*TINY, "seed=1"])
    assert not [each for each in stored if each.digest == other.digest]
    assert plot_results(results, tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
