"""What the study of defaults runs, and what it compares with."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from conf.compose import compose_experiment
from simulations.study_cells import Labels, Line
from simulations.study_quality import EMBEDDED, SETS, markdown_of, plot, probe_accuracy, quality_cells, standings

Make = Callable[..., Path]
LABELS = Labels("quality", "bank", "as chosen", "none", "", 8.0, "dirichlet:0.5", 6, 0.0, 0)


def line(metric: str, base: float, quality: float, **changed: object) -> Line:
    labels = replace(LABELS, **changed)  # type: ignore[arg-type]
    return Line(
        **{name: getattr(labels, name) for name in Labels.__dataclass_fields__},
        metric=metric,
        base=base,
        quality=quality,
        seconds=60.0,
    )


def test_a_classifier_is_held_against_the_probe() -> None:
    (found,) = standings([line("accuracy", 0.1, 0.80), line("accuracy", 0.1, 0.84, seed=1)], {"bank": 0.9})
    assert (found.quality, found.spread, found.seeds) == (pytest.approx(0.82), pytest.approx(0.04), 2)
    assert found.share == pytest.approx(0.82 / 0.9)
    assert "| bank, dirichlet:0.5, 6 sites | 8 | accuracy | 10.0% | 82.0% | 2, 4.0% | 90.0% | 0.911 | 1.0 |" in (
        markdown_of([found])
    )


def test_a_language_model_closes_a_part_of_the_gap_in_nats() -> None:
    """From 100 to 10 is half of the way to 1 in nats."""
    lines = [line("perplexity", 100.0, 10.0), line("perplexity", 100.0, 1.0, epsilon=math.inf)]
    private, open_run = standings(lines, {})
    assert private.share == pytest.approx(0.5)
    assert open_run.share == pytest.approx(1.0)


def test_what_nothing_is_known_of_has_no_share() -> None:
    (alone,) = standings([line("perplexity", 100.0, 10.0)], {})
    (unprobed,) = standings([line("accuracy", 0.1, 0.8)], {})
    assert (alone.share, unprobed.share) == (None, None)
    assert standings([replace(line("accuracy", 0.1, 0.8), quality=None, refused="no")], {}) == []


def test_cells_set_nothing_but_model_data_and_privacy(tmp_path: Path) -> None:
    folder = tmp_path / "banking77"
    folder.mkdir()
    rows = [{"text": "a", "label": name, "split": "train"} for name in ("lost card?", "top up")]
    (folder / "normalized.jsonl").write_text("\n".join(map(json.dumps, rows)))
    encoder = tmp_path / "encoder"
    (encoder / "1_Pooling").mkdir(parents=True)
    (encoder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    private, open_cell, shipped = (
        cell.experiment
        for cell in (
            *quality_cells([SETS["banking77"]], tmp_path, encoder, ["dirichlet:0.5:6"], [3.0, math.inf], [1]),
            *quality_cells([EMBEDDED], None, None, ["iid:2"], [8.0], [0]),
        )
    )
    assert private is not None
    assert open_cell is not None
    assert shipped is not None
    assert private.task.labels == ("lost card?", "top up")
    assert (private.peft.targets, private.federation.rounds, private.privacy.target_epsilon) == ("none", 48, 3.0)
    assert (open_cell.peft.targets, open_cell.privacy.kind) == ("auto", "none")
    assert shipped.federation.local.steps == compose_experiment(()).federation.local.steps


def test_the_probe_reads_what_the_encoder_makes_of_texts(tiny_model: Make, tmp_path: Path) -> None:
    """Two classes that share no word are told apart, whatever the weights of the encoder."""
    words = (("fever", "cough", "pulse"), ("invoice", "transfer", "balance"))
    rows = [
        {"text": " ".join(words[n % 2][(n * k) % 3] for k in range(1, 5)), "label": "ab"[n % 2]} for n in range(120)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    overrides = (
        f"model.path={tiny_model('bert')}",
        "task=classification",
        "task.labels=[a,b]",
        "data=csv_labelled",
        "data.source.format=jsonl",
        f"data.source.path={path}",
        "data.partition.sites=2",
    )
    accuracy = probe_accuracy(compose_experiment((*overrides, "task.pooling=mean")))
    assert accuracy is not None
    assert accuracy > 0.9
    assert probe_accuracy(compose_experiment((*overrides, "task.pooling=model"))) is None


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    found = standings([line("accuracy", 0.1, 0.8), line("accuracy", 0.1, 0.7, epsilon=1.0)], {"bank": 0.9})
    assert plot(found, tmp_path / "share.png").stat().st_size > 1000
