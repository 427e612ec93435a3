"""Closed forms: parameters, FLOPs and bytes of a model, from its config alone. Nothing here needs torch."""

from minillm.costs.flops import (
    attention_flops_per_pair,
    decode_flops_per_token,
    dense_weights,
    forward_flops,
    forward_flops_per_token,
    training_flops,
)
from minillm.costs.kv_cache import kv_cache_bytes_per_token
from minillm.costs.parameters import parameters, parameters_by_part

__all__ = [
    "attention_flops_per_pair",
    "decode_flops_per_token",
    "dense_weights",
    "forward_flops",
    "forward_flops_per_token",
    "kv_cache_bytes_per_token",
    "parameters",
    "parameters_by_part",
    "training_flops",
]
