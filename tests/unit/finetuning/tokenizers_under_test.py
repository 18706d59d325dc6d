"""Small tokenizers of every kind that models come with."""

import json
from collections.abc import Callable, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

TEXT = ["once upon a time, there was an unhappy cat. it ate the fish, and then it was happy again </s> <s> x = foo(1)"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
NAMES = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2: a space belongs to the word after it; offsets leave it out."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXT * 4,
        trainers.BpeTrainer(
            vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, min_frequency=1, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHATML, **NAMES)


def sentencepiece(*, strips: bool = False) -> PreTrainedTokenizerFast:
    """As Llama 2: a text, and what comes after a special token, gets a space before it; bytes for unknown characters.

    With `strips`, white space at both ends of a text is dropped.
    """
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Punctuation()]
    )
    trained.train_from_iterator(
        TEXT * 4,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
            initial_alphabet=list("▁abcdefghijklmnopqrstuvwxyz</>s,.|=()1"),
            min_frequency=1,
            show_progress=False,
        ),
    )
    learned = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    backend = Tokenizer(
        models.BPE(vocab=learned["vocab"], merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    edges = [normalizers.Replace(Regex(r"\A +| +\z"), "")] if strips else []
    backend.normalizer = normalizers.Sequence([*edges, normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHATML, **NAMES)


def unigram() -> PreTrainedTokenizerFast:
    """As T5 and XLM-R: the vocabulary holds `</s>` as a piece like any other, and the best one."""
    pieces = [(name, 0.0) for name in SPECIAL]
    pieces += [(letter, -8.0) for letter in "▁abcdefghijklmnopqrstuvwxyz</>,.|=()1"]
    pieces += [("▁the", -3.0), ("▁un", -4.0), ("happy", -4.0), ("▁there", -4.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=3))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHATML, **NAMES)


def wordpiece() -> PreTrainedTokenizerFast:
    """As BERT: a word, and the pieces that go on with it."""
    letters = "abcdefghijklmnopqrstuvwxyz</>,.|=()1"
    words = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), "there", "happy", "time"]
    backend = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHATML, **NAMES)


def word_level() -> PreTrainedTokenizerFast:
    """Whole words, of which `</s>` is one."""
    words = [*SPECIAL, "once", "upon", "a", "time", "x", "y", "old"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHATML, **NAMES)


def slow() -> PreTrainedTokenizerBase:
    """Written in Python, without offsets: every byte is a token."""
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = CHATML
    return tokenizer


def with_turns(tokenizer: PreTrainedTokenizerBase, *others: AddedToken) -> PreTrainedTokenizerBase:
    """Return the tokenizer with the tokens that its chat template frames turns with."""
    turns = [AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>")]
    tokenizer.add_tokens([*turns, *others])
    return tokenizer


EVERY: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte level": byte_level,
    "sentencepiece": sentencepiece,
    "sentencepiece, strips": lambda: sentencepiece(strips=True),
    "unigram": unigram,
    "wordpiece": wordpiece,
    "word level": word_level,
    "slow": slow,
}


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Return the strings of tokens."""
    return list(tokenizer.convert_ids_to_tokens(list(ids)))
