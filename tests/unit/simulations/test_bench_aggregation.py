"""The aggregation bench measures what it says: the values of every linear strategy, and Flower on the same shapes."""

import json

import pytest
import torch

from simulations.bench_aggregation import linear_strategies, main, measure


def test_each_linear_strategy_folds_about_the_values_asked_for() -> None:
    names = linear_strategies()
    assert {"fedit", "ffa_lora"} <= set(names)
    for name in names:
        figures = measure(name, clients=3, values=200_000)
        assert figures["megabytes"] == pytest.approx(3 * 0.8, rel=0.35), name  # whole layers
        assert figures["seconds"] > 0
        assert figures["copy_seconds"] > 0


@pytest.mark.parametrize("name", ["flower", "mean", "fedit"])
def test_a_line_of_the_table_is_printed_for_the_parent_process(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        main(["--measure", name, "2", "131072"])
    finally:
        torch.set_num_threads(threads)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(figures) == {"seconds", "copy_seconds", "megabytes", "peak_mb"}
    assert figures["megabytes"] == pytest.approx(2 * 131072 * 4e-6)
