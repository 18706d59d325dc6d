"""Tiny models of architectures that only a few tests need, saved with the tokenizer of all tests."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedTokenizerFast,
)

VOCABULARY, CONTEXT = 320, 64
_IDS = {
    "vocab_size": VOCABULARY,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 3,
    "sep_token_id": 4,
    "decoder_start_token_id": 2,
}
_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_ENCODER = _SIZES | {"max_position_embeddings": CONTEXT}
_GROUPED = _ENCODER | {"num_key_value_heads": 2, "head_dim": 8}
_SEQ2SEQ = {"d_model": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 48}
_CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "albert": (AutoModelForMaskedLM, _ENCODER | {"embedding_size": 16}),
    "bart": (
        AutoModelForSeq2SeqLM,
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": CONTEXT,
        },
    ),
    "bert": (AutoModelForMaskedLM, _ENCODER),
    "deberta-v2": (AutoModelForMaskedLM, _ENCODER | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "distilbert": (
        AutoModelForMaskedLM,
        {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": CONTEXT},
    ),
    "electra": (AutoModelForMaskedLM, _ENCODER | {"embedding_size": 32}),
    "gemma3n_text": (
        AutoModelForCausalLM,
        _GROUPED
        | {
            "num_kv_shared_layers": 1,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "layer_types": ["full_attention", "full_attention"],
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0, 0.0],
        },
    ),
    "gpt2": (AutoModelForCausalLM, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}),
    "mamba": (
        AutoModelForCausalLM,
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 2},
    ),
    "mistral": (AutoModelForCausalLM, _GROUPED),
    "modernbert": (AutoModelForMaskedLM, _ENCODER),
    "mpt": (
        AutoModelForCausalLM,
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": CONTEXT},
    ),
    "qwen2_moe": (
        AutoModelForCausalLM,
        _ENCODER
        | {
            "num_key_value_heads": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "roberta": (AutoModelForMaskedLM, _ENCODER | {"max_position_embeddings": CONTEXT + 1}),
    "t5": (AutoModelForSeq2SeqLM, _SEQ2SEQ | {"decoder_start_token_id": 0}),
    "xmod": (AutoModelForMaskedLM, _ENCODER | {"languages": ["en_XX", "de_DE"], "default_language": "en_XX"}),
}


def save(family: str, folder: Path, tokenizer: PreTrainedTokenizerFast, **changes: Any) -> Path:
    """Save a model with random weights and return its folder; `changes` are of its configuration."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if family == "gemma3 with vision":
            network = Gemma3ForConditionalGeneration(_with_vision())
        else:
            auto, config = _CONFIGS[family]
            network = auto.from_config(AutoConfig.for_model(family, **(_IDS | config | changes)))
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _with_vision() -> Gemma3Config:
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    text = _GROUPED | {"vocab_size": VOCABULARY, "query_pre_attn_scalar": 8, "sliding_window": 16}
    special = {key: _IDS[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    marks = {"boi_token_index": 300, "eoi_token_index": 301, "image_token_index": 302}
    return Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1, **marks, **special)
