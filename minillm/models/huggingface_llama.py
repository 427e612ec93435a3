"""How Hugging Face lays out Llama (model_type "llama"): config fields and weight names, against ours."""

import re
from collections.abc import Mapping
from typing import Any

from minillm.models.config import TransformerConfig
from minillm.models.huggingface_layout import Layout, Source, get, head_source, require, require_fields
from minillm.models.huggingface_rope import read_rope, write_rope


def _read_llama(fields: Mapping[str, Any]) -> TransformerConfig:
    require(
        fields,
        hidden_act="silu",
        attention_bias=False,
        mlp_bias=False,
        attention_dropout=0.0,
        quantization_config=None,
    )
    heads = get(fields, "num_attention_heads", 32)
    context_length = get(fields, "max_position_embeddings", 2048)
    base, scaling = read_rope(fields, context_length)
    return TransformerConfig(
        vocab_size=get(fields, "vocab_size", 32000),
        context_length=context_length,
        d_model=get(fields, "hidden_size", 4096),
        n_layers=get(fields, "num_hidden_layers", 32),
        n_heads=heads,
        n_kv_heads=get(fields, "num_key_value_heads", heads),
        head_dim=get(fields, "head_dim", None),
        d_ff=get(fields, "intermediate_size", 11008),
        norm="rmsnorm",
        norm_eps=get(fields, "rms_norm_eps", 1e-6),
        positions="rope",
        rope_base=base,
        rope_scaling=scaling,
        activation="swiglu",
        bias=False,
        tied_embeddings=get(fields, "tie_word_embeddings", False),
        initializer_std=get(fields, "initializer_range", 0.02),
    )


def decoder_fields(layout: str, config: TransformerConfig) -> dict[str, Any]:
    """What the configs of Llama and its descendants share; ValueError, naming the ``layout``, for what they lack."""
    require_fields(layout, config, norm="rmsnorm", positions="rope", activation="swiglu", bias=False, dropout=0.0)
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": write_rope(config),
        "attention_dropout": 0.0,
        "initializer_range": config.initializer_std,
        "tie_word_embeddings": config.tied_embeddings,
    }


def _write_llama(config: TransformerConfig) -> dict[str, Any]:
    fields = decoder_fields("Llama", config)
    require_fields("Llama", config, window=None, moe=None)
    if config.d_model % config.n_heads:
        raise ValueError(
            "Hugging Face's Llama layout needs d_model to be a multiple of n_heads even if head_dim is given, got "
            f"{config.d_model} and {config.n_heads}"
        )
    return {"model_type": "llama", **fields, "attention_bias": False, "mlp_bias": False}


def _llama_sources(config: TransformerConfig) -> dict[str, Source]:
    d_model, d_ff = config.d_model, config.d_ff
    q_rows, kv_rows = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    sources = {"token_embedding.weight": Source(("embed_tokens.weight",), [config.vocab_size])}
    for layer in range(config.n_layers):
        ours, theirs = f"blocks.{layer}", f"layers.{layer}"
        qkv = tuple(f"{theirs}.self_attn.{part}_proj.weight" for part in "qkv")
        sources |= {
            f"{ours}.attention_norm.weight": Source((f"{theirs}.input_layernorm.weight",), [d_model]),
            f"{ours}.attention.qkv.weight": Source(qkv, [q_rows, kv_rows, kv_rows]),
            f"{ours}.attention.output.weight": Source((f"{theirs}.self_attn.o_proj.weight",), [d_model]),
            f"{ours}.feed_forward_norm.weight": Source((f"{theirs}.post_attention_layernorm.weight",), [d_model]),
            f"{ours}.feed_forward.gate.weight": Source((f"{theirs}.mlp.gate_proj.weight",), [d_ff]),
            f"{ours}.feed_forward.up.weight": Source((f"{theirs}.mlp.up_proj.weight",), [d_ff]),
            f"{ours}.feed_forward.down.weight": Source((f"{theirs}.mlp.down_proj.weight",), [d_model]),
        }
    sources["final_norm.weight"] = Source(("norm.weight",), [d_model])
    return sources | head_source(config)


LLAMA = Layout(
    "LlamaForCausalLM",
    "model.",
    re.compile(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"),  # which old files carry
    _read_llama,
    _write_llama,
    _llama_sources,
)
