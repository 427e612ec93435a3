"""From multi-head to grouped-query attention: a trained model's key and value heads merged, to be trained a little on.

A group of query heads then shares one key head and one value head, which shrinks the KV cache by the group's size.
Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints", section
2.1: convert the checkpoint, then *uptrain* it, i.e. pre-train it further, for about 5 % of the original steps.
"""

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from minillm.layers.attention import MultiHeadAttention
from minillm.models.config import TransformerConfig
from minillm.models.transformer import Transformer

Method = Literal["mean", "first", "random"]
_METHODS = ("mean", "first", "random")


def convert_kv_heads(model: Transformer, n_kv_heads: int, *, method: Method = "mean", seed: int = 0) -> Transformer:
    """A copy of ``model`` with fewer key and value heads: ``n_kv_heads`` of them in each block, to be trained further.

    Each new head stands for ``model.config.n_kv_heads / n_kv_heads`` neighbouring ones, those of the query heads that
    will use it; everything else stays as it is. Where the merged heads are equal, "mean" and "first" give a model that
    computes the same.

    Args:
        model: multi-head, or grouped-query already. It is left alone.
        n_kv_heads: divides the model's own n_kv_heads; 1 is multi-query attention. The same number gives a plain copy,
            except for "random".
        method: "mean" averages the rows of the heads' projections, "first" takes the first head of each group,
            "random" draws new ones as a new model's are drawn. The paper finds them to be best in this order (figure
            4).
        seed: of "random"; the same numbers on every device.

    Returns: a model on the same device, of the same dtypes; what was frozen, shared or in evaluation mode still is.
    Raises ValueError for another n_kv_heads or method.
    """
    if not isinstance(model, Transformer):
        raise TypeError(f"model must be a minillm.models.Transformer, got {type(model).__name__}")
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}, got {method!r}")
    old = model.config.n_kv_heads
    if not isinstance(n_kv_heads, int) or n_kv_heads < 1 or old % n_kv_heads:
        raise ValueError(f"n_kv_heads must divide the model's {old} key heads, got {n_kv_heads!r}")

    if not isinstance(seed, int):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    converted = copy.deepcopy(model)
    converted.config = model.config.replace(n_kv_heads=n_kv_heads)
    generator = torch.Generator().manual_seed(seed)
    attentions = [module for module in converted.modules() if isinstance(module, MultiHeadAttention)]
    merged: dict[nn.Parameter, nn.Parameter] = {}  # what two blocks share is merged once, and shared again
    for linear in dict.fromkeys(attention.qkv for attention in attentions):
        for name, parameter in list(linear.named_parameters()):
            if parameter not in merged:
                rows = _merged_rows(parameter.detach(), converted.config, old, method, generator)
                merged[parameter] = nn.Parameter(rows, requires_grad=parameter.requires_grad)
            setattr(linear, name, merged[parameter])
    for attention in attentions:
        kv_size = n_kv_heads * attention.head_dim
        attention.n_kv_heads = n_kv_heads
        attention.qkv_sizes = (attention.n_heads * attention.head_dim, kv_size, kv_size)
        attention.qkv.out_features = sum(attention.qkv_sizes)
    return converted


def _merged_rows(
    rows: Tensor, config: TransformerConfig, old: int, method: Method, generator: torch.Generator
) -> Tensor:
    """A qkv weight (rows, d_model) or bias (rows,) with the ``old`` key heads and value heads merged."""
    new = config.n_kv_heads
    n_query_rows = config.n_heads * config.head_dim
    groups = rows[n_query_rows:].reshape(2, new, old // new, config.head_dim, *rows.shape[1:])
    if method == "mean":
        exact = groups.to(torch.promote_types(rows.dtype, torch.float32))
        heads = exact.mean(dim=2).to(rows.dtype)
    elif method == "first":
        heads = groups[:, :, 0]
    else:
        heads = torch.zeros(groups[:, :, 0].shape)
        if rows.dim() == 2:  # biases begin at zero
            heads.normal_(std=config.initializer_std, generator=generator)
    return torch.cat([rows[:n_query_rows], heads.flatten(0, 2).to(rows)])
