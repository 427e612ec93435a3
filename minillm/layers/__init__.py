"""Layers: attention, positions, norms, feed-forward, and the cache that generation needs."""

from minillm.layers.attention import MultiHeadAttention
from minillm.layers.cross_attention import CrossAttention, CrossMemory
from minillm.layers.feed_forward import FeedForward, SwiGLU
from minillm.layers.kv_cache import KVCache, LayerKVCache, RollingLayerKVCache
from minillm.layers.norms import LayerNorm, RMSNorm
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
from minillm.layers.scaled_dot_product import (
    causal_mask,
    plain_scaled_dot_product_attention,
    scaled_dot_product_attention,
)

__all__ = [
    "AlibiBias",
    "CrossAttention",
    "CrossMemory",
    "FeedForward",
    "KVCache",
    "LayerKVCache",
    "LayerNorm",
    "LearnedPositions",
    "LinearScaling",
    "Llama3Scaling",
    "MultiHeadAttention",
    "NTKScaling",
    "RMSNorm",
    "RelativePositionBias",
    "RollingLayerKVCache",
    "RotaryEmbedding",
    "ShawPositions",
    "SinusoidalPositions",
    "SwiGLU",
    "YarnScaling",
    "alibi_bias",
    "alibi_slopes",
    "causal_mask",
    "plain_scaled_dot_product_attention",
    "scaled_dot_product_attention",
    "sinusoidal_positions",
    "sinusoidal_shift",
    "t5_bucket",
]
