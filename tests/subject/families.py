"""Tiny random configurations of each family: 4 blocks, d = 32, vocabulary 320."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import transformers

COMMON = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
GROUPED = COMMON | {"num_key_value_heads": 2}
GEMMA = GROUPED | {
    "head_dim": 8,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def _gemma3() -> Any:
    return transformers.Gemma3Config(
        text_config=GEMMA, vision_config=VISION, mm_tokens_per_image=4, image_token_index=300
    )


def _qwen2_vl() -> Any:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    return transformers.Qwen2VLConfig(
        text_config=GROUPED | {"rope_scaling": rope},
        vision_config={"depth": 4, "embed_dim": 16, "hidden_size": 32, "num_heads": 2},
        image_token_id=300,
        video_token_id=301,
        vision_start_token_id=302,
        vision_end_token_id=303,
    )


def _qwen3_5() -> Any:
    """Linear attention in every second block; as a causal language model it is another class, for text alone."""
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
    widths = {"head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    kinds = {"layer_types": ["linear_attention", "full_attention"] * 2}
    return transformers.Qwen3_5Config(
        text_config=GROUPED | heads | widths | kinds,
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32
        },
    )  # fmt: skip


def _llava() -> Any:
    return transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**GROUPED),
        vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_index=300,
    )


CAUSAL: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "qwen2": lambda: transformers.Qwen2Config(**GROUPED),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED, head_dim=8),
    "mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=8),
    "gemma2": lambda: transformers.Gemma2Config(**GEMMA),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(**GEMMA),
    "phi": lambda: transformers.PhiConfig(**COMMON),
    "phi3": lambda: transformers.Phi3Config(**GROUPED),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=320, n_embd=32, n_layer=4, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1
    ),
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        vocab_size=320,
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        max_position_embeddings=64,
        window_size=8,
        attention_types=[[["global", "local"], 2]],
        bos_token_id=0,
        eos_token_id=1,
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**COMMON),
    "opt": lambda: transformers.OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=32),
    "bloom": lambda: transformers.BloomConfig(
        vocab_size=320, hidden_size=32, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=1
    ),
    "mpt": lambda: transformers.MptConfig(vocab_size=320, d_model=32, n_layers=4, n_heads=4, max_seq_len=64),
    "mixtral": lambda: transformers.MixtralConfig(**GROUPED, num_local_experts=4),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **GROUPED, **EXPERTS, shared_expert_intermediate_size=24, mlp_only_layers=[0]
    ),
    "olmoe": lambda: transformers.OlmoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2),
}
MULTIMODAL: dict[str, Callable[[], Any]] = {
    "gemma3": _gemma3,
    "qwen2_vl": _qwen2_vl,
    "qwen3_5": _qwen3_5,
    "llava": _llava,
}
ENCODERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertConfig(**COMMON | {"pad_token_id": 0}),
    "roberta": lambda: transformers.RobertaConfig(**COMMON),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=320, dim=32, hidden_dim=48, n_layers=4, n_heads=4, max_position_embeddings=64
    ),
    "modernbert": lambda: transformers.ModernBertConfig(
        **COMMON, cls_token_id=0, sep_token_id=1, local_attention=8
    ),
}
CONFIGS = CAUSAL | MULTIMODAL | ENCODERS


def _llama(**rope: Any) -> Any:
    return transformers.LlamaConfig(**GROUPED | {"rope_parameters": {"rope_theta": 100.0, **rope}})


ORIGINAL = 24
"""The length that the models of ``CHANGING`` were made for before they were extended to 64."""
CHANGING: dict[str, Callable[[], Any]] = {
    "phi3_longrope": lambda: transformers.Phi3Config(
        **GROUPED,
        original_max_position_embeddings=ORIGINAL,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4
        },
    ),
    "llama_dynamic": lambda: transformers.LlamaConfig(
        **GROUPED | {"max_position_embeddings": ORIGINAL},
        rope_parameters={"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0},
    ),
    "doge": lambda: transformers.DogeConfig(**GROUPED, keep_window_size=16),
}  # fmt: skip
"""Models whose rows depend on how long a sequence is, or on what stands after it."""
ROPE: dict[str, Callable[[], Any]] = {
    "llama_linear": lambda: _llama(rope_type="linear", factor=4.0),
    "llama_yarn": lambda: _llama(rope_type="yarn", factor=4.0, original_max_position_embeddings=ORIGINAL),
    "llama3": lambda: _llama(
        rope_type="llama3", factor=4.0, original_max_position_embeddings=ORIGINAL,
        low_freq_factor=1.0, high_freq_factor=4.0,
    ),
}  # fmt: skip
"""Kinds of rotary positions that change with nothing."""


SINCE = {"qwen3_5": "Qwen3_5Config"}
"""Families that the oldest declared transformers does not have yet, by their configuration's class."""


def new_model(family: str) -> Any:
    """A random model of ``family`` as it would be published: with the head it was trained with."""
    if family in SINCE and not hasattr(transformers, SINCE[family]):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    auto = transformers.AutoModelForCausalLM
    if family in MULTIMODAL:
        auto = transformers.AutoModelForImageTextToText
    elif family in ENCODERS:
        auto = transformers.AutoModelForMaskedLM
    return auto.from_config((CONFIGS | CHANGING | ROPE)[family]()).eval()
