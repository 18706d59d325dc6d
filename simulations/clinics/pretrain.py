"""Pretrain the embedded base: a byte-level BPE tokenizer and a small Llama model on the public text.

Run ``python -m simulations.clinics.pretrain --out DIR --seed 0`` to write a folder that
``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained`` load.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from simulations.clinics.public_text import ASSISTANT, SYSTEM, USER, public_texts

__all__ = [
    "CHAT_TEMPLATE",
    "HELDOUT_SEED_OFFSET",
    "PIECES",
    "SPECIAL_TOKENS",
    "LogLine",
    "Schedule",
    "Shape",
    "build_model",
    "main",
    "pack",
    "pretrain",
    "rate_at",
    "save_base",
    "stream_loss",
    "train",
    "train_tokenizer",
    "window_loss",
    "wrap_tokenizer",
]

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, SYSTEM, USER, ASSISTANT)
HELDOUT_SEED_OFFSET = 1_000_003
PIECES = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Size of the model and of its vocabulary."""

    vocabulary: int = 1280
    hidden: int = 160
    layers: int = 4
    heads: int = 5
    intermediate: int = 432
    context: int = 256


@dataclass(frozen=True)
class Schedule:
    """How long and on how much text the model is trained."""

    steps: int = 1300
    batch: int = 32
    window: int = 128
    peak_rate: float = 3e-3
    warmup: int = 100
    documents: int = 60_000
    heldout_documents: int = 400
    log_every: int = 50
    seed: int = 0


@dataclass(frozen=True)
class LogLine:
    """One line of the pretraining log."""

    step: int
    train_loss: float
    heldout_public_loss: float


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer trained on ``texts``; every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def wrap_tokenizer(tokenizer: Tokenizer, context: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer as a transformers tokenizer with special tokens and a chat template."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=context,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def build_model(shape: Shape, tokenizer: Tokenizer, seed: int) -> LlamaForCausalLM:
    """Return an untrained model whose initial weights depend on ``seed`` alone."""
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        intermediate_size=shape.intermediate,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
        initializer_range=0.04,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def pack(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Return the texts as one stream of token ids, each document between bos and eos."""
    encoded = tokenizer.encode_batch([f"{BOS}{text}{EOS}" for text in texts], add_special_tokens=False)
    return torch.tensor([token for item in encoded for token in item.ids], dtype=torch.long)


def window_loss(model: LlamaForCausalLM, windows: Tensor) -> Tensor:
    """Return the mean next-token loss over a batch of windows."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def stream_loss(model: LlamaForCausalLM, stream: Tensor, window: int) -> float:
    """Return the mean loss over the whole stream cut into windows."""
    count = max(1, (len(stream) - 1) // window)
    windows = stream[: count * window].view(count, -1)
    with torch.no_grad():
        losses = [float(window_loss(model, part)) * len(part) for part in windows.split(64)]
    return sum(losses) / count


def rate_at(step: int, schedule: Schedule) -> float:
    """Return the learning rate of a step: linear warm-up, then cosine down to a twentieth of the peak."""
    if step < schedule.warmup:
        return schedule.peak_rate * (step + 1) / schedule.warmup
    done = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    return schedule.peak_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def train(
    model: LlamaForCausalLM,
    stream: Tensor,
    heldout: Tensor,
    schedule: Schedule,
    report: Callable[[LogLine], None] = lambda _: None,
) -> list[LogLine]:
    """Train the model in place and return the log."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.peak_rate, betas=(0.9, 0.95), weight_decay=0.1)
    draws = torch.Generator().manual_seed(schedule.seed)
    offsets = torch.arange(schedule.window + 1)
    lines: list[LogLine] = []
    recent: list[float] = []
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, schedule)
        starts = torch.randint(len(stream) - schedule.window - 1, (schedule.batch, 1), generator=draws)
        loss = window_loss(model, stream[starts + offsets])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.append(loss.item())
        if (step + 1) % schedule.log_every == 0 or step + 1 == schedule.steps:
            public = stream_loss(model, heldout, schedule.window)
            lines.append(LogLine(step + 1, round(sum(recent) / len(recent), 4), round(public, 4)))
            recent.clear()
            report(lines[-1])
    return lines


def save_base(out: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, lines: Sequence[LogLine]) -> None:
    """Write model (float16 weights), tokenizer, generation config and log into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    config = model.config
    wrap_tokenizer(tokenizer, config.max_position_embeddings).save_pretrained(out, save_jinja_files=False)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        max_new_tokens=64,
    )
    model.half().save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    _load_as_float32(out / "config.json")
    with (out / "pretraining_log.jsonl").open("w", encoding="utf-8", newline="\n") as log:
        for line in lines:
            row = {"step": line.step, "train_loss": line.train_loss, "heldout_public_loss": line.heldout_public_loss}
            log.write(json.dumps(row) + "\n")


def _load_as_float32(path: Path) -> None:
    """Rewrite the config so that loading yields float32 though the file stores float16."""
    config: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def pretrain(
    out: Path, shape: Shape, schedule: Schedule, report: Callable[[LogLine], None] = lambda _: None
) -> list[LogLine]:
    """Train tokenizer and model, write the base into ``out``, and return the log."""
    texts = public_texts(schedule.seed, schedule.documents)
    heldout_texts = public_texts(schedule.seed + HELDOUT_SEED_OFFSET, schedule.heldout_documents)
    tokenizer = train_tokenizer(texts[:20_000], shape.vocabulary)
    model = build_model(shape, tokenizer, schedule.seed)
    lines = train(model, pack(tokenizer, texts), pack(tokenizer, heldout_texts), schedule, report)
    save_base(out, model, tokenizer, lines)
    return lines


def main() -> None:
    """Run the pretraining from the command line."""
    parser = argparse.ArgumentParser(description="Pretrain the embedded base on synthetic public text.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=Schedule.steps)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    start = time.monotonic()

    def report(line: LogLine) -> None:
        seconds = time.monotonic() - start
        losses = f"train {line.train_loss:.4f} public {line.heldout_public_loss:.4f}"
        sys.stdout.write(f"step {line.step} {losses} {seconds:.0f}s\n")
        sys.stdout.flush()

    pretrain(arguments.out, Shape(), Schedule(steps=arguments.steps, seed=arguments.seed), report)


if __name__ == "__main__":
    main()
