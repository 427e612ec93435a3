"""Where a token stands: every way in which a transformer is told the order of its tokens."""

from minillm.kernels.rope.reference import rotate
from minillm.layers.positions.alibi import AlibiBias, alibi_bias, alibi_slopes
from minillm.layers.positions.learned import LearnedPositions
from minillm.layers.positions.rope_scaling import (
    LinearScaling,
    Llama3Scaling,
    NTKScaling,
    RopeScaling,
    YarnScaling,
    rope_scaling_from_dict,
)
from minillm.layers.positions.rotary import (
    RotaryEmbedding,
    rope_decay,
    rope_frequencies,
    to_half_layout,
    to_interleaved_layout,
)
from minillm.layers.positions.shaw import ShawPositions
from minillm.layers.positions.sinusoidal import SinusoidalPositions, sinusoidal_positions, sinusoidal_shift
from minillm.layers.positions.t5_bias import RelativePositionBias, t5_bucket

__all__ = [
    "AlibiBias",
    "LearnedPositions",
    "LinearScaling",
    "Llama3Scaling",
    "NTKScaling",
    "RelativePositionBias",
    "RopeScaling",
    "RotaryEmbedding",
    "ShawPositions",
    "SinusoidalPositions",
    "YarnScaling",
    "alibi_bias",
    "alibi_slopes",
    "rope_decay",
    "rope_frequencies",
    "rope_scaling_from_dict",
    "rotate",
    "sinusoidal_positions",
    "sinusoidal_shift",
    "t5_bucket",
    "to_half_layout",
    "to_interleaved_layout",
]
