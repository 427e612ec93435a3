"""How Hugging Face lays out GPT-2 (model_type "gpt2"): config fields and weight names, against ours."""

import re
from collections.abc import Mapping
from typing import Any

from minillm.models.config import TransformerConfig
from minillm.models.huggingface_layout import Layout, Source, get, head_source, require, require_fields

# gelu_new, gelu_pytorch_tanh and gelu_fast are three writings of the same formula.
_GPT2_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


def _read_gpt2(fields: Mapping[str, Any]) -> TransformerConfig:
    activation = fields.get("activation_function", "gelu_new")
    if activation not in _GPT2_ACTIVATIONS:
        raise ValueError(f"activation_function must be one of {', '.join(_GPT2_ACTIVATIONS)}, got {activation!r}")
    require(
        fields,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        reorder_and_upcast_attn=False,
        add_cross_attention=False,
        quantization_config=None,
    )
    dropouts = {name: fields.get(name, 0.1) for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
    if len(set(dropouts.values())) > 1:
        raise ValueError(f"embd_pdrop, attn_pdrop and resid_pdrop must be equal, got {dropouts}")
    return TransformerConfig(
        vocab_size=get(fields, "vocab_size", 50257),
        context_length=get(fields, "n_positions", 1024),
        d_model=get(fields, "n_embd", 768),
        n_layers=get(fields, "n_layer", 12),
        n_heads=get(fields, "n_head", 12),
        d_ff=fields.get("n_inner") or 4 * get(fields, "n_embd", 768),
        norm_eps=get(fields, "layer_norm_epsilon", 1e-5),
        activation=_GPT2_ACTIVATIONS[activation],  # type: ignore[arg-type]
        tied_embeddings=get(fields, "tie_word_embeddings", True),
        dropout=dropouts["resid_pdrop"],
        initializer_std=get(fields, "initializer_range", 0.02),
    )


def _write_gpt2(config: TransformerConfig) -> dict[str, Any]:
    require_fields(
        "GPT-2",
        config,
        norm="layernorm",
        positions="learned",
        bias=True,
        n_kv_heads=config.n_heads,
        window=None,
        moe=None,
    )
    if config.activation == "swiglu" or config.n_heads * config.head_dim != config.d_model:
        raise ValueError(
            "Hugging Face's GPT-2 layout needs activation 'gelu' or 'gelu_tanh' and n_heads * head_dim = d_model, got "
            f"{config.activation!r} and {config.n_heads} * {config.head_dim} for {config.d_model}"
        )
    return {
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.d_ff,
        "activation_function": "gelu_new" if config.activation == "gelu_tanh" else "gelu",
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.initializer_std,
        "tie_word_embeddings": config.tied_embeddings,
    }


def _gpt2_sources(config: TransformerConfig) -> dict[str, Source]:
    d_model, d_ff = config.d_model, config.d_ff
    sources = {
        "token_embedding.weight": Source(("wte.weight",), [config.vocab_size]),
        "position_embedding.weight": Source(("wpe.weight",), [config.context_length]),
    }
    for layer in range(config.n_layers):
        # GPT-2 keeps its matrices as (in, out): its "Conv1D" multiplies from the other side.
        for ours, theirs, rows in (
            ("attention.qkv", "attn.c_attn", 3 * d_model),
            ("attention.output", "attn.c_proj", d_model),
            ("feed_forward.up", "mlp.c_fc", d_ff),
            ("feed_forward.down", "mlp.c_proj", d_model),
        ):
            sources[f"blocks.{layer}.{ours}.weight"] = Source((f"h.{layer}.{theirs}.weight",), [rows], transposed=True)
            sources[f"blocks.{layer}.{ours}.bias"] = Source((f"h.{layer}.{theirs}.bias",), [rows])
        for ours, theirs in (("attention_norm", "ln_1"), ("feed_forward_norm", "ln_2")):
            for kind in ("weight", "bias"):
                sources[f"blocks.{layer}.{ours}.{kind}"] = Source((f"h.{layer}.{theirs}.{kind}",), [d_model])
    for kind in ("weight", "bias"):
        sources[f"final_norm.{kind}"] = Source((f"ln_f.{kind}",), [d_model])
    return sources | head_source(config)


GPT2 = Layout(
    "GPT2LMHeadModel",
    "transformer.",
    re.compile(r"h\.\d+\.attn\.(bias|masked_bias)"),  # the causal mask, which old files carry
    _read_gpt2,
    _write_gpt2,
    _gpt2_sources,
)
