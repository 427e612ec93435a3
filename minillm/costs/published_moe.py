"""Published mixtures of experts as data: what they hold and what a token uses, from the shapes their papers print.

Released models are counted to the last norm, as their weights are. The figures that the sources print stand beside, as
they are printed; where one does not follow from the shapes printed with it, the card says so in ``unexplained``.

Sources: Fedus et al. 2022, "Switch Transformers", table 9; Du et al. 2022, "GLaM", table 4, FLOPs in table 1; Jiang et
al. 2024, "Mixtral of Experts", table 1; DeepSeek-AI 2024, "DeepSeek-V2", section 3.1.2, and "DeepSeek-V3", section 4.2;
Muennighoff et al. 2024, "OLMoE", table 1; Yang et al. 2025, "Qwen3 Technical Report", table 2; OpenAI 2025,
"gpt-oss-120b & gpt-oss-20b Model Card", table 1; for what these leave open, the released config files.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

from minillm.costs.moe_card import LatentAttention, PublishedMoE

# What T5 reads and writes of 568 tokens, 15 % of them masked in spans of 3 (Raffel et al. 2020, section 3.1.4).
SPAN_CORRUPTION = (512, 114)

_SWITCH_FLOPS = (
    "neither the lengths nor the products counted are printed; for 512 tokens read and 114 written weight_flops gives "
    "0.96 to 1.08 of it, forward_flops 1.10 to 1.24"
)
_SWITCH_BASE = PublishedMoE(
    "Switch-Base", "Fedus et al. 2022, table 9; vocabulary and tied embedding as released",
    vocab_size=32128, d_model=768, n_layers=12, n_encoder_layers=12, n_heads=12, n_kv_heads=12, head_dim=64,
    d_ff=2048, expert_d_ff=2048, n_experts=128, k=1, moe_every=2, tied_embeddings=True,
    position_parameters=2 * 32 * 12,  # T5's buckets: one table for the encoder, one for the decoder
    printed_parameters="7B", printed_flops="124B", unexplained={"flops": _SWITCH_FLOPS},
)  # fmt: skip
_SWITCH_LARGE = replace(
    _SWITCH_BASE, name="Switch-Large", d_model=1024, n_layers=24, n_encoder_layers=24, n_heads=16, n_kv_heads=16,
    d_ff=2816, expert_d_ff=2816, position_parameters=2 * 32 * 16, printed_parameters="26B", printed_flops="425B",
    unexplained={
        "parameters": "27.1B follow; T5's first form, two matrices of width 4096, would give 26.3B",
        "flops": _SWITCH_FLOPS,
    },
)  # fmt: skip
_SWITCH_XXL = replace(
    _SWITCH_LARGE, name="Switch-XXL", d_model=4096, n_heads=64, n_kv_heads=64, d_ff=10240, expert_d_ff=10240,
    n_experts=64, position_parameters=2 * 32 * 64, printed_parameters="395B", printed_flops="6.3T",
    unexplained={
        "parameters": "201B follow; 128 experts, as in the released weights, would give 395B",
        "flops": _SWITCH_FLOPS,
    },
)  # fmt: skip
_SWITCH_C = replace(
    _SWITCH_BASE, name="Switch-C", d_model=2080, n_layers=15, n_encoder_layers=15, n_heads=32, n_kv_heads=32,
    d_ff=6144, expert_d_ff=6144, gated=False, gated_experts=False, n_experts=2048, moe_every=1,
    position_parameters=2 * 32 * 32, printed_parameters="1571B", printed_flops="890B",
)  # fmt: skip

# The text names a vocabulary of 256K, which the biggest model's figures contain; those of the others contain 32K. Dense
# layers are gated, experts are not; the relative bias of each layer is taken to have T5's 32 buckets.
_GLAM_64B_64E = PublishedMoE(
    "GLaM 64B/64E", "Du et al. 2022, table 4",
    vocab_size=256000, d_model=8192, n_layers=64, n_heads=128, n_kv_heads=128, head_dim=128,
    d_ff=32768, expert_d_ff=32768, gated_experts=False, n_experts=64, k=2, moe_every=2, tied_embeddings=True,
    position_parameters=64 * 32 * 128, printed_parameters="1.2T", printed_active="96.6B", printed_flops="180G",
    unexplained={"flops": "two operations for each active parameter are 193G"},
)  # fmt: skip
_GLAM_8B_64E = replace(
    _GLAM_64B_64E, name="GLaM 8B/64E", vocab_size=32000, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32,
    d_ff=16384, expert_d_ff=16384, position_parameters=32 * 32 * 32,
    printed_parameters="143B", printed_active="9.8B", printed_flops=None, unexplained={},
)  # fmt: skip
_GLAM_1_7B_64E = replace(
    _GLAM_8B_64E, name="GLaM 1.7B/64E", d_model=2048, n_layers=24, n_heads=16, n_kv_heads=16,
    d_ff=8192, expert_d_ff=8192, position_parameters=24 * 32 * 16, printed_parameters="27B", printed_active="1.879B",
)  # fmt: skip
_GLAM_1_7B_32E = replace(
    _GLAM_1_7B_64E, name="GLaM 1.7B/32E", n_experts=32, printed_parameters="20B", printed_active="1.878B",
    unexplained={"parameters": "14.0B follow, half of what 64 experts have"},
)  # fmt: skip
_GLAM_1_7B_256E = replace(
    _GLAM_1_7B_64E, name="GLaM 1.7B/256E", n_experts=256, printed_parameters="105B", printed_active="1.886B",
    unexplained={"parameters": "104.2B follow", "active": "1.884B follow"},
)  # fmt: skip
_GLAM_0_1B_64E = replace(
    _GLAM_1_7B_64E, name="GLaM 0.1B/64E", d_model=768, n_layers=12, n_heads=12, n_kv_heads=12, head_dim=64,
    d_ff=3072, expert_d_ff=3072, position_parameters=12 * 32 * 12, printed_parameters="1.9B", printed_active="145M",
    unexplained={"active": "152M follow, as many above the printed figure as for the dense model of this width"},
)  # fmt: skip
_GLAM_DENSE = (
    replace(
        _GLAM_0_1B_64E, name="GLaM 0.1B", n_experts=0, k=0, printed_parameters="130M", printed_active="130M",
        unexplained=dict.fromkeys(("parameters", "active"), "138M follow; 113M without the embedding"),
    ),
    replace(
        _GLAM_1_7B_64E, name="GLaM 1.7B", n_experts=0, k=0, printed_parameters="1.7B", printed_active="1.700B",
        unexplained={"active": "1.676B follow"},
    ),
    replace(_GLAM_8B_64E, name="GLaM 8B", n_experts=0, k=0, printed_parameters="8.7B", printed_active="8.7B"),
    replace(
        _GLAM_64B_64E, name="GLaM 137B", vocab_size=32000, d_ff=65536, n_experts=0, k=0,
        printed_parameters="137B", printed_active="137B", printed_flops=None,
        unexplained=dict.fromkeys(("parameters", "active"), "137.7B follow; 137.4B without the embedding"),
    ),
)  # fmt: skip

_MIXTRAL_8X7B = PublishedMoE(
    "Mixtral 8x7B", "Jiang et al. 2024, table 1; figures of the announcement",
    vocab_size=32000, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128,
    d_ff=14336, expert_d_ff=14336, n_experts=8, k=2, printed_parameters="46.7B", printed_active="12.9B",
)  # fmt: skip
_MIXTRAL_8X22B = replace(
    _MIXTRAL_8X7B, name="Mixtral 8x22B", source="released config; figures of the announcement", d_model=6144,
    n_layers=56, n_heads=48, d_ff=16384, expert_d_ff=16384, printed_parameters="141B", printed_active="39B",
)  # fmt: skip
_DEEPSEEK_V3 = PublishedMoE(
    "DeepSeek-V3", "DeepSeek-AI 2024, section 4.2; without the module for multi-token prediction",
    vocab_size=129280, d_model=7168, n_layers=61, n_heads=128, n_kv_heads=128, head_dim=128,
    latent=LatentAttention(query_rank=1536, key_value_rank=512, nope_dim=128, rope_dim=64, value_dim=128),
    attention_vectors=1536 + 512, d_ff=18432, expert_d_ff=2048, n_experts=256, k=8, n_shared_experts=1, first_dense=3,
    printed_parameters="671B", printed_active="37B", active_counts_embedding=False,
)  # fmt: skip
_DEEPSEEK_V2 = replace(
    _DEEPSEEK_V3, name="DeepSeek-V2", source="DeepSeek-AI 2024, section 3.1.2; released config", vocab_size=102400,
    d_model=5120, n_layers=60, d_ff=12288, expert_d_ff=1536, n_experts=160, k=6, n_shared_experts=2, first_dense=1,
    printed_parameters="236B", printed_active="21B",
)  # fmt: skip
_OLMOE = PublishedMoE(
    "OLMoE-1B-7B", "Muennighoff et al. 2024, table 1; released config",
    vocab_size=50304, d_model=2048, n_layers=16, n_heads=16, n_kv_heads=16, head_dim=128, attention_vectors=2 * 2048,
    d_ff=1024, expert_d_ff=1024, n_experts=64, k=8, printed_parameters="6.9B", printed_active="1.3B",
)  # fmt: skip
_QWEN3_30B = PublishedMoE(
    "Qwen3-30B-A3B", "Yang et al. 2025, table 2; released config and figures",
    vocab_size=151936, d_model=2048, n_layers=48, n_heads=32, n_kv_heads=4, head_dim=128, attention_vectors=2 * 128,
    d_ff=6144, expert_d_ff=768, n_experts=128, k=8, printed_parameters="30.5B", printed_active="3.3B",
    unexplained={"active": "3.35B follow, cut off rather than rounded; 3.04B without the embedding"},
)  # fmt: skip
_QWEN3_235B = replace(
    _QWEN3_30B, name="Qwen3-235B-A22B", d_model=4096, n_layers=94, n_heads=64, d_ff=12288, expert_d_ff=1536,
    printed_parameters="235B", printed_active="22B", unexplained={},
)  # fmt: skip
_GPT_OSS_120B = PublishedMoE(
    "gpt-oss-120b", "OpenAI 2025, table 1; released config",
    vocab_size=201088, d_model=2880, n_layers=36, n_heads=64, n_kv_heads=8, head_dim=64, alternate_window=128,
    attention_vectors=(64 + 2 * 8) * 64 + 2880 + 64,  # biases, and a sink for each head
    d_ff=2880, expert_d_ff=2880, n_experts=128, k=4, expert_vectors=3 * 2880, router_vectors=128,
    printed_parameters="116.83B", printed_active="5.13B", active_counts_embedding=False,
)  # fmt: skip
_GPT_OSS_20B = replace(
    _GPT_OSS_120B, name="gpt-oss-20b", n_layers=24, n_experts=32, router_vectors=32,
    printed_parameters="20.91B", printed_active="3.61B",
)  # fmt: skip

PUBLISHED_MOE_MODELS: Mapping[str, PublishedMoE] = MappingProxyType(
    {
        card.name: card
        for card in (
            *(_SWITCH_BASE, _SWITCH_LARGE, _SWITCH_XXL, _SWITCH_C),
            *_GLAM_DENSE,
            *(_GLAM_0_1B_64E, _GLAM_1_7B_32E, _GLAM_1_7B_64E),
            replace(
                _GLAM_1_7B_64E, name="GLaM 1.7B/128E", n_experts=128, printed_parameters="53B", printed_active="1.881B"
            ),
            *(_GLAM_1_7B_256E, _GLAM_8B_64E, _GLAM_64B_64E),
            *(_MIXTRAL_8X7B, _MIXTRAL_8X22B, _DEEPSEEK_V2, _DEEPSEEK_V3, _OLMOE),
            *(_QWEN3_30B, _QWEN3_235B, _GPT_OSS_20B, _GPT_OSS_120B),
        )
    }
)


class MoEFigures(NamedTuple):
    """One model's figures: numbers of parameters, and operations of a forward pass for each token of the text."""

    name: str
    parameters: int
    active_parameters: int
    active_share: float
    weight_flops_per_token: float
    forward_flops_per_token: float


def moe_figures(context: int = 1024) -> list[MoEFigures]:
    """A row for each of :data:`PUBLISHED_MOE_MODELS`, in its order: plain numbers to print or plot.

    Args:
        context: tokens of a text. The operations of its weights (:meth:`PublishedMoE.weight_flops`) and of all products
            (:meth:`PublishedMoE.forward_flops`, each pair of tokens that sees each other) are divided by its tokens.
            Encoder-decoders read so many and write 114 for 512 of them, as T5 does.

    ``active_share`` is active_parameters / parameters, 1 for dense models.
    """
    if context < 1:
        raise ValueError(f"context must be at least 1, got {context}")
    rows = []
    for card in PUBLISHED_MOE_MODELS.values():
        read, written = SPAN_CORRUPTION
        target = max(round(context * written / read), 1) if card.n_encoder_layers else None
        tokens = context + (target or 0)
        rows.append(
            MoEFigures(
                card.name,
                card.parameters,
                card.active_parameters,
                card.active_parameters / card.parameters,
                card.weight_flops(context, target) / tokens,
                card.forward_flops(context, target, causal=True) / tokens,
            )
        )
    return rows
