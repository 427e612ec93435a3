"""How Hugging Face lays out Mixtral (Jiang et al. 2024; model_type "mixtral"): Mistral with experts in every block.

Its files hold each expert's matrices by themselves, ``w1`` (gate), ``w3`` (up) and ``w2`` (down). In memory
transformers 5 has one tensor of all gates and ups and one of all downs: :func:`_split` and :func:`_fuse` are between.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from minillm.layers.routers import TopKRouter
from minillm.models.config import TransformerConfig
from minillm.models.huggingface_layout import Layout, Source, get, require, require_fields
from minillm.models.huggingface_llama import LLAMA, decoder_fields
from minillm.models.moe_config import MoEConfig

# Where they differ from Llama's, for config files that leave out what is usual.
_DEFAULTS = {
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}


def _read_mixtral(fields: Mapping[str, Any]) -> TransformerConfig:
    require(fields, router_jitter_noise=0.0)
    moe = MoEConfig(
        get(fields, "num_local_experts", 8),
        get(fields, "num_experts_per_tok", 2),
        # Carried over as it stands, but used otherwise there: one loss over all layers together, k times ours.
        balance_loss=get(fields, "router_aux_loss_coef", 0.001),
    )
    return LLAMA.read_config({**_DEFAULTS, **fields}).replace(window=fields.get("sliding_window"), moe=moe)


def _write_mixtral(config: TransformerConfig) -> dict[str, Any]:
    fields = decoder_fields("Mixtral", config)
    moe = config.moe
    if moe is None or not all(map(config.has_experts, range(config.n_layers))):
        raise ValueError(f"Hugging Face's Mixtral layout needs moe with experts in every layer, got {moe}")
    said = dataclasses.replace(
        moe, z_loss=None if moe.z_loss == 0.0 else moe.z_loss, d_ff=None if moe.d_ff == config.d_ff else moe.d_ff
    )  # what is said though it is usual is no hindrance
    require_fields(
        "Mixtral", said, router="softmax", router_options={}, z_loss=None, d_ff=None, n_shared_experts=0,
        capacity_factor=None, eval_capacity_factor=None,
    )  # fmt: skip
    return {
        "model_type": "mixtral",
        **fields,
        "sliding_window": config.window,
        "num_local_experts": moe.n_experts,
        "num_experts_per_tok": moe.k,
        "router_jitter_noise": 0.0,
        "router_aux_loss_coef": TopKRouter(1, moe.n_experts, moe.k, **moe.options).balance_loss,
    }


def _mixtral_sources(config: TransformerConfig) -> dict[str, Source]:
    assert config.moe is not None
    sources = {name: source for name, source in LLAMA.sources(config).items() if ".feed_forward." not in name}
    for layer in range(config.n_layers):
        ours, theirs = f"blocks.{layer}.feed_forward", f"layers.{layer}.block_sparse_moe"
        sources[f"{ours}.router.weight"] = Source((f"{theirs}.gate.weight",), [config.moe.n_experts])
        for part, name in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            each = tuple(f"{theirs}.experts.{expert}.{name}.weight" for expert in range(config.moe.n_experts))
            sources[f"{ours}.experts.{part}"] = Source(each, [1] * config.moe.n_experts, stacked=True)
    return sources


_FUSED = re.compile(r"(.*layers\.\d+)\.mlp\.(?:experts\.(gate_up|down)_proj|(gate)\.weight)")
_SINGLE = re.compile(r"(.*layers\.\d+)\.block_sparse_moe\.(?:experts\.(\d+)\.(w[123])|(gate))\.weight")


def _split(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What transformers has in memory, as its files have it: views."""
    result = {}
    for name, tensor in tensors.items():
        match = _FUSED.fullmatch(name)
        if match is None:
            result[name] = tensor
            continue
        block = f"{match[1]}.block_sparse_moe"
        if match[3]:
            result[f"{block}.gate.weight"] = tensor
        elif match[2] == "down":
            result |= {f"{block}.experts.{expert}.w2.weight": down for expert, down in enumerate(tensor)}
        else:
            for expert, both in enumerate(tensor):  # (2 d_ff, d_model)
                gate, up = both.chunk(2)
                result |= {f"{block}.experts.{expert}.w1.weight": gate, f"{block}.experts.{expert}.w3.weight": up}
    return result


def _fuse(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the files have, as transformers has it in memory: copies of the experts."""
    result: dict[str, Tensor] = {}
    experts: dict[str, dict[str, list[Tensor]]] = {}  # block -> w1, w2, w3 -> tensors in the order of the experts
    for name, tensor in tensors.items():
        match = _SINGLE.fullmatch(name)
        if match is None:
            result[name] = tensor
        elif match[4]:
            result[f"{match[1]}.mlp.gate.weight"] = tensor
        else:
            experts.setdefault(match[1], {}).setdefault(match[3], []).append(tensor)
    for block, parts in experts.items():
        gate_up = [torch.cat(pair) for pair in zip(parts["w1"], parts["w3"], strict=True)]
        result[f"{block}.mlp.experts.gate_up_proj"] = torch.stack(gate_up)
        result[f"{block}.mlp.experts.down_proj"] = torch.stack(parts["w2"])
    return result


MIXTRAL = Layout(
    "MixtralForCausalLM",
    LLAMA.prefix,
    LLAMA.ignored,
    _read_mixtral,
    _write_mixtral,
    _mixtral_sources,
    from_memory=_split,
    to_memory=_fuse,
)
