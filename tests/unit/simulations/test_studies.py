"""Studies on tiny grids: what runs, what is refused and why, going on after a stop, and what is written."""

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest

from protocol.errors import ConfigError
from simulations.study_cells import Labels, Line, expected_seconds, run_cells
from simulations.study_grids import (
    Grid,
    bits_cells,
    codecs_known,
    default_codecs,
    ranks_cells,
    strategies_cells,
    strategies_known,
)
from simulations.study_lines import LineFile
from simulations.study_report import markdown_of, plot_lines, plot_sites, points_of
from simulations.study_sets import EMBEDDED, REAL_SETS, chosen_sets

TINY = Grid(
    sets=[EMBEDDED],
    epsilons=[math.inf, 3],
    partitions=["iid"],
    sites=[2],
    seeds=[0],
    rounds=1,
    steps=1,
    records=8,
    overrides=("evaluation.max_examples=4", "data.max_records=400", "data.max_length=48"),
)
LABELS = Labels("strategies", "clinics", "ffa_lora", "none", "", math.inf, "iid", 2, 0.032, 0)
LINE = Line(
    "strategies", "clinics", "ffa_lora", "none", "", math.inf, "iid", 2, 0.032, 0,
    metric="perplexity", base=9.0, quality=4.0, bytes_up=1e6, bytes_down=3e6, values=500_000, updates=4,
    records=100.0, seconds=10.0, groups='{"north": 3.0, "south": 5.0}', digest="d",
)  # fmt: skip


def results_of(path: Path) -> list[Line]:
    return LineFile(path / "results.csv", Line).read()


class Stopped(Exception):
    """What a test throws where a person would press Ctrl-C."""


def test_a_study_that_was_stopped_does_only_the_rest(tmp_path: Path) -> None:
    cells = strategies_cells(TINY, ["ffa_lora"])

    def stop(line: Line) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        run_cells(cells, tmp_path, stop)
    first = results_of(tmp_path)
    assert [line.labels for line in first] == [cells[0].labels]
    # What the stop left half done: a folder without a line.
    (tmp_path / "runs" / cells[1].experiment.digest[:16]).mkdir()  # pyright: ignore[reportOptionalMemberAccess]

    began = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/summary.json")}
    seen: list[Line] = []
    lines = run_cells(cells, tmp_path, seen.append)
    assert seen == lines
    assert lines[0] == first[0]
    assert all(path.stat().st_mtime_ns == moment for path, moment in began.items()), "the finished cell ran again"
    assert results_of(tmp_path) == lines
    assert run_cells(cells, tmp_path, lambda line: None) == lines

    open_line, private = lines
    assert (open_line.spent_epsilon, open_line.refused) == (None, "")
    assert private.spent_epsilon == pytest.approx(3, rel=0.02)
    assert private.spent_epsilon is not None
    assert private.spent_epsilon <= 3
    for line in lines:
        assert line.quality is not None
        assert line.base is not None
        assert line.metric == "perplexity"
        assert line.updates == 2
        assert line.bits_per_value == pytest.approx(32, rel=0.05)
    with (tmp_path / "results.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == [
        *("study", "data", "strategy", "codec", "ranks", "epsilon", "partition", "sites", "learning_rate", "seed"),
        *("metric", "base", "quality", "spent_epsilon", "bytes_up", "bytes_down", "values", "updates", "records"),
        *("seconds", "groups", "refused", "digest"),
    ]
    assert [row["epsilon"] for row in rows] == ["inf", "3"]


def test_another_experiments_line_is_not_taken(tmp_path: Path) -> None:
    cell = strategies_cells(replace(TINY, epsilons=[math.inf]), ["ffa_lora"])[0]
    assert cell.experiment is not None
    file = LineFile(tmp_path / "results.csv", Line)
    file.append(replace(LINE, digest="of another experiment"))
    assert expected_seconds([cell], tmp_path, 1) > 0
    file.append(replace(LINE, digest=cell.experiment.digest))
    assert cell.labels == LABELS
    assert expected_seconds([cell], tmp_path, 1) == 0
    assert run_cells([cell], tmp_path, lambda line: None)[0].quality == LINE.quality


def test_the_estimate_uses_the_speed_of_what_is_done(tmp_path: Path) -> None:
    cells = strategies_cells(TINY, ["ffa_lora"])
    assert cells[0].experiment is not None
    LineFile(tmp_path / "results.csv", Line).append(replace(LINE, digest=cells[0].experiment.digest))
    # One cell of 8 records is left, at 100 records in 10 seconds, over two processes.
    assert expected_seconds(cells, tmp_path, 2) == pytest.approx(8 / 10 / 2)


def test_what_the_support_matrix_refuses_is_a_line_with_the_reason(tmp_path: Path) -> None:
    cells = strategies_cells(replace(TINY, epsilons=[math.inf, -1]), ["fedit"])[1:]
    (line,) = run_cells(cells, tmp_path, lambda line: None)
    assert line.quality is None
    assert "privacy.target_epsilon=-1: input should be greater than or equal to 0.000001" in line.refused
    assert results_of(tmp_path) == []


def test_a_study_in_which_nothing_can_run_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no cell of the study can be run: .*peft\.rnk"):
        strategies_cells(replace(TINY, overrides=("peft.rnk=4",)), ["fedit", "ffa_lora"])


def test_what_a_site_refuses_is_a_line_with_the_reason(tmp_path: Path) -> None:
    grid = replace(TINY, epsilons=[math.inf], sites=[500])
    (line,) = run_cells(strategies_cells(grid, ["ffa_lora"]), tmp_path, lambda line: None)
    assert line.quality is None
    assert "records cannot fill 500 sites" in line.refused
    assert results_of(tmp_path) == [line]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: strategies_cells(TINY, ["fedavg"]), r"strategy 'fedavg' does not exist; choose among .*fedit"),
        (lambda: bits_cells(TINY, "x", ["none"]), r"strategy 'x' does not exist"),
        (lambda: bits_cells(TINY, "ffa_lora", ["jpeg:3"]), r"codec 'jpeg' does not exist; choose among .*none"),
        (lambda: bits_cells(TINY, "ffa_lora", ["none:3"]), r"codec 'none:3': none has no setting; eden"),
        (lambda: ranks_cells(TINY, ["ffa_lora"], ["8,x"]), r"ranks '8,x' must be positive integers"),
        (lambda: EMBEDDED.partition("dirichlet:0", 4), r"partition 'dirichlet:0' does not exist; choose iid, own"),
        (lambda: chosen_sets("mnist", None), r"data set 'mnist' does not exist; choose among clinics, medquad"),
    ],
)
def test_a_wrong_name_says_which_are_right(call, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def test_sites_share_the_records_of_a_step() -> None:
    cells = strategies_cells(
        replace(TINY, partitions=["iid", "dirichlet:0.3", "own"], sites=[2, 4], epsilons=[1, math.inf]), ["fedit"]
    )
    assert [(each.labels.partition, each.labels.sites, each.labels.epsilon) for each in cells] == [
        *(("iid", 2, 1), ("iid", 2, math.inf), ("iid", 4, 1), ("iid", 4, math.inf)),
        *(("dirichlet:0.3", 2, 1), ("dirichlet:0.3", 2, math.inf)),
        *(("dirichlet:0.3", 4, 1), ("dirichlet:0.3", 4, math.inf)),
        *(("own", 0, 1), ("own", 0, math.inf)),
    ]
    assert all(each.refused == "" for each in cells)
    assert {each.records for each in cells} == {8}


def test_every_strategy_and_codec_is_in_the_default_grids() -> None:
    assert {"ffa_lora", "fedit"} <= set(strategies_known())
    names = {codec.partition(":")[0] for codec in default_codecs()}
    assert names == set(codecs_known()) - {"lattice"}
    grid = replace(TINY, epsilons=[math.inf])
    assert [cell.refused for cell in bits_cells(grid, "ffa_lora", default_codecs())] == [""] * len(default_codecs())


def test_public_sets_are_left_out_with_a_reason_where_they_are_not(tmp_path: Path) -> None:
    sets, missing = chosen_sets("all", None)
    assert sets == [EMBEDDED]
    assert len(missing) == len(REAL_SETS)
    assert "medquad is left out: no folder of data is given" in missing[0]
    _, missing = chosen_sets("medquad", tmp_path)
    assert missing == [f"medquad is left out: {tmp_path / 'medquad' / 'normalized.jsonl'} does not exist"]


@pytest.mark.parametrize("name", REAL_SETS)
def test_a_public_set_that_is_there_composes(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "normalized.jsonl").write_text("")
    (chosen,), missing = chosen_sets(name, tmp_path)
    assert missing == []
    cells = strategies_cells(replace(TINY, sets=[chosen], partitions=["iid", "dirichlet:0.3", "own"]), ["ffa_lora"])
    assert [cell.refused for cell in cells] == [""] * 6


def test_points_keep_the_best_rate_and_the_mean_of_its_seeds() -> None:
    worse = [replace(LINE, learning_rate=1.0, seed=seed, quality=9.0) for seed in (0, 1)]
    better = [replace(LINE, seed=0, quality=4.0), replace(LINE, seed=1, quality=5.0)]
    (point,) = points_of([*worse, *better])
    assert (point.quality, point.spread, point.seeds, point.megabytes) == (4.5, 1.0, 2, 4.0)
    assert point.bits == pytest.approx(8 * 1e6 / (500_000 * 4))
    assert point.groups == {"north": 3.0, "south": 5.0}
    accuracy = [replace(line, metric="accuracy") for line in (*worse, *better)]
    assert points_of(accuracy)[0].quality == 9.0


def test_text_and_pictures(tmp_path: Path) -> None:
    private = replace(LINE, epsilon=3.0, quality=6.0)
    fedit = replace(LINE, strategy="fedit", quality=3.5, bytes_up=2e6)
    refused = replace(LINE, strategy="fedrot", quality=None, refused="because")
    points = points_of([LINE, private, fedit, refused])
    text = markdown_of(points, "strategies")
    assert "clinics, iid, 2 sites, no privacy: fedit with 3.5 for 5 MB" in text
    assert "| ffa_lora | 4 | 4 | 6 |" in text
    assert "| fedit | 5 | 3.5 | – |" in text
    assert "- refused: fedrot, clinics, iid, 2 sites: because" in text
    for against in ("megabytes", "bits"):
        picture = plot_lines(points, tmp_path / f"{against}.png", against=against)
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size > 5000


def test_text_of_bits_names_the_fewest_that_are_enough() -> None:
    bits = replace(LINE, study="bits")
    lines = [
        replace(bits, quality=4.0, bytes_up=8e6),
        replace(bits, codec="eden:4", quality=4.03, bytes_up=1e6),
        replace(bits, codec="eden:1", quality=4.2, bytes_up=0.25e6),
    ]
    text = markdown_of(points_of(lines), "bits")
    assert "eden:4 at 4.00 bits per value ends at 4.03, float32 at 4." in text
    assert "| eden:1 | 1.00 | 4.2 |" in text


def test_text_and_picture_of_ranks_have_a_column_per_site(tmp_path: Path) -> None:
    mixed = replace(LINE, study="ranks", strategy="hetlora", ranks="8,2", groups='{"north": 3.5, "south": 6.0}')
    points = points_of([replace(LINE, study="ranks", ranks="8,8"), mixed])
    text = markdown_of(points, "ranks")
    assert "| strategy and ranks | privacy | MB | all | north | south |" in text
    assert "| hetlora ranks 8,2 | no privacy | 4 | 4 | 3.5 | 6 |" in text
    assert plot_sites(points, tmp_path / "sites.png").stat().st_size > 5000
