"""What a row says to the model: pieces of text, each marked as learned or only read.

A chat template writes special tokens around the messages. They are pieces of their own, so that the same letters inside
a message stay text (`finetuning.special_tokens`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, assert_never, cast

from conf.schema.data import (
    ChatColumns,
    Columns,
    InstructionColumns,
    LabelledColumns,
    PromptCompletionColumns,
    TextColumns,
)
from finetuning.rows import Row, cell, nearest
from finetuning.special_tokens import SpecialTokens, special_tokens, unused_mark
from protocol.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CHAT_ROLES", "Segment", "TrainOn", "check_content", "instruction_prompt", "segments"]

TrainOn = Literal["completion", "all"]
CHAT_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of text; `trained` says whether its tokens are learned, `special` whether it is a special token."""

    text: str
    trained: bool
    special: bool = False


def segments(
    row: Row,
    columns: Columns,
    tokenizer: PreTrainedTokenizerBase,
    train_on: TrainOn = "completion",
    specials: SpecialTokens | None = None,
) -> tuple[Segment, ...]:
    """Return the pieces of one row, in order, without empty ones.

    ================== =================================================================================
    text               the text, learned
    instruction        the layout of `instruction_prompt`, then the response, learned
    chat               the tokenizer's own chat template; the assistant's turns, with their end marks, learned
    prompt_completion  both exactly as written; the completion learned
    labelled           the text, not learned: the label is what is learned
    ================== =================================================================================

    With `train_on="all"` prompts are learned too. A null is an empty text. Of a chat, those special tokens that its
    template writes are pieces of their own; `specials` says which there are (None: those of the tokenizer).

    Raises:
        DataError: a column is missing or holds no text, or the chat template cannot be applied or split.
    """
    learn_prompt = train_on == "all"
    match columns:
        case TextColumns():
            pieces = (Segment(_text(row, columns.text, "text"), True),)
        case InstructionColumns():
            context = columns.input is not None and columns.input in row and _text(row, columns.input, "input")
            prompt = instruction_prompt(_text(row, columns.instruction, "instruction"), context or "")
            pieces = (Segment(prompt, learn_prompt), Segment(_text(row, columns.response, "response"), True))
        case PromptCompletionColumns():
            prompt = _text(row, columns.prompt, "prompt")
            pieces = (Segment(prompt, learn_prompt), Segment(_text(row, columns.completion, "completion"), True))
        case LabelledColumns():
            pieces = (Segment(_text(row, columns.text, "text"), False),)
        case ChatColumns():
            messages = cell(row, columns.messages, "data.columns.messages")
            known = special_tokens(tokenizer) if specials is None else specials
            pieces = _chat(messages, tokenizer, learn_prompt, known)
        case _:
            assert_never(columns)
    return tuple(piece for piece in pieces if piece.text)


def check_content(row: Row, columns: Columns) -> None:
    """Check what `segments` reads of a row, as far as that takes no tokenizer.

    Raises:
        DataError: a column is missing, holds no text, or no list of messages.
    """
    if isinstance(columns, ChatColumns):
        _messages(cell(row, columns.messages, "data.columns.messages"))
        return
    for field, column in columns:
        if field in ("kind", "label") or column is None or (field == "input" and column not in row):
            continue
        _text(row, str(column), field)


def instruction_prompt(instruction: str, context: str = "") -> str:
    r"""Return the prompt of an instruction; use the same one to ask the trained model.

    The headings are those of Alpaca (Taori et al. 2023), without its preamble, which costs tokens in every example.
    The response follows directly; the block of the input is left out when there is none.

    >>> instruction_prompt("Translate.", "Guten Tag")
    '### Instruction:\nTranslate.\n\n### Input:\nGuten Tag\n\n### Response:\n'
    >>> instruction_prompt("Say hello.")
    '### Instruction:\nSay hello.\n\n### Response:\n'
    """
    given = f"### Input:\n{context}\n\n" if context else ""
    return f"### Instruction:\n{instruction}\n\n{given}### Response:\n"


def _text(row: Row, column: str, field: str) -> str:
    value = cell(row, column, f"data.columns.{field}")
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"column {column!r} holds a {type(value).__name__} ({value!r:.60}) instead of text; "
            f"store it as text, or set data.columns.{field} to another column"
        )
    return value


def _chat(
    value: object, tokenizer: PreTrainedTokenizerBase, learn_prompt: bool, specials: SpecialTokens
) -> tuple[Segment, ...]:
    if not tokenizer.chat_template:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template; choose an instruct model in model.path, "
            "or data.columns.kind=prompt_completion"
        )
    written = _messages(value)
    mark = unused_mark(message["content"] for message in written)
    # What the rendered text then spells was written by the template.
    messages = [message | {"content": specials.hidden(message["content"], mark)} for message in written]
    _check_hidden(written, messages, tokenizer, specials, mark)
    pieces = _turns(messages, tokenizer, learn_prompt)
    return tuple(
        Segment(specials.shown(text, mark), piece.trained, is_special)
        for piece in pieces
        for text, is_special in specials.split(piece.text)
    )


def _turns(
    messages: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase, learn_prompt: bool
) -> Sequence[Segment]:
    pieces: list[Segment] = []
    rendered = ""

    def extend(upto: int, *, cue: bool, trained: bool) -> None:
        nonlocal rendered
        longer = _render(tokenizer, messages[:upto], cue)
        if not longer.startswith(rendered):
            raise DataError(
                f"the chat template of {tokenizer.name_or_path!r} cannot be split at message {upto}: adding a message "
                "changes what stands before it, so the assistant's turns cannot be told apart; "
                "use another model or template, or data.train_on=all"
            )
        pieces.append(Segment(longer[len(rendered) :], trained))
        rendered = longer

    if learn_prompt:
        return [Segment(_render(tokenizer, messages, cue=False), True)] if messages else []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            extend(index, cue=True, trained=False)
            extend(index + 1, cue=False, trained=True)
    if messages and messages[-1]["role"] != "assistant":
        extend(len(messages), cue=False, trained=False)
    return pieces


def _check_hidden(
    written: Sequence[Mapping[str, str]],
    hidden: Sequence[Mapping[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    specials: SpecialTokens,
    mark: str,
) -> None:
    """A template may look into a message, and do something else there with a special token than with other text."""
    if all(one["content"] == other["content"] for one, other in zip(written, hidden, strict=True)):
        return
    if specials.shown(_render(tokenizer, hidden, cue=False), mark) == _render(tokenizer, written, cue=False):
        return
    named = next(name for message in written for name in specials.found_in(message["content"]))
    raise DataError(
        f"a message holds the special token {named!r}, and the chat template of {tokenizer.name_or_path!r} does not "
        "treat it as text; take it out of the message, or set data.special_tokens=parsed to have it read as the token"
    )


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], cue: bool) -> str:
    conversation = [dict(message) for message in messages]
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=cue)
    except Exception as error:  # a template is a program: it may raise whatever its author chose
        roles = " ".join(message["role"] for message in messages)
        raise DataError(
            f"the chat template of {tokenizer.name_or_path!r} rejects messages 1 to {len(messages)} "
            f"({roles}): {error}; mend the conversation, or use another model"
        ) from error
    return cast("str", text)


def _messages(value: object) -> list[dict[str, str]]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise DataError(
            f"messages are a {type(value).__name__} instead of a list; "
            'write [{"role": "user", "content": "..."}, ...], or set data.columns.messages'
        )
    return [_message(number, item) for number, item in enumerate(cast("list[object]", value), start=1)]


def _message(number: int, item: object) -> dict[str, str]:
    if not isinstance(item, Mapping):
        raise DataError(f"message {number} is a {type(item).__name__} instead of an object with role and content")
    message = cast("Mapping[str, object]", item)
    role, content = message.get("role"), message.get("content")
    if role not in CHAT_ROLES:
        raise DataError(
            f"message {number} has role {role!r}; allowed: {', '.join(CHAT_ROLES)}{nearest(str(role), CHAT_ROLES)}"
        )
    if not isinstance(content, str):
        raise DataError(
            f"message {number} ({role}) has a {type(content).__name__} as content instead of text; "
            "store the content as text, and leave out messages without any"
        )
    return {"role": str(role), "content": content}
