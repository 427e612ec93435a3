"""Layers: attention, positions, norms, feed-forward, and the cache that generation needs."""

from minillm.layers.attention import MultiHeadAttention
from minillm.layers.block_layout import BlockLayout
from minillm.layers.cross_attention import CrossAttention, CrossMemory
from minillm.layers.expert_preferences import (
    Association,
    Preference,
    expert_information,
    expert_lift,
    expert_preferences,
    expert_token_counts,
    main_experts,
)
from minillm.layers.experts import Experts
from minillm.layers.feed_forward import FeedForward, SwiGLU
from minillm.layers.flash import FlashAttention, flash_attention
from minillm.layers.flash_varlen import flash_attention_varlen
from minillm.layers.kv_cache import KVCache, LayerKVCache, RollingLayerKVCache
from minillm.layers.moe import MixtureOfExperts, MoERecord
from minillm.layers.norms import LayerNorm, RMSNorm
from minillm.layers.online_softmax import merge_partial_attention
from minillm.layers.positions import (
    AlibiBias,
    LearnedPositions,
    LinearScaling,
    Llama3Scaling,
    NTKScaling,
    RelativePositionBias,
    RotaryEmbedding,
    ShawPositions,
    SinusoidalPositions,
    YarnScaling,
    alibi_bias,
    alibi_slopes,
    sinusoidal_positions,
    sinusoidal_shift,
    t5_bucket,
)
from minillm.layers.routing_statistics import RoutingStatistics, routing_statistics
from minillm.layers.scaled_dot_product import (
    causal_mask,
    plain_scaled_dot_product_attention,
    scaled_dot_product_attention,
)
from minillm.layers.sparse_algebra import Pattern
from minillm.layers.sparse_attention import block_sparse_attention

__all__ = [
    "AlibiBias",
    "Association",
    "BlockLayout",
    "CrossAttention",
    "CrossMemory",
    "Experts",
    "FeedForward",
    "FlashAttention",
    "KVCache",
    "LayerKVCache",
    "LayerNorm",
    "LearnedPositions",
    "LinearScaling",
    "Llama3Scaling",
    "MixtureOfExperts",
    "MoERecord",
    "MultiHeadAttention",
    "NTKScaling",
    "Pattern",
    "Preference",
    "RMSNorm",
    "RelativePositionBias",
    "RollingLayerKVCache",
    "RotaryEmbedding",
    "RoutingStatistics",
    "ShawPositions",
    "SinusoidalPositions",
    "SwiGLU",
    "YarnScaling",
    "alibi_bias",
    "alibi_slopes",
    "block_sparse_attention",
    "causal_mask",
    "expert_information",
    "expert_lift",
    "expert_preferences",
    "expert_token_counts",
    "flash_attention",
    "flash_attention_varlen",
    "main_experts",
    "merge_partial_attention",
    "plain_scaled_dot_product_attention",
    "routing_statistics",
    "scaled_dot_product_attention",
    "sinusoidal_positions",
    "sinusoidal_shift",
    "t5_bucket",
]
