"""A product whose rows stand in groups, each with a matrix of its own, in plain torch."""

import torch
from torch import Tensor


def grouped_matmul_reference(rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """A loop over the groups, in float32 at least; what the kernels must equal. Reads the counts: a GPU has to wait."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    sizes = counts.tolist()
    *groups, beyond = torch.split_with_sizes(rows.to(dtype), [*sizes, rows.size(0) - sum(sizes)])
    products = [group @ weight.to(dtype).mT for group, weight in zip(groups, weights, strict=True)]
    products.append(beyond.new_zeros(beyond.size(0), weights.size(1)))
    return torch.cat(products).to(rows.dtype)
