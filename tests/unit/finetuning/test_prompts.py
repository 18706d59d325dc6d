"""Segments of every schema: what is learned, what is only read, and what is refused."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conf.schema.data import (
    ChatColumns,
    Columns,
    InstructionColumns,
    LabelledColumns,
    PromptCompletionColumns,
    TextColumns,
)
from finetuning.prompts import Segment, TrainOn, instruction_prompt, segments
from protocol.errors import DataError

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NUMBERED = "{{ messages | length }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
PICKY = "{% if messages[0].role != 'user' %}{{ raise_exception('start with the user') }}{% endif %}"


def tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    letters = pre_tokenizers.ByteLevel.alphabet()
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(sorted(letters))}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat_template, name_or_path="small")


def turns(*contents: str) -> dict[str, object]:
    """Return a conversation: s:, u: and a: give the role of each message."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return {"messages": [{"role": roles[item[0]], "content": item[2:]} for item in contents]}


@pytest.mark.parametrize(
    ("row", "columns", "train_on", "expected"),
    [
        ({"text": "hi"}, TextColumns(), "completion", [("hi", True)]),
        ({"body": "hi"}, TextColumns(text="body"), "completion", [("hi", True)]),
        ({"text": "hi", "label": "x"}, LabelledColumns(), "all", [("hi", False)]),
        ({"prompt": "p ", "completion": "c"}, PromptCompletionColumns(), "completion", [("p ", False), ("c", True)]),
        ({"prompt": "p ", "completion": "c"}, PromptCompletionColumns(), "all", [("p ", True), ("c", True)]),
        ({"prompt": None, "completion": "c"}, PromptCompletionColumns(), "completion", [("c", True)]),
        (
            {"instruction": "i", "input": "x", "response": "r"},
            InstructionColumns(),
            "completion",
            [("### Instruction:\ni\n\n### Input:\nx\n\n### Response:\n", False), ("r", True)],
        ),
        (
            {"instruction": "i", "response": "r"},
            InstructionColumns(),
            "completion",
            [("### Instruction:\ni\n\n### Response:\n", False), ("r", True)],
        ),
        (
            {"instruction": "i", "input": "unused", "response": "r"},
            InstructionColumns(input=None),
            "completion",
            [("### Instruction:\ni\n\n### Response:\n", False), ("r", True)],
        ),
        (
            turns("s:S", "u:U", "a:A", "u:V", "a:B"),
            ChatColumns(),
            "completion",
            [
                ("<|system|>S<|end|><|user|>U<|end|><|assistant|>", False),
                ("A<|end|>", True),
                ("<|user|>V<|end|><|assistant|>", False),
                ("B<|end|>", True),
            ],
        ),
        (
            turns("u:U", "a:A", "u:V"),
            ChatColumns(),
            "completion",
            [("<|user|>U<|end|><|assistant|>", False), ("A<|end|>", True), ("<|user|>V<|end|>", False)],
        ),
        (turns("u:U", "a:A"), ChatColumns(), "all", [("<|user|>U<|end|><|assistant|>A<|end|>", True)]),
        (turns("u:U"), ChatColumns(), "completion", [("<|user|>U<|end|>", False)]),
        ({"messages": None}, ChatColumns(), "completion", []),
        ({"messages": []}, ChatColumns(), "all", []),
    ],
)
def test_the_pieces_of_a_row(
    row: dict[str, object], columns: Columns, train_on: TrainOn, expected: list[tuple[str, bool]]
) -> None:
    assert segments(row, columns, tokenizer(), train_on) == tuple(Segment(*piece) for piece in expected)


def test_the_pieces_of_a_chat_are_what_the_template_renders_as_a_whole() -> None:
    row = turns("u:U", "a:A", "a:B", "u:V", "a:C")
    whole = tokenizer().apply_chat_template(row["messages"], tokenize=False)
    assert "".join(piece.text for piece in segments(row, ChatColumns(), tokenizer())) == whole


def test_the_prompt_of_an_instruction_is_the_one_to_ask_with() -> None:
    row = {"instruction": "i", "input": "", "response": "r"}
    assert segments(row, InstructionColumns(), tokenizer())[0].text == instruction_prompt("i")


@pytest.mark.parametrize(
    ("row", "columns", "template", "message"),
    [
        (
            {"txt": "a"},
            TextColumns(),
            CHATML,
            r"no column 'text'; present: txt; did you mean 'txt'\?; set data\.columns\.text",
        ),
        (
            {"text": 3},
            TextColumns(),
            CHATML,
            r"column 'text' holds a int \(3\) instead of text; .* set data\.columns\.text",
        ),
        (turns("u:U"), ChatColumns(), None, r"'small' has no chat template; choose an instruct model in model\.path"),
        (
            turns("u:U", "a:A"),
            ChatColumns(),
            NUMBERED,
            r"'small' cannot be split at message 2: .*; use another model .*data\.train_on=all",
        ),
        (
            turns("s:S", "a:A"),
            ChatColumns(),
            PICKY,
            r"rejects messages 1 to 1 \(system\): start with the user; mend the conv",
        ),
        (
            {"messages": "hi"},
            ChatColumns(),
            CHATML,
            r"messages are a str instead of a list; write \[\{.*data\.columns\.messages",
        ),
        (
            {"messages": ["hi"]},
            ChatColumns(),
            CHATML,
            r"message 1 is a str instead of an object with role and content",
        ),
        (
            {"messages": [{"role": "asistant", "content": "x"}]},
            ChatColumns(),
            CHATML,
            r"message 1 has role 'asistant'; allowed: system, user, assistant; did you mean 'assistant'\?",
        ),
        (
            {"messages": [{"role": "user", "content": None}]},
            ChatColumns(),
            CHATML,
            r"message 1 \(user\) has a NoneType as content instead of text; store the content as text",
        ),
    ],
)
def test_a_row_that_does_not_fit_is_refused(
    row: dict[str, object], columns: Columns, template: str | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        segments(row, columns, tokenizer(template), "completion")


def test_a_template_that_cannot_be_split_can_still_be_learned_whole() -> None:
    row = turns("u:U", "a:A")
    assert segments(row, ChatColumns(), tokenizer(NUMBERED), "all") == (Segment("2[U][A]", True),)
