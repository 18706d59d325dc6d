"""Spreading rows over sites: nothing lost, nothing doubled, and every refusal."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.schema.data import (
    DirichletPartition,
    IidPartition,
    NaturalKeyPartition,
    Partition,
    SizeSkewedPartition,
)
from protocol.errors import DataError
from simulations.partition import OTHERS, Holdings, partition, plot_partition, who_holds_what

Rows = list[dict[str, object]]


def rows(count: int, labels: int = 3) -> Rows:
    return [{"n": number, "label": f"l{number % labels}", "site": f"s{number % 2}"} for number in range(count)]


synthetic = st.one_of(
    st.builds(IidPartition, sites=st.integers(1, 6)),
    st.builds(DirichletPartition, sites=st.integers(1, 4), alpha=st.floats(0.5, 100)),
    st.builds(SizeSkewedPartition, sites=st.integers(1, 5), ratio=st.floats(1, 6)),
)


@given(config=synthetic, count=st.integers(40, 90), seed=st.integers(0, 2**32))
def test_every_row_is_at_exactly_one_site_in_its_old_order(config: Partition, count: int, seed: int) -> None:
    parts = partition(rows(count), config, seed)
    numbers = [[row["n"] for row in part] for part in parts.values()]
    assert sorted(number for part in numbers for number in part) == list(range(count))
    assert all(part and part == sorted(part) for part in numbers)
    assert list(parts) == sorted(parts)
    assert parts == partition(rows(count), config, seed)


@pytest.mark.parametrize(
    "config",
    [IidPartition(sites=3), DirichletPartition(sites=3, alpha=1), SizeSkewedPartition(sites=3, ratio=2)],
    ids=lambda config: config.kind,
)
def test_the_seed_decides(config: Partition) -> None:
    assert partition(rows(60), config, 1) != partition(rows(60), config, 2)


def test_iid_sites_differ_by_one_row_at_most_and_sort_by_name() -> None:
    parts = partition(rows(32), IidPartition(sites=10), seed=0)
    assert list(parts) == [f"site-{number:02d}" for number in range(1, 11)]
    assert Counter(len(part) for part in parts.values()) == {3: 8, 4: 2}


def test_sizes_are_geometric_with_the_ratio_asked_for() -> None:
    # Weights 4 : 2 : 1 of 70 rows.
    parts = partition(rows(70), SizeSkewedPartition(sites=3, ratio=4), seed=0)
    assert [len(part) for part in parts.values()] == [40, 20, 10]


def test_a_small_alpha_skews_labels_more_than_a_large_one() -> None:
    def largest_share(alpha: float) -> float:
        parts = partition(rows(900), DirichletPartition(sites=3, alpha=alpha), seed=0)
        held = who_holds_what(parts, "label")
        return max(max(counts) / max(sum(counts), 1) for counts in held.counts)

    assert largest_share(1000.0) < 0.45 < largest_share(0.1)


def test_a_vanishing_alpha_gives_each_label_to_one_site() -> None:
    parts = partition(rows(60), DirichletPartition(sites=2, alpha=1e-320), seed=0)
    holders = Counter(label for part in parts.values() for label in {row["label"] for row in part})
    assert holders == {"l0": 1, "l1": 1, "l2": 1}


def test_the_natural_key_is_the_site() -> None:
    parts = partition(rows(5), NaturalKeyPartition(), seed=0)
    assert {name: [row["n"] for row in part] for name, part in parts.items()} == {"s0": [0, 2, 4], "s1": [1, 3]}


def test_only_the_named_sites_and_the_large_enough_ones_take_part() -> None:
    assert list(partition(rows(5), NaturalKeyPartition(sites=("s1",)), seed=0)) == ["s1"]
    assert list(partition(rows(5), NaturalKeyPartition(min_records=3), seed=0)) == ["s0"]


@pytest.mark.parametrize(
    ("data", "config", "message"),
    [
        (
            rows(4),
            NaturalKeyPartition(key="sites"),
            r"row 1: no column 'sites'; present: n, label, site; did you mean 'site'\?; set data\.partition\.key",
        ),
        ([{"site": "a"}, {"site": None}], NaturalKeyPartition(), r"row 2: column 'site' names no site; fill it in"),
        (
            [{"site": "northgate"}, {"site": "harbor"}],
            NaturalKeyPartition(sites=("nordgate",)),
            r"no site 'nordgate'; did you mean 'northgate'\?; sites: harbor, northgate; set data\.partition\.sites",
        ),
        (
            rows(5),
            NaturalKeyPartition(sites=("s1",), min_records=3),
            r"site 's1' has 2 records, fewer than data\.partition\.min_records=3; lower it, or drop the site",
        ),
        (
            rows(5),
            NaturalKeyPartition(min_records=9),
            r"no site has data\.partition\.min_records=9 records or more; the largest has 3; lower it",
        ),
        (rows(2), IidPartition(sites=3), r"2 records cannot fill 3 sites .*; set data\.partition\.sites to 2 or less"),
        (rows(2), SizeSkewedPartition(sites=3, ratio=1), r"2 records cannot fill 3 sites"),
        (rows(2), DirichletPartition(sites=3, alpha=1), r"2 records cannot fill 3 sites"),
        (
            rows(9),
            DirichletPartition(sites=2, alpha=1, label="lable"),
            r"no column 'lable'; .* did you mean 'label'\?; set data\.partition\.label",
        ),
        (
            rows(20, labels=1),
            DirichletPartition(sites=10, alpha=0.001),
            r"after 100 draws site-\d\d still has no record: data\.partition\.alpha=0\.001 .*raise data\.partition",
        ),
        (
            rows(20),
            SizeSkewedPartition(sites=3, ratio=1e6),
            r"site-2 is left with no record: 20 records over 3 sites at data\.partition\.ratio=1e\+06; lower",
        ),
    ],
)
def test_what_cannot_be_spread_is_refused_with_the_fix(data: Rows, config: Partition, message: str) -> None:
    with pytest.raises(DataError, match=message):
        partition(data, config, seed=0)


def test_who_holds_what_counts_values_per_site() -> None:
    held = who_holds_what(partition(rows(7), NaturalKeyPartition(), seed=0), "label")
    assert held == Holdings(("s0", "s1"), ("l0", "l1", "l2"), ((2, 1, 1), (1, 1, 1)))
    assert held.totals == (4, 3)


def test_without_a_column_only_records_are_counted() -> None:
    held = who_holds_what({"a": rows(2), "b": rows(3)}, None)
    assert (held.values, held.counts) == (("records",), ((2,), (3,)))


def test_rare_values_are_gathered() -> None:
    held = who_holds_what({"a": [{"v": value} for value in "xxyyz"], "b": [{"v": "w"}]}, "v", most=2)
    assert held.values == ("x", "y", OTHERS)
    assert held.counts == ((2, 2, 1), (0, 0, 1))


@pytest.mark.parametrize("name", ["held.svg", "held.png"])
@pytest.mark.parametrize("column", ["label", None])
def test_a_plot_is_written(tmp_path: Path, name: str, column: str | None) -> None:
    parts = partition(rows(30), DirichletPartition(sites=3, alpha=1), seed=0)
    path = plot_partition(parts, column, tmp_path / name)
    start = path.read_bytes()[:300]
    assert start.startswith(b"\x89PNG") if path.suffix == ".png" else b"<svg" in start or b"<?xml" in start


def test_a_plot_needs_a_known_extension_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a plot ends in \.svg, \.png or \.pdf, not '\.gif'"):
        plot_partition({"a": rows(1)}, None, tmp_path / "held.gif")
    with pytest.raises(DataError, match=r"the folder .*missing does not exist; create it first"):
        plot_partition({"a": rows(1)}, None, tmp_path / "missing" / "held.svg")


def test_two_spellings_of_a_site_are_one_site(caplog: pytest.LogCaptureFixture) -> None:
    names = ["North", "north ", "North", "Mu\u0308ller", "Müller", "Müller", 7, 7.0, "Nor\u200bth", "b"]
    spelled: Rows = [{"n": number, "site": name} for number, name in enumerate(names)]
    parts = partition(spelled, NaturalKeyPartition(), seed=0)
    assert {name: [row["n"] for row in part] for name, part in parts.items()} == {
        "7": [6, 7],
        "M-ller": [3, 4, 5],
        "North": [0, 1, 2, 8],
        "b": [9],
    }
    assert "data.partition.key='site' names 4 sites in 8 spellings: 4 differed" in caplog.text
    assert list(partition(spelled, NaturalKeyPartition(sites=("NORTH", "B")), seed=0)) == ["North", "b"]
    with pytest.raises(DataError, match=r"data\.partition\.sites names 'North' in 2 spellings; name it once"):
        partition(spelled, NaturalKeyPartition(sites=("north", "North")), seed=0)


def test_sites_of_other_names_that_would_be_called_the_same_are_refused() -> None:
    with pytest.raises(DataError, match=r"row 2: sites 'a b' and 'a/b' would both be called 'a-b'; rename one"):
        partition([{"site": "a b"}, {"site": "a/b"}], NaturalKeyPartition(), seed=0)


@pytest.mark.parametrize("blank", ["", " ", "\u200b", float("nan")])
def test_a_blank_is_no_site(blank: object) -> None:
    with pytest.raises(DataError, match=r"row 2: column 'site' names no site"):
        partition([{"site": "NA"}, {"site": blank}], NaturalKeyPartition(), seed=0)
