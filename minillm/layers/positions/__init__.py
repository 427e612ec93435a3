"""Where a token stands: every way in which a transformer is told the order of its tokens."""

from minillm.layers.positions.learned import LearnedPositions
from minillm.layers.positions.rope_scaling import LinearScaling, Llama3Scaling, RopeScaling, rope_scaling_from_dict
from minillm.layers.positions.rotary import RotaryEmbedding, rotate

__all__ = [
    "LearnedPositions",
    "LinearScaling",
    "Llama3Scaling",
    "RopeScaling",
    "RotaryEmbedding",
    "rope_scaling_from_dict",
    "rotate",
]
