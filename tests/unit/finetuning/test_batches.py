"""Token ids, masks, reports, padding and micro-batches."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conf.schema.data import ChatColumns, InstructionColumns, LabelledColumns, PromptCompletionColumns, TextColumns
from finetuning.batches import IGNORED, Example, TokenizedRows, collate, micro_batches, tokenize_rows
from protocol.errors import DataError

SPECIAL = ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<cls>", "<sep>")
PAD, BOS, EOS, USER, ASSISTANT, CLS, SEP = range(len(SPECIAL))
TEMPLATE = (
    "<s>{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer(*, bos: bool = True, cls: bool = False, context: int | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte, so that lengths can be counted by eye."""
    vocabulary = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(vocabulary)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    named = {"pad_token": "<pad>", "eos_token": "</s>"}
    named |= {"bos_token": "<s>"} if bos else {}
    named |= {"cls_token": "<cls>", "sep_token": "<sep>"} if cls else {}
    others = {"extra_special_tokens": [piece for piece in SPECIAL if piece not in named.values()]}
    limit = {} if context is None else {"model_max_length": context}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **named, **others, **limit)


BYTES = tokenizer()


def tokenized(rows: Sequence[dict[str, object]], columns: object = None, **options: object) -> TokenizedRows:
    chosen = {"max_length": None, **options}
    return tokenize_rows(rows, columns or PromptCompletionColumns(), chosen.pop("on", BYTES), **chosen)  # type: ignore[arg-type]


def pair(prompt: str, completion: str) -> dict[str, object]:
    return {"prompt": prompt, "completion": completion}


def example(length: int, label: int | None = None) -> Example:
    return Example(np.arange(1, length + 1, dtype=np.int32), np.arange(length) % 2 == 1, label)


def test_bos_prompt_completion_eos() -> None:
    only = tokenized([pair("ab", "cd")]).examples[0]
    assert BYTES.convert_ids_to_tokens(only.input_ids.tolist()) == ["<s>", "a", "b", "c", "d", "</s>"]
    assert only.trained.tolist() == [False, False, False, True, True, True]
    assert only.label is None
    assert (only.input_ids.dtype, only.trained.dtype) == (np.int32, np.bool_)


def test_without_a_bos_token_none_is_added() -> None:
    assert len(tokenized([pair("ab", "cd")], on=tokenizer(bos=False)).examples[0]) == 5


@pytest.mark.parametrize(
    ("columns", "row"),
    [(TextColumns(), {"text": "abc"}), (InstructionColumns(), {"instruction": "i", "input": "", "response": "abc"})],
)
def test_eos_is_learned_after_text_and_response(columns: object, row: dict[str, object]) -> None:
    only = tokenized([row], columns).examples[0]
    learned = only.input_ids[only.trained].tolist()
    assert learned[-1] == EOS
    assert BYTES.decode(learned[:-1]) == "abc"


def test_a_chat_has_only_what_its_template_writes() -> None:
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    only = tokenized([row], ChatColumns()).examples[0]
    q, a = BYTES("qa", add_special_tokens=False)["input_ids"]
    assert only.input_ids.tolist() == [BOS, USER, q, ASSISTANT, a, EOS]
    assert only.trained.tolist() == [False, False, False, False, True, True]


@given(st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=20))
def test_the_learned_tokens_decode_to_the_completion(prompt: str, completion: str) -> None:
    only = tokenized([pair(prompt, completion)]).examples[0]
    assert len(only.input_ids) == len(only.trained)
    assert BYTES.decode(only.input_ids[only.trained][:-1].tolist()) == completion
    assert BYTES.decode(only.input_ids[~only.trained][1:].tolist()) == prompt


@given(st.text(max_size=30), st.text(min_size=1, max_size=30), st.integers(3, 40))
def test_truncation_keeps_the_start(prompt: str, completion: str, max_length: int) -> None:
    rows = [pair(prompt, completion), pair("", "x")]
    whole, cut = tokenized(rows), tokenized(rows, max_length=max_length)
    kept = 1 not in cut.report.emptied
    assert cut.report.truncated == int(len(whole.examples[0]) > max_length)
    if kept:
        assert cut.examples[0].input_ids.tolist() == whole.examples[0].input_ids[:max_length].tolist()
        assert cut.examples[0].trained.tolist() == whole.examples[0].trained[:max_length].tolist()
    else:
        assert not whole.examples[0].trained[:max_length].any()


def test_the_report_counts_and_names_what_happened() -> None:
    rows = [pair("ab", "cd"), pair("abcdef", "g"), pair("ab", ""), pair("a", "bcdefgh"), pair("", "")]
    result = tokenized(rows, max_length=6)
    assert (result.report.rows, result.report.kept, result.report.truncated) == (5, 2, 2)
    assert result.report.emptied == (2, 3, 5)
    assert (result.report.tokens, result.report.trained_tokens) == (12, 3 + 4)
    assert result.report.sentences() == [
        "2 of 5 rows kept: 12 tokens, 7 of them learned",
        "2 rows cut to data.max_length=6 tokens",
        "3 rows left out, with nothing to learn (empty, or cut before the completion): 2, 3, 5",
    ]


def test_a_report_without_incidents_is_one_sentence() -> None:
    assert tokenized([pair("a", "b")]).report.sentences() == ["1 of 1 row kept: 4 tokens, 2 of them learned"]


def test_many_rows_left_out_are_not_all_named() -> None:
    report = tokenized([*[pair("a", "")] * 12, pair("a", "b")]).report
    assert report.sentences()[1].endswith("1, 2, 3, 4, 5, 6, 7, 8, 9, 10, ...")


def test_no_rows_give_no_examples() -> None:
    assert tokenized([]).examples == ()
    assert tokenized([]).report.rows == 0


def test_without_max_length_the_context_of_the_tokenizer_holds() -> None:
    result = tokenized([pair("ab", "cdefgh")], on=tokenizer(context=5))
    assert len(result.examples[0]) == 5
    assert result.report.max_length == 5
    assert tokenized([pair("ab", "cd")]).report.max_length is None


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [pair("a", "b"), pair("ab", "cde")],
            {"max_length": 6, "truncation": "refuse"},
            r"row 2: 7 tokens are more than data\.max_length=6; shorten the row, .* set data\.truncation=truncate",
        ),
        (
            [pair("a", "")],
            {},
            r"none of 1 row has anything to learn: texts or completions are empty; check data\.columns",
        ),
        ([pair("abc", "d")], {"max_length": 3}, r"none of 1 row .*; 1 were cut to data\.max_length=3: raise it"),
        ([pair("a", "b"), pair("a", 3)], {}, r"row 2: column 'completion' holds a int \(3\)"),  # type: ignore[arg-type]
        ([pair("a", "b"), {"prompt": "a"}], {}, r"row 2: no column 'completion'; present: prompt"),
        (
            [{"prompt": "a", "answer": "b"}],
            {},
            r"no column 'completion'; present: prompt, answer; set data\.columns\.comp",
        ),
    ],
)
def test_rows_that_cannot_be_used(rows: list[dict[str, object]], options: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        tokenized(rows, **options)


def test_a_bound_of_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match="max_length=1 must be at least 2"):
        tokenized([pair("a", "b")], max_length=1)


def labelled(*labels: object) -> list[dict[str, object]]:
    return [{"text": "ab", "label": label} for label in labels]


def test_labels_are_names_or_indices() -> None:
    for labels in (("no", "yes", "yes", "no"), (0, 1, 1, "0")):
        result = tokenized(labelled(*labels), LabelledColumns(), labels=("no", "yes"))
        assert [item.label for item in result.examples] == [0, 1, 1, 0]
        assert result.report.trained_tokens == 0
        assert result.report.sentences() == ["4 of 4 rows kept: 12 tokens"]


def test_a_name_that_looks_like_a_number_is_a_name_first() -> None:
    result = tokenized(labelled(1, "3"), LabelledColumns(), labels=("1", "2", "3"))
    assert [item.label for item in result.examples] == [0, 2]


def test_a_labelled_text_is_framed_as_its_model_expects_even_when_cut() -> None:
    a, b = BYTES("ab", add_special_tokens=False)["input_ids"]
    options = {"labels": ("no", "yes"), "on": tokenizer(cls=True)}
    assert tokenized(labelled("no"), LabelledColumns(), **options).examples[0].input_ids.tolist() == [CLS, a, b, SEP]
    cut = tokenized(labelled("no"), LabelledColumns(), max_length=3, **options)
    assert cut.examples[0].input_ids.tolist() == [CLS, a, SEP]
    assert cut.report.truncated == 1
    plain = tokenized(labelled("no"), LabelledColumns(), labels=("no", "yes"))
    assert plain.examples[0].input_ids.tolist() == [BOS, a, b]


def test_an_empty_labelled_text_is_left_out() -> None:
    rows = [{"text": "", "label": "no"}, *labelled("yes")]
    assert tokenized(rows, LabelledColumns(), labels=("no", "yes")).report.emptied == (1,)


@pytest.mark.parametrize("label", ["maybee", 3, -1, True, None, "²"])
def test_a_label_outside_the_set(label: object) -> None:
    with pytest.raises(DataError, match=r"row 2: label .* is not in task\.labels \(no, maybe, yes; or 0 to 2\)"):
        tokenized(labelled("no", label), LabelledColumns(), labels=("no", "maybe", "yes"))


def test_a_misspelled_label_names_the_nearest() -> None:
    with pytest.raises(DataError, match=r"'maybee' .*did you mean 'maybe'\?; mend the row, or add the label"):
        tokenized(labelled("maybee"), LabelledColumns(), labels=("no", "maybe"))


def test_labelled_rows_need_labels() -> None:
    with pytest.raises(DataError, match=r"set task=classification task\.labels"):
        tokenized(labelled("no"), LabelledColumns())
    with pytest.raises(DataError, match=r"row 2: no column 'label'; present: text; set data\.columns\.label"):
        tokenized([*labelled("no"), {"text": "a"}], LabelledColumns(), labels=("no", "yes"))


def test_ten_thousand_short_rows_are_all_kept() -> None:
    rows = [pair(f"question number {number} ", f"answer {number}") for number in range(10_000)]
    assert tokenized(rows, max_length=128).report.kept == 10_000


def test_collate_pads_on_the_right_up_to_the_longest() -> None:
    batch = collate([example(2), example(3)], pad_token_id=9)
    assert batch.size == 2
    assert batch.input_ids.tolist() == [[1, 2, 9], [1, 2, 3]]
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.targets.tolist() == [[IGNORED, 2, IGNORED], [IGNORED, 2, IGNORED]]
    assert batch.labels is None
    assert {batch.input_ids.dtype, batch.attention_mask.dtype, batch.targets.dtype} == {torch.int64}


def test_padding_is_never_a_target_even_when_the_pad_token_is_eos() -> None:
    batch = collate(tokenized([pair("a", "b"), pair("a", "bcd")]).examples, pad_token_id=EOS)
    assert (batch.targets[0] == EOS).sum() == 1
    assert (batch.targets[batch.attention_mask == 0] == IGNORED).all()


def test_collate_carries_labels_and_refuses_a_mixture() -> None:
    batch = collate([example(2, 1), example(3, 0)], pad_token_id=0)
    assert batch.labels is not None
    assert batch.labels.tolist() == [1, 0]
    with pytest.raises(ValueError, match="1 of 2 examples have a label; a batch needs all or none"):
        collate([example(2, 1), example(3)], pad_token_id=0)


def test_an_empty_poisson_draw_is_a_batch_of_size_zero() -> None:
    batch = collate([], pad_token_id=0)
    assert batch.size == 0
    assert batch.input_ids.shape == (0, 0)


def test_a_batch_moves_to_a_device_whole() -> None:
    moved = collate([example(2, 1)], pad_token_id=0).to("meta")
    assert moved.labels is not None
    tensors = (moved.input_ids, moved.attention_mask, moved.targets, moved.labels)
    assert {item.device.type for item in tensors} == {"meta"}
    assert collate([example(2)], pad_token_id=0).to("cpu").labels is None


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 120))
def test_micro_batches_cover_each_position_once_within_the_bound(lengths: list[int], max_tokens: int) -> None:
    groups = micro_batches(lengths, max_tokens=max_tokens)
    assert sorted(position for group in groups for position in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or max(lengths[position] for position in group) * len(group) <= max_tokens
    assert groups == micro_batches(lengths, max_tokens=max_tokens)


def test_micro_batches_need_room_for_a_token() -> None:
    with pytest.raises(ValueError, match="max_tokens=0 must be at least 1"):
        micro_batches([1], max_tokens=0)
