"""Folding a batch norm into the linear map before it: the operator fusion that costs nothing at inference."""

import torch
from torch import Tensor


def fold_batch_norm(
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of one linear map or convolution that does what it and a batch norm after it do at inference.

    At inference batch norm is y = (x - mean) / sqrt(var + eps) * gamma + beta with numbers that no longer change, an
    affine map of each channel. With scale = gamma / sqrt(var + eps), ::

        weight' = weight * scale        bias' = (bias - mean) * scale + beta

    (Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
    section 3.2, equation 14; cuDNN-based servers and ``torch.jit.freeze`` do the same). The batch norm disappears: no
    pass over memory, no kernel. ::

        folded = fold_batch_norm(linear.weight, linear.bias, bn.running_mean, bn.running_var, bn.weight, bn.bias)
        y = linear_activation(x, *folded, activation="relu")     # = relu(bn.eval()(linear(x))), one kernel

    Args:
        weight: (d_out, d_in), or of a convolution (channels out, channels in / groups, ...).
        bias: (d_out,) or None.
        running_mean, running_var: (d_out,), what the batch norm has gathered in training.
        bn_weight, bn_bias: (d_out,), gamma and beta; None for a batch norm without them.
        eps: the batch norm's.

    Returns: (weight', bias'), new tensors in the type of ``weight``; calculated in float32 at least. Raises ValueError
    for lengths that do not fit.
    """
    if weight.dim() < 2:
        raise ValueError(f"weight must be (d_out, d_in) or a convolution's (d_out, ...), got {tuple(weight.shape)}")
    channels = {
        "bias": bias,
        "running_mean": running_mean,
        "running_var": running_var,
        "bn_weight": bn_weight,
        "bn_bias": bn_bias,
    }
    for name, tensor in channels.items():
        if tensor is not None and tensor.shape != weight.shape[:1]:
            raise ValueError(f"{name} must be (d_out={weight.size(0)},), got {tuple(tensor.shape)}")
    dtype = torch.promote_types(weight.dtype, torch.float32)
    scale = (running_var.to(dtype) + eps).rsqrt()
    if bn_weight is not None:
        scale = scale * bn_weight.to(dtype)
    shift = -running_mean.to(dtype) if bias is None else bias.to(dtype) - running_mean.to(dtype)
    shift = shift * scale
    if bn_bias is not None:
        shift = shift + bn_bias.to(dtype)
    folded = weight.to(dtype) * scale.view(-1, *(1,) * (weight.dim() - 1))
    return folded.to(weight.dtype), shift.to(weight.dtype)
