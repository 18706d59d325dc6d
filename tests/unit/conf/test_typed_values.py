"""What YAML or Hydra would read as something else: a text is taken as typed, or the error shows it and how to quote."""

import re
import shlex
import subprocess
from contextlib import suppress

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from conf.compose import InvalidConfiguration, compose_experiment, split_sweep
from conf.typed import Text, for_shell, in_quotes, scan

LABELLED = ("task=classification", "data=csv_labelled", "data.source.path=x.csv")
FREE_TEXT = ("data=jsonl_text", "data.source.path=x.jsonl")


def problems(*overrides: str) -> tuple[str, ...]:
    with pytest.raises(InvalidConfiguration) as caught:
        compose_experiment(overrides)
    assert all("\n" not in problem for problem in caught.value.problems)
    return caught.value.problems


def proposals(problem: str, key: str) -> list[str]:
    """Return the arguments for a key that a problem proposes, as a shell reads them."""
    starts = [found.start() for found in re.finditer(rf"\$?['\"]{re.escape(key)}=", problem) if found.start()]
    return [argument for start in starts if (argument := first_word(problem[start:]))]


def first_word(text: str) -> str | None:
    """Return the first complete word of a shell."""
    for end in [found.start() for found in re.finditer(r"[ ;,]|$", text)]:
        if text.startswith("$"):
            return text[2:end].removesuffix("'").encode().decode("unicode_escape") if text[end - 1] == "'" else None
        with suppress(ValueError):
            (word,) = shlex.split(text[:end])
            return word
    return None


@pytest.mark.parametrize(
    "text",
    [
        *("2024_11_30", "12e4567", "1_000", "007", "0x10", "1.10", "1e3", "+1", ".5", "inf", "NaN", "true", "False"),
        *("on", "yes", "no", "None", "2024-11-30", "1:30", "a:", "a: b", "é", "日本", "ü b", "c++", "#", "a #b", "a;b"),
        *(
            "!x",
            "&x",
            "<a>",
            "`x",
            "^",
            "a|b",
            "~/data",
            "*",
            "%x",
            "@x",
            "-",
            "--",
            "C:\\Users\\x",
            "C:/x",
            "$",
            "a?b",
        ),
    ],
)
def test_a_text_is_what_was_typed(text: str) -> None:
    assert compose_experiment([*FREE_TEXT, f"data.columns.text={text}"]).data.columns.text == text  # type: ignore[union-attr]
    assert compose_experiment([f"data.split_column={text}"]).data.split_column == text
    assert compose_experiment([f"data.partition={{kind:natural_key,key:{text}}}"]).data.partition.key == text  # type: ignore[union-attr]
    assert compose_experiment([*LABELLED, f"task.labels=[{text}, other]"]).task.labels == (text, "other")  # type: ignore[union-attr]
    assert compose_experiment([f"peft.targets=[x,{text}]"]).peft.targets == ("x", text)


def test_numbers_that_are_names() -> None:
    assert compose_experiment([*LABELLED, "task.labels=[1,2,3_0]"]).task.labels == ("1", "2", "3_0")  # type: ignore[union-attr]
    keys = compose_experiment([f"federation.site_keys={{1_0:{'a' * 64}}}"]).federation.site_keys
    assert keys == {"1_0": "a" * 64}


@pytest.mark.parametrize(
    ("typed", "literal"),
    [
        ("[1,2]", "[1,2]"),
        ("{a:1}", "{a:1}"),
        ("null", "null"),
        ("a,b", "a,b"),
        ("a=b", "a=b"),
        ("a'b", "a'b"),
        ('a"b', 'a"b'),
        ("'a", "'a"),
        ("a(b)", "a(b)"),
        ("(a)", "(a)"),
        ("a]", "a]"),
        ("[a,", "[a,"),
        ("{a", "{a"),
        ("~", "~"),
        ("${", "${"),
        ("${x}", "${x}"),
        ("x${a.b}", "x${a.b}"),
        (" a", " a"),
        ("a\t", "a\t"),
        ("\\\\server\\share", "\\\\server\\share"),
        ("a\\,b", "a\\,b"),
        ("\\'", "\\'"),
        ("x\ny", "x\ny"),
        ("a,\\b'!`$c", "a,\\b'!`$c"),
    ],
)
def test_what_could_be_something_else_is_shown_with_the_quotes_that_make_it_a_text(typed: str, literal: str) -> None:
    (problem,) = problems(*FREE_TEXT, f"data.columns.text={typed}")
    assert typed.replace("\n", r"\n").replace("\t", r"\t") in problem
    read = [
        compose_experiment([*FREE_TEXT, line]).data.columns.text  # type: ignore[union-attr]
        for line in proposals(problem, "data.columns.text")
        if "=[" not in line
    ]
    assert literal in read


@pytest.mark.parametrize(
    ("typed", "proposed"),
    [
        ("[null,b]", "\"task.labels=['null',b]\""),
        ("[[a],b]", "\"task.labels=['[a]',b]\""),
        ("[a=1,b]", "\"task.labels=['a=1',b]\""),
        ("[a,]", "\"task.labels=[a,'']\""),
        ("5", '"task.labels=[5]"'),
        ("2024_11_30", '"task.labels=[2024_11_30]"'),
        ("a,b", '"task.labels=[a,b]"'),
    ],
)
def test_one_wrong_item_is_one_problem(typed: str, proposed: str) -> None:
    (problem,) = problems(*LABELLED, f"task.labels={typed}")
    assert typed.strip("[]").split(",")[0] in problem
    assert proposed in problem


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("privacy.delta=12e4567", "privacy.delta=12e4567: input should be a finite number"),
        ("federation.rounds=12e4567", "federation.rounds=12e4567: input should be a finite number"),
        ("model.dtype=1_6", "model.dtype=1_6: input should be 'fp32', 'bf16' or 'fp16'"),
        ("peft.rank=null", "peft.rank=null: input should be a valid integer"),
        (
            "peft.targets=c++",
            "peft.targets='c++': input should be 'auto' or 'none' or a list; a list of one is \"peft.targets=[c++]\"",
        ),
        ("data.partition.kind=1_0", "data.partition.kind=1_0 does not exist; choose one of 'natural_key'"),
        ("federation.rounds=true", "federation.rounds=true: input should be a number, not true or false"),
        ("federation.site_ranks=[8,true]", "federation.site_ranks.1=true: input should be a number"),
        ("name=???", "name=??? marks a value that is yet to be given"),
        ("strategy=fedit,flora", "strategy=fedit,flora names several values; to run each, add -m"),
        ("data.columns={kind:text,text:[1]}", "data.columns.text=[1]: input should be a valid string"),
        ("+name=x", "Could not append to config. An item is already at 'name'."),
    ],
)
def test_the_value_is_shown_as_it_was_typed(line: str, problem: str) -> None:
    (told,) = problems(line)
    assert told.startswith(problem)


def test_a_broken_reference_hides_no_other_problem() -> None:
    told = problems("name=${x}", "logging.directory=${oc.env:NO_SUCH_VARIABLE}", "peft.rank=0")
    assert len(told) == 3
    assert told[2].startswith("peft.rank=0:")


def test_a_reference_still_refers() -> None:
    assert compose_experiment(["federation.rounds=7", "seed=${federation.rounds}"]).seed == 7


def test_a_sweep_keeps_what_was_typed() -> None:
    jobs = split_sweep(
        ["name=2024_11_30,1e3", "data.train_value=007", "data.heldout_value=1_0", "peft.rank=choice(1_0,2)"]
    )
    assert [job[0] for job in jobs] == ["name=2024_11_30"] * 2 + ["name=1e3"] * 2
    assert {job[1:3] for job in jobs} == {("data.train_value=007", "data.heldout_value=1_0")}
    assert [job[3] for job in jobs] == ["peft.rank=1_0", "peft.rank=2"] * 2
    assert [compose_experiment(job).name for job in jobs[::2]] == ["2024_11_30", "1e3"]
    assert split_sweep(["peft.targets=[a,b],[é]", "seed=range(1,3)"])[2] == ("peft.targets=[é]", "seed=1")


def test_what_cannot_be_enumerated_is_no_sweep() -> None:
    with pytest.raises(InvalidConfiguration, match=r"'seed=interval\(1,5\)' cannot be swept over"):
        split_sweep(["seed=interval(1,5)"])


@settings(max_examples=500)
@given(st.text(st.one_of(st.sampled_from("\\'\"${}[](),=:ab \n\t!`#~?"), st.characters(exclude_categories=["Cs"]))))
@example("\\\\${x}\\")
@example("'\\\"")
def test_quotes_give_back_every_text(text: str) -> None:
    """The whole way: Hydra's grammar, then OmegaConf's interpolation."""
    line = f"key={in_quotes(text)}"
    node = OmegaConf.create({"key": OverridesParser.create().parse_override(line).value()})
    assert text == "???" or OmegaConf.to_container(node, resolve=True) == {"key": text}
    assert scan(in_quotes(text)) == Text(in_quotes(text))
    assert not text.isprintable() or shlex.split(for_shell(line)) == [line]


@pytest.mark.parametrize("line", ["k='a b'", 'k="C:\\x"', "a'b\"c`d$e!f\\", "x\ny\t\\'z", "ü\u0085'"])
def test_a_shell_gives_back_every_argument(line: str) -> None:
    script = f"printf %s {for_shell(line)}"
    said = subprocess.run(["bash", "-c", script], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"})
    assert said.stdout.decode() == line
    assert "\n" not in for_shell(line)
