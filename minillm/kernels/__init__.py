"""Fused operators: each as Triton kernels, as torch's own operator, and as a reference to read; one rule chooses.

``import minillm.kernels`` needs no Triton and no GPU.
"""

from minillm.kernels.runtime import Backend, choose_backend
from minillm.kernels.softmax import softmax

__all__ = ["Backend", "choose_backend", "softmax"]
