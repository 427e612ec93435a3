"""Closed forms: parameters, FLOPs and bytes of a model, from its config alone. Nothing here needs torch."""

from minillm.costs.attention import (
    attention_activation_bytes,
    attention_activation_bytes_by_part,
    attention_flops,
    attention_flops_by_part,
    live_fraction,
    live_pairs,
)
from minillm.costs.flops import (
    attention_flops_per_pair,
    decode_flops_per_token,
    dense_weights,
    forward_flops,
    forward_flops_per_token,
    training_flops,
)
from minillm.costs.kv_cache import kv_cache_bytes, kv_cache_bytes_per_token
from minillm.costs.moe import expert_parameters, moe_layers
from minillm.costs.moe_card import PublishedMoE
from minillm.costs.parameters import active_parameters, parameters, parameters_by_part
from minillm.costs.published import PUBLISHED_MODELS, PublishedModel
from minillm.costs.published_moe import PUBLISHED_MOE_MODELS, MoEFigures, moe_figures

__all__ = [
    "PUBLISHED_MODELS",
    "PUBLISHED_MOE_MODELS",
    "MoEFigures",
    "PublishedMoE",
    "PublishedModel",
    "active_parameters",
    "attention_activation_bytes",
    "attention_activation_bytes_by_part",
    "attention_flops",
    "attention_flops_by_part",
    "attention_flops_per_pair",
    "decode_flops_per_token",
    "dense_weights",
    "expert_parameters",
    "forward_flops",
    "forward_flops_per_token",
    "kv_cache_bytes",
    "kv_cache_bytes_per_token",
    "live_fraction",
    "live_pairs",
    "moe_figures",
    "moe_layers",
    "parameters",
    "parameters_by_part",
    "training_flops",
]
