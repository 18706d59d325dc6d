"""The synthetic clinics and the embedded base: reproducible data, planted secrets, and a loadable small model."""

import json
import math
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetuning.embedded import EMBEDDED, resolve
from simulations.clinics.generate import generate
from simulations.clinics.grammar import CONDITIONS
from simulations.clinics.pretrain import HELDOUT_SEED_OFFSET, Schedule, Shape, pretrain
from simulations.clinics.private_records import HELDOUT_ROWS, PROTOCOLS, SITES
from simulations.clinics.public_text import public_texts

LONGEST_ROW = 128
MEGABYTE = 1_000_000


def read_rows(name: str) -> list[dict[str, Any]]:
    """Return the rows of an embedded JSONL file."""
    return [json.loads(line) for line in Path(resolve(name)).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    """Return the shipped private records."""
    return read_rows("embedded:clinics")


@pytest.fixture(scope="module")
def secrets() -> list[dict[str, Any]]:
    """Return the shipped planted secrets."""
    return read_rows("embedded:clinics-secrets")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Return the tokenizer of the embedded base."""
    return AutoTokenizer.from_pretrained(resolve("embedded:clinic-base"))


@pytest.fixture(scope="module")
def base() -> Any:
    """Return the embedded base model in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(resolve("embedded:clinic-base")).eval()


def mean_loss(model: Any, tokenizer: Any, pairs: list[tuple[str, str]]) -> float:
    """Return the mean over pairs of the mean loss per token of the second text given the first."""
    losses: list[float] = []
    for given, text in pairs:
        head = [tokenizer.bos_token_id, *tokenizer(given, add_special_tokens=False).input_ids]
        tail = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ids = torch.tensor([head + tail])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(head) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits.float(), torch.tensor(tail)).item())
    return sum(losses) / len(losses)


def test_regenerated_files_equal_the_shipped_files_byte_for_byte(tmp_path: Path) -> None:
    records_path, secrets_path = generate(tmp_path, seed=0)
    assert records_path.read_bytes() == Path(resolve("embedded:clinics")).read_bytes()
    assert secrets_path.read_bytes() == Path(resolve("embedded:clinics-secrets")).read_bytes()


def test_another_seed_gives_other_records(tmp_path: Path) -> None:
    records_path, _ = generate(tmp_path, seed=1)
    assert records_path.read_bytes() != Path(resolve("embedded:clinics")).read_bytes()


def test_rows_have_the_documented_keys_and_sizes(records: list[dict[str, Any]]) -> None:
    assert {tuple(row) for row in records} == {("site", "split", "patient", "prompt", "completion", "topic")}
    counts = Counter((row["site"], row["split"]) for row in records)
    for site in SITES:
        assert counts[site.name, "train"] == site.train_rows
        assert counts[site.name, "heldout"] == HELDOUT_ROWS
    assert len({site.train_rows for site in SITES}) == len(SITES)
    assert Path(resolve("embedded:clinics")).stat().st_size <= 3 * MEGABYTE


def test_every_secret_is_in_train_rows_exactly_its_repeats_and_never_in_heldout(
    records: list[dict[str, Any]], secrets: list[dict[str, Any]]
) -> None:
    text = {
        split: "\n".join(f"{row['prompt']}\n{row['completion']}" for row in records if row["split"] == split)
        for split in ("train", "heldout")
    }
    for secret in secrets:
        holders = [row for row in records if secret["secret"] in row["completion"]]
        assert text["train"].count(secret["secret"]) == secret["repeats"] == len(holders)
        assert secret["secret"] not in text["heldout"]
        assert secret["row_prompt"] not in text["heldout"]
        assert {(row["site"], row["prompt"]) for row in holders} == {(secret["site"], secret["row_prompt"])}
        assert secret["patient"] in secret["row_prompt"]
        assert secret["secret"].startswith("555-01")
    assert {secret["repeats"] for secret in secrets} == {1, 4}
    planted = sum(secret["repeats"] for secret in secrets)
    assert 0.01 <= planted / sum(row["split"] == "train" for row in records) <= 0.02


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_sites_see_different_conditions(records: list[dict[str, Any]], split: str) -> None:
    mixes: list[dict[str, float]] = []
    for site in SITES:
        topics = Counter(row["topic"] for row in records if row["site"] == site.name and row["split"] == split)
        mixes.append({topic: count / topics.total() for topic, count in topics.items()})
    for left, right in combinations(mixes, 2):
        variation = sum(abs(left.get(c.name, 0) - right.get(c.name, 0)) for c in CONDITIONS) / 2
        assert variation > 0.2


def test_sites_share_one_protocol_per_condition(records: list[dict[str, Any]]) -> None:
    assert set(PROTOCOLS) == {condition.name for condition in CONDITIONS}
    for row in records:
        assert PROTOCOLS[row["topic"]].code in row["completion"]


def test_public_text_holds_no_site_name_and_no_secret(secrets: list[dict[str, Any]]) -> None:
    public = "\n".join(public_texts(seed=0, count=5000))
    assert not [site.name for site in SITES if site.name in public.lower()]
    assert not [secret["secret"] for secret in secrets if secret["secret"] in public]


def test_base_is_small_and_loads_in_float32(base: Any) -> None:
    assert type(base).__name__ == "LlamaForCausalLM"
    assert MEGABYTE <= base.num_parameters() <= 3 * MEGABYTE
    assert {parameter.dtype for parameter in base.parameters()} == {torch.float32}
    assert (Path(resolve("embedded:clinic-base")) / "model.safetensors").stat().st_size <= 5 * MEGABYTE


def test_tokenizer_round_trips_and_has_distinct_special_tokens(tokenizer: Any, base: Any) -> None:
    text = "NG 54F mod. wheeze, 3d. café 555-0123 |"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert len(tokenizer) == base.config.vocab_size
    assert (base.config.bos_token_id, base.config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_chat_template_renders_turns(tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "What is gout?"}, {"role": "assistant", "content": "A joint problem."}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    assert rendered == "<|bos|><|user|>What is gout?<|eos|><|assistant|>A joint problem.<|eos|>"
    opened = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert opened == "<|bos|><|user|>What is gout?<|eos|><|assistant|>"


def test_every_row_fits_in_the_length_limit(records: list[dict[str, Any]], tokenizer: Any) -> None:
    encoded = tokenizer([row["prompt"] + row["completion"] for row in records], add_special_tokens=False).input_ids
    lengths = [len(ids) + 2 for ids in encoded]
    assert max(lengths) <= LONGEST_ROW
    assert 40 <= sum(lengths) / len(lengths) <= 75


def test_prompt_and_completion_tokenize_apart_as_they_do_together(
    records: list[dict[str, Any]], tokenizer: Any
) -> None:
    for row in records[::50]:
        apart = [
            *tokenizer(row["prompt"], add_special_tokens=False).input_ids,
            *tokenizer(row["completion"], add_special_tokens=False).input_ids,
        ]
        assert apart == tokenizer(row["prompt"] + row["completion"], add_special_tokens=False).input_ids


def test_base_finds_private_notes_clearly_harder_than_public_text(
    base: Any, tokenizer: Any, records: list[dict[str, Any]]
) -> None:
    heldout = [(row["prompt"], row["completion"]) for row in records if row["split"] == "heldout"][::10]
    public = [("", text) for text in public_texts(HELDOUT_SEED_OFFSET, 60)]
    private_perplexity = math.exp(mean_loss(base, tokenizer, heldout))
    public_perplexity = math.exp(mean_loss(base, tokenizer, public))
    assert math.isfinite(private_perplexity)
    assert private_perplexity > 1.5 * public_perplexity


def test_short_pretraining_writes_a_loadable_base(tmp_path: Path) -> None:
    shape = Shape(vocabulary=320, hidden=16, layers=1, heads=2, intermediate=32, context=64)
    schedule = Schedule(steps=5, batch=2, window=16, warmup=2, documents=200, heldout_documents=20, log_every=5)
    lines = pretrain(tmp_path, shape, schedule)
    assert [line.step for line in lines] == [5]
    assert all(math.isfinite(line.train_loss) and math.isfinite(line.heldout_public_loss) for line in lines)
    written = {path.name for path in tmp_path.iterdir()}
    assert written >= {
        "config.json", "generation_config.json", "model.safetensors", "pretraining_log.jsonl",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert AutoModelForCausalLM.from_pretrained(str(tmp_path)).config.hidden_size == shape.hidden


def test_resolve_maps_names_and_leaves_other_strings_alone() -> None:
    for name in EMBEDDED:
        path = Path(resolve(f"embedded:{name}"))
        assert path.is_absolute()
        assert path.exists()
    assert resolve("HuggingFaceTB/SmolLM2-135M") == "HuggingFaceTB/SmolLM2-135M"
    with pytest.raises(ValueError, match="embedded:clinic-base"):
        resolve("embedded:nothing")
