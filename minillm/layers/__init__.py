"""Layers: attention, positions, norms, feed-forward, and the cache that generation needs."""

from minillm.layers.attention import MultiHeadAttention
from minillm.layers.cross_attention import CrossAttention, CrossMemory
from minillm.layers.feed_forward import FeedForward, SwiGLU
from minillm.layers.kv_cache import KVCache, LayerKVCache, RollingLayerKVCache
from minillm.layers.norms import LayerNorm, RMSNorm
from minillm.layers.positions import LearnedPositions, LinearScaling, Llama3Scaling, RotaryEmbedding
from minillm.layers.scaled_dot_product import (
    causal_mask,
    plain_scaled_dot_product_attention,
    scaled_dot_product_attention,
)

__all__ = [
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
    "RMSNorm",
    "RollingLayerKVCache",
    "RotaryEmbedding",
    "SwiGLU",
    "causal_mask",
    "plain_scaled_dot_product_attention",
    "scaled_dot_product_attention",
]
