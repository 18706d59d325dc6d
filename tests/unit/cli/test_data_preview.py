"""`cloister data preview`: rendering from plain data, and the command on the embedded clinics."""

import subprocess
import sys
from importlib import import_module
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from rich.console import Console, RenderableType
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from cli.data import (
    _decoded_runs,
    app,
    hidden_tokens,
    length_histogram,
    percentile,
    rendered_example,
    rendered_holdings,
    rendered_legend,
)
from conf.schema.data import DataConfig, PromptCompletionColumns
from finetuning.batches import Example, tokenize_rows
from protocol.errors import DataError


def shown(renderable: RenderableType, *, color: bool = False) -> str:
    console = Console(file=StringIO(), width=100, force_terminal=color, color_system="standard" if color else None)
    console.print(renderable)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_learned_text_stands_out_and_read_text_is_dim() -> None:
    text = shown(rendered_example("example 1", [("prompt ", False), ("answer", True)]), color=True)
    assert "\x1b[2mprompt \x1b[0m" in text
    assert "\x1b[1;32m⟦answer⟧\x1b[0m" in text
    assert "example 1" in text
    assert "⟦learned⟧ - read, not learned" in shown(rendered_legend())


def test_records_can_neither_style_nor_steer_the_terminal() -> None:
    text = shown(rendered_example("e", [("[red]x[/red] \x1b[31mred\x07\nnext", True)]))
    assert "[red]x[/red]" in text
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "\N{REPLACEMENT CHARACTER}[31mred\N{REPLACEMENT CHARACTER}" in text


def test_the_histogram_counts_every_length_once() -> None:
    text = shown(length_histogram([1, 1, 2, 20], buckets=2))
    assert "p50 1, p90 20, max 20" in text
    assert [line.split()[0] for line in text.splitlines()[2:]] == ["1-10", "11-20"]
    assert [line.split()[-1] for line in text.splitlines()[2:]] == ["3", "1"]


@pytest.mark.parametrize(
    ("lengths", "first"), [([7, 7], ["7", "█" * 40, "2"]), ([3, 4], ["3", "█" * 40, "1"]), ([], [])]
)
def test_the_histogram_of_few_lengths(lengths: list[int], first: list[str]) -> None:
    rows = [line.split() for line in shown(length_histogram(lengths)).splitlines() if "█" in line]
    assert rows[:1] == ([first] if first else [])


@pytest.mark.parametrize(("percent", "expected"), [(0, 1), (50, 2), (75, 3), (90, 10), (100, 10)])
def test_a_percentile_is_a_value_that_occurs(percent: int, expected: int) -> None:
    assert percentile([1, 2, 3, 10], percent) == expected


def test_the_table_of_holdings_has_totals() -> None:
    text = shown(rendered_holdings("label", ["north", "south"], ["no", "yes"], [[3, 4], [5, 6]]))
    assert "records per site and label" in text
    assert [line.strip("│ ").split("│")[-1].strip() for line in text.splitlines() if "th " in line] == ["7", "11"]
    assert "total" not in shown(rendered_holdings(None, ["north"], ["records"], [[3]]))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    letters = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@pytest.fixture
def composed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stand in for configuration and model; return the overrides that each run asked for."""
    file = tmp_path / "rows.csv"
    sites = ["north"] * 6 + ["south"] * 4
    lines = [f"question {number} ,answer{number},{site},no" for number, site in enumerate(sites)]
    file.write_text("\n".join(["text,completion,site,label", *lines]))
    columns: dict[str, object] = {"kind": "prompt_completion", "prompt": "text"}
    asked: list[list[str]] = []

    def compose_experiment(overrides: list[str]) -> SimpleNamespace:
        asked.append(list(overrides))
        labelled = "labelled" in overrides
        tree = {
            "source": {"path": str(file)},
            "columns": {"kind": "labelled"} if labelled else columns,
            "partition": {"kind": "natural_key"},
        }
        task = SimpleNamespace(labels=("no", "yes") if labelled else None)
        return SimpleNamespace(data=DataConfig.model_validate(tree), model=object(), task=task, seed=0)

    import_module("simulations.population")  # it needs the real modules
    compose, loading = ModuleType("conf.compose"), ModuleType("finetuning.models")
    compose.compose_experiment = compose_experiment  # type: ignore[attr-defined]
    loading.load_tokenizer = lambda model: byte_tokenizer()  # type: ignore[attr-defined]
    loading.stated_context = lambda model: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "conf.compose", compose)
    monkeypatch.setitem(sys.modules, "finetuning.models", loading)
    return asked


def test_preview_shows_examples_report_lengths_and_sites(composed: list[list[str]], tmp_path: Path) -> None:
    plot = tmp_path / "held.svg"
    result = CliRunner().invoke(app, ["preview", "seed=0", "--examples", "2", "--plot", str(plot)])
    assert result.exit_code == 0, result.output
    assert composed == [["seed=0"]]
    assert result.output.count("question") == 2
    for part in ("example 2: ", "⟦learned⟧ - read, not learned", "2 sites: ", "rows kept", "p90", "north", "south"):
        assert part in result.output
    assert plot.stat().st_size > 0


def test_preview_of_one_site_and_without_examples(composed: list[list[str]]) -> None:
    result = CliRunner().invoke(app, ["preview", "--site", "south", "--examples", "0"])
    assert result.exit_code == 0, result.output
    assert "site south: " in result.output
    assert "question" not in result.output


def test_preview_of_labelled_data_names_the_label(composed: list[list[str]]) -> None:
    result = CliRunner().invoke(app, ["preview", "labelled", "--examples", "1"])
    assert result.exit_code == 0, result.output
    assert "tokens, label no" in result.output
    assert "records per site and label" in result.output


def rewrite(tmp_path: Path, *lines: str) -> Path:
    file = tmp_path / "rows.csv"
    file.write_text("\n".join(lines) + "\n")
    return file


def test_what_indices_stand_for_is_said(composed: list[list[str]], tmp_path: Path) -> None:
    rewrite(tmp_path, "text,site,label", *["a,north,1", "b,north,0"] * 6)
    result = CliRunner().invoke(app, ["preview", "labelled"])
    assert "labels are indices into task.labels: 0 = no, 1 = yes" in result.output
    rewrite(tmp_path, "text,site,label", *["a,north,yes", "b,north,no"] * 6)
    assert "indices" not in CliRunner().invoke(app, ["preview", "labelled"]).output


def test_a_site_with_nothing_to_learn_is_named(composed: list[list[str]], tmp_path: Path) -> None:
    rewrite(tmp_path, "text,completion,site", *["a,b,north"] * 20, *["a,,south"] * 6)
    failed = CliRunner().invoke(app, ["preview"]).exception
    assert isinstance(failed, DataError)
    assert str(failed).startswith("site south: none of ")
    assert f" of {tmp_path / 'rows.csv'})" in str(failed)


def test_rows_left_out_are_named_on_either_side(composed: list[list[str]], tmp_path: Path) -> None:
    """Line 4 is empty: whether it was dealt to the site or held out, it is named."""
    seen: set[bool] = set()
    for count in range(12, 24):
        rewrite(tmp_path, "text,completion,site", "a,b,n", "a,b,n", "a,,n", *["a,b,n"] * count)
        output = CliRunner().invoke(app, ["preview"]).output
        if "1 row left out" in output:
            assert f"line 4 of {tmp_path / 'rows.csv'}" in output
            seen.add("held out: 1 row left out" in output)
        else:
            assert "none of 1 row" in str(CliRunner().invoke(app, ["preview"]).exception)
    assert False in seen


def test_a_fault_is_that_of_the_file(composed: list[list[str]], tmp_path: Path) -> None:
    rewrite(tmp_path, "text;completion;site", "a;b;north")
    assert "line 1: the separator is ';'" in str(CliRunner().invoke(app, ["preview"]).exception)
    rewrite(tmp_path, "text,label,site", *['"a\na",no,north'] * 9, "b,-1,south")
    assert "line 20: label '-1' is not in task.labels" in str(
        CliRunner().invoke(app, ["preview", "labelled"]).exception
    )


def test_an_unknown_site_names_the_nearest(composed: list[list[str]]) -> None:
    result = CliRunner().invoke(app, ["preview", "--site", "sauth"])
    assert isinstance(result.exception, DataError)
    assert "no site 'sauth'; did you mean 'south'?; sites: north, south; change --site" in str(result.exception)


def test_importing_the_command_imports_no_torch() -> None:
    code = "import sys, cli.data; print(sorted({'torch', 'transformers', 'datasets', 'hydra'} & set(sys.modules)))"
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"


def sentencepiece() -> PreTrainedTokenizerFast:
    words = ["<s>", "</s>", "▁", ",", "▁once", "▁there", *"abcdefghijklmnopqrstuvwxyz</>"]
    backend = Tokenizer(models.Unigram([(word, -float(len(words) - len(word))) for word in words], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def test_tokens_are_named_where_their_text_hides_them() -> None:
    tokenizer = sentencepiece()
    ids = {piece: tokenizer.convert_tokens_to_ids(piece) for piece in ("<s>", "▁once", ",", "▁", "▁there", "</s>")}

    def of(*learned: str) -> Example:
        run = [*map(ids.__getitem__, ("<s>", "▁once", *learned, "</s>"))]
        return Example(np.array(run, dtype=np.int32), np.arange(len(run)) > 1)

    joint, apart = of(",", "▁there"), of("▁", ",", "▁there")
    assert hidden_tokens(joint, tokenizer) == [f"learned tokens: ,={ids[',']} ▁there={ids['▁there']}"]
    assert _decoded_runs(joint, tokenizer)[1] == (", there</s>", True)
    assert _decoded_runs(apart, tokenizer)[1] == (" , there</s>", True), "the space that would be learned shows"


def test_special_letters_are_told_from_the_special_token() -> None:
    rows = [{"prompt": "q", "completion": "a</s>"}, {"prompt": "q", "completion": "a"}]
    tokenizer = byte_tokenizer()
    literal, plain = tokenize_rows(rows, PromptCompletionColumns(), tokenizer, max_length=None).examples
    assert hidden_tokens(plain, tokenizer) == []
    (line,) = hidden_tokens(literal, tokenizer)
    assert [each.split("=")[0] for each in line.removeprefix("learned tokens: ").split()] == [*"a</s>"]
    assert "learned tokens: a=" in shown(rendered_example("e", [("q", False)], [line]))


def test_a_long_run_is_named_around_what_is_hidden() -> None:
    row = {"prompt": "q", "completion": "a" * 30 + "</s>" + "b" * 30}
    tokenizer = byte_tokenizer()
    only = tokenize_rows([row], PromptCompletionColumns(), tokenizer, max_length=None).examples[0]
    (line,) = hidden_tokens(only, tokenizer)
    assert line.startswith("learned tokens: ... a=")
    assert line.endswith(" ...")
    assert len(line.split()) == 2 + 16 + 2
