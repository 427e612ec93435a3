"""Fused operators: each as Triton kernels, as torch's own operator, and as a reference to read; one rule chooses.

``import minillm.kernels`` needs no Triton and no GPU.
"""

from minillm.kernels.adamw_step import adamw_step
from minillm.kernels.cross_entropy import cross_entropy
from minillm.kernels.flash_decode import split_kv_decode
from minillm.kernels.gated import geglu, swiglu
from minillm.kernels.grouped_matmul import grouped_matmul
from minillm.kernels.layer_norm import layer_norm
from minillm.kernels.linear_activation import fold_batch_norm, linear_activation
from minillm.kernels.linear_cross_entropy import linear_cross_entropy
from minillm.kernels.rms_norm import rms_norm
from minillm.kernels.rope import rope
from minillm.kernels.runtime import Backend, choose_backend
from minillm.kernels.softmax import softmax

__all__ = [
    "Backend",
    "adamw_step",
    "choose_backend",
    "cross_entropy",
    "fold_batch_norm",
    "geglu",
    "grouped_matmul",
    "layer_norm",
    "linear_activation",
    "linear_cross_entropy",
    "rms_norm",
    "rope",
    "softmax",
    "split_kv_decode",
    "swiglu",
]
