"""Prompt and completion are one text: its ids, whose tokens they are, and how long a sequence may be."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from conf.schema.data import ChatColumns, InstructionColumns, PromptCompletionColumns
from finetuning import encoders
from finetuning.batches import TokenizedRows, tokenize_rows
from finetuning.prompts import Segment, segments
from finetuning.tokenizing import TokenizedText, sequence_bound, tokenize_segments
from protocol.errors import DataError

from .tokenizers_under_test import CHATML, EVERY, byte_level, pieces, sentencepiece, slow, with_turns

PAIRS = [
    ("once upon a time", ", there was a cat."),
    ("un", "happy"),
    ("x = ", "foo(1)"),
    ("a", "b"),
    ("it ate\n", "\n the fish"),
    ("é😀", "€ ﬁ"),
    ("  a  ", "  b  "),
    ("", "once"),
]
SPM, BYTES = sentencepiece(), byte_level()


def joint(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> TokenizedText:
    row = [each for each in (Segment(prompt, False), Segment(completion, True)) if each.text]
    return tokenize_segments([row], tokenizer)[0]


def plain(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def learned(text: TokenizedText, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return pieces(tokenizer, [token for token, trained in zip(text.ids, text.trained, strict=True) if trained])


def tokenized(row: dict[str, Any], columns: Any, tokenizer: PreTrainedTokenizerBase, **options: Any) -> TokenizedRows:
    return tokenize_rows([row], columns, tokenizer, max_length=None, **options)


@pytest.mark.parametrize("kind", EVERY)
def test_the_ids_are_those_of_the_joint_text(kind: str) -> None:
    tokenizer = EVERY[kind]()
    for prompt, completion in PAIRS:
        found = joint(prompt, completion, tokenizer)
        assert found.ids == plain(prompt + completion, tokenizer)
        first = found.trained.index(True)
        assert all(found.trained[first:]), "nothing of a completion goes unlearned"
        if not found.is_merged:
            alone = plain(prompt, tokenizer) if prompt else []
            assert found.ids[: len(alone)] == alone, "the prompt as it is given at generation"


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("once upon a time", ", there", [",", "▁there"]),
        ("un", "(1)", ["(", "1", ")"]),
        ("once", " upon", ["▁upon"]),
        ("once ", "upon", ["▁upon"]),
    ],
)
def test_sentencepiece_learns_no_space_that_is_not_there(prompt: str, completion: str, expected: list[str]) -> None:
    assert learned(joint(prompt, completion, SPM), SPM) == expected


def test_every_kind_of_row_that_has_a_prompt_is_one_text() -> None:
    row = {"instruction": "once", "input": "upon", "response": ", there"}
    only = tokenized(row, InstructionColumns(), SPM).examples[0]
    assert pieces(SPM, only.input_ids[only.trained].tolist()) == [",", "▁there", "</s>"]
    only = tokenized({"prompt": "once", "completion": ", there"}, PromptCompletionColumns(), SPM).examples[0]
    assert pieces(SPM, only.input_ids.tolist())[-3:] == [",", "▁there", "</s>"]


PLAIN_CHAT = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.mark.parametrize("template", [PLAIN_CHAT, CHATML])
@pytest.mark.parametrize("kind", ["byte level", "sentencepiece", "sentencepiece, strips", "unigram", "slow"])
def test_a_chat_is_one_text_at_every_turn(kind: str, template: str) -> None:
    tokenizer = with_turns(EVERY[kind]())
    tokenizer.chat_template = template
    contents = ("once upon", "a time", "there was", ", unhappy", "again", "the fish")
    messages = [
        {"role": ("user", "assistant")[number % 2], "content": content} for number, content in enumerate(contents)
    ]
    found = tokenize_segments([segments({"messages": messages}, ChatColumns(), tokenizer)], tokenizer)[0]
    assert found.ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert not found.is_merged
    for turn in (1, 3, 5):
        asked = tokenizer.apply_chat_template(
            messages[:turn], tokenize=True, return_dict=False, add_generation_prompt=True
        )
        answered = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=True, return_dict=False)
        assert found.ids[: len(asked)] == asked
        assert not found.trained[len(asked) - 1]
        assert all(found.trained[len(asked) : len(answered)])
    assert sum(found.trained) < len(found.trained) / 2 + 1 if template is CHATML else True


def test_a_token_belongs_to_the_segment_of_its_last_character() -> None:
    found = joint("x = ", "foo", BYTES)
    assert learned(found, BYTES)[0].startswith("Ġ")
    assert found.is_merged, "alone, the prompt ends with a token for the space"
    row = [Segment("it ", False), Segment("ate ", True), Segment("the fish", False)]
    only = tokenize_segments([row], BYTES)[0]
    assert only.ids == plain("it ate the fish", BYTES)
    assert BYTES.decode([token for token, each in zip(only.ids, only.trained, strict=True) if each]) == " ate"


def test_white_space_at_the_border_of_a_token_has_its_owner() -> None:
    """The post-processor of GPT-2 leaves white space out of the offsets."""
    found = joint("it ate", " \n ", BYTES)
    assert BYTES.decode([token for token, each in zip(found.ids, found.trained, strict=True) if each]) == " \n "


def test_the_report_counts_prompts_that_end_inside_a_token() -> None:
    rows = [{"prompt": "x = ", "completion": "foo"}, {"prompt": "x =", "completion": " foo"}]
    report = tokenize_rows(rows, PromptCompletionColumns(), BYTES, max_length=None).report
    assert (report.merged, report.has_incidents) == (1, True)
    assert report.sentences()[1].startswith("1 row whose prompt ends inside a token, often with a space: ")
    assert "end prompts before the space" in report.sentences()[1]
    stripping = sentencepiece(strips=True)
    assert tokenize_rows(rows, PromptCompletionColumns(), stripping, max_length=None).report.merged == 0


@pytest.mark.parametrize("kind", ["byte level", "sentencepiece", "unigram"])
def test_without_reliable_offsets_what_a_beginning_shares_is_its_own(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = EVERY[kind]()
    pairs = [("once upon a time", ", there was"), ("un", "(1)"), ("it", " ate"), ("x = ", "foo")]
    expected = [joint(*pair, tokenizer) for pair in pairs]
    asked: list[str] = []
    monkeypatch.setattr(encoders, "_is_reliable", lambda text, offsets: asked.append(text))
    assert [joint(*pair, tokenizer) for pair in pairs] == expected
    assert asked


@pytest.mark.parametrize(
    ("offsets", "reliable"),
    [
        ([(0, 2), (2, 5)], True),
        ([(0, 2), (3, 5)], True),  # a space is left out
        ([(0, 2), (0, 0)], False),
        ([(0, 2)], False),
        ([(0, 1), (3, 5)], False),
        ([(0, 2), (3, 6)], False),
        ([(0, 2), (4, 3), (3, 5)], False),
    ],
)
def test_offsets_that_miss_letters_are_not_relied_on(offsets: list[tuple[int, int]], reliable: bool) -> None:
    assert encoders._is_reliable("ab cd", np.array(offsets)) is reliable  # type: ignore[attr-defined]


def test_a_tokenizer_that_does_more_than_its_backend_is_asked_itself() -> None:
    class Lower(type(BYTES)):  # type: ignore[misc]
        def _encode_plus(self, text: Any, *arguments: Any, **options: Any) -> Any:
            lowered = [each.lower() for each in text] if isinstance(text, list) else text.lower()
            return super()._encode_plus(lowered, *arguments, **options)

    lower = Lower(tokenizer_object=BYTES.backend_tokenizer, eos_token="</s>")
    assert joint("ONCE", " UPON", lower).ids == plain("once upon", BYTES)
    assert learned(joint("ONCE", " UPON", lower), lower) == pieces(BYTES, plain(" upon", BYTES))


ALPHABET = st.text(alphabet="ab un.,\n é😀", max_size=12)


@given(ALPHABET, ALPHABET.filter(bool), st.sampled_from(["byte level", "sentencepiece", "sentencepiece, strips"]))
def test_whatever_the_texts_the_ids_are_joint_and_the_completion_comes_last(
    prompt: str, completion: str, kind: str
) -> None:
    tokenizer = {"byte level": BYTES, "sentencepiece": SPM, "sentencepiece, strips": STRIPPING}[kind]
    found = joint(prompt, completion, tokenizer)
    assert found.ids == plain(prompt + completion, tokenizer)
    assert found.trained == sorted(found.trained)


STRIPPING = sentencepiece(strips=True)


def test_no_rows() -> None:
    assert tokenize_segments([], BYTES) == []
    assert tokenize_segments([()], slow())[0].ids == []


@pytest.mark.parametrize(
    ("wanted", "stated", "context", "bound"),
    [
        (None, 512, 64, 64),
        (None, 64, 512, 64),
        (None, 10**30, 64, 64),
        (None, 64, None, 64),
        (None, 10**30, None, None),
        (16, 64, 64, 16),
        (100, 64, 128, 100),
        (100, 10**30, None, 100),
    ],
)
def test_the_longest_sequence(wanted: int | None, stated: int, context: int | None, bound: int | None) -> None:
    assert sequence_bound(wanted, SimpleNamespace(model_max_length=stated), context) == bound  # type: ignore[arg-type]


def test_a_wish_above_the_context_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"data\.max_length=65 is above the model's context of 64 tokens; use at most 64"
    ):
        sequence_bound(65, SimpleNamespace(model_max_length=512), 64)  # type: ignore[arg-type]
