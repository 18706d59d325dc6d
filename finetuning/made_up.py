"""Made-up examples: what is tried on a network before a record is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from finetuning.batches import Example, framed

__all__ = ["made_up_examples"]


def made_up_examples(
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: int,
    lengths: Sequence[int],
    *,
    classes: int | None = None,
    context: int | None = None,
    seed: int = 0,
) -> tuple[Example, ...]:
    """Return examples of random tokens, none of them special but those that frame a text to be classified.

    Args:
        tokenizer: says which tokens are special, and how a text is framed.
        vocabulary: ids that the network knows.
        lengths: tokens of each example, frame included.
        classes: of a classifier; None for a language model, whose tokens are all learned.
        context: cuts what is longer.
        seed: of the tokens.
    """
    special: set[Any] = {*tokenizer.all_special_ids, cast("Any", tokenizer.pad_token_id)}
    usable = np.array([each for each in range(min(vocabulary, len(tokenizer))) if each not in special])
    generator = np.random.default_rng(seed)
    examples: list[Example] = []
    for position, length in enumerate(min(each, context or each) for each in lengths):
        ids = generator.choice(usable, length).astype(np.int32)
        label = None if classes is None else position % classes
        examples.append(Example(framed(ids, tokenizer, label is not None), np.ones(length, dtype=np.bool_), label))
    return tuple(examples)
