"""Named configs: published models, and small ones to learn with.

The published ones have exactly the published parameter counts (``minillm.costs.parameters``), which the tests hold.
Build the big ones without memory: ``with torch.device("meta"): Transformer(presets.get("llama-3-70b"))``.

Sources: Radford et al. 2019, table 2 (GPT-2; the counts are those of the released weights); Touvron et al. 2023, "Llama
2", table 1 and appendix A.2.1; Grattafiori et al. 2024, "The Llama 3 Herd of Models", table 3; Jiang et al. 2023,
"Mistral 7B", table 1; Jiang et al. 2024, "Mixtral of Experts", table 1; Zhang et al. 2024,
"TinyLlama", table 2; the released config files.
"""

from collections.abc import Mapping
from types import MappingProxyType

from minillm.layers.positions import Llama3Scaling
from minillm.models.config import TransformerConfig
from minillm.models.moe_config import MoEConfig

_GPT2 = TransformerConfig(
    vocab_size=50257, context_length=1024, d_model=768, n_layers=12, n_heads=12, activation="gelu_tanh", dropout=0.1
)
_LLAMA_2 = TransformerConfig(
    vocab_size=32000,
    context_length=4096,
    d_model=4096,
    n_layers=32,
    n_heads=32,
    d_ff=11008,
    norm="rmsnorm",
    norm_eps=1e-5,
    positions="rope",
    activation="swiglu",
    bias=False,
    tied_embeddings=False,
)
_LLAMA_3 = _LLAMA_2.replace(vocab_size=128256, context_length=8192, n_kv_heads=8, d_ff=14336, rope_base=500000.0)
_LLAMA_3_2 = _LLAMA_3.replace(
    context_length=131072, d_ff=8192, tied_embeddings=True, rope_scaling=Llama3Scaling(factor=32.0)
)
_MIXTRAL = _LLAMA_2.replace(
    context_length=32768, n_kv_heads=8, d_ff=14336, rope_base=1e6, moe=MoEConfig(8, 2, balance_loss=0.001)
)
_SMALL_LLAMA = _LLAMA_2.replace(vocab_size=8192, context_length=512, tied_embeddings=True)

PRESETS: Mapping[str, TransformerConfig] = MappingProxyType(
    {
        # To learn with: minutes on a laptop.
        "tiny": TransformerConfig(vocab_size=2048, context_length=128, d_model=128, n_layers=4, n_heads=4),
        "tiny-llama": _SMALL_LLAMA.replace(
            vocab_size=2048, context_length=128, d_model=128, n_layers=4, n_heads=4, n_kv_heads=2, d_ff=352
        ),
        "mini": TransformerConfig(vocab_size=8192, context_length=256, d_model=384, n_layers=6, n_heads=6),
        "mini-llama": _SMALL_LLAMA.replace(d_model=384, n_layers=6, n_heads=6, n_kv_heads=2, d_ff=1024),
        # Published.
        "gpt2-small": _GPT2,
        "gpt2-medium": _GPT2.replace(d_model=1024, n_layers=24, n_heads=16),
        "gpt2-large": _GPT2.replace(d_model=1280, n_layers=36, n_heads=20),
        "gpt2-xl": _GPT2.replace(d_model=1600, n_layers=48, n_heads=25),
        "llama-2-7b": _LLAMA_2,
        "llama-2-13b": _LLAMA_2.replace(d_model=5120, n_layers=40, n_heads=40, d_ff=13824),
        "llama-2-70b": _LLAMA_2.replace(d_model=8192, n_layers=80, n_heads=64, n_kv_heads=8, d_ff=28672),
        "llama-3-8b": _LLAMA_3,
        "llama-3-70b": _LLAMA_3.replace(d_model=8192, n_layers=80, n_heads=64, d_ff=28672),
        "llama-3.2-1b": _LLAMA_3_2.replace(d_model=2048, n_layers=16),
        "llama-3.2-3b": _LLAMA_3_2.replace(d_model=3072, n_layers=28, n_heads=24),
        "mistral-7b": _LLAMA_2.replace(context_length=32768, n_kv_heads=8, d_ff=14336, window=4096),
        "mixtral-8x7b": _MIXTRAL,
        "mixtral-8x22b": _MIXTRAL.replace(context_length=65536, d_model=6144, n_layers=56, n_heads=48, d_ff=16384),
        "tinyllama-1.1b": _LLAMA_2.replace(context_length=2048, d_model=2048, n_layers=22, n_kv_heads=4, d_ff=5632),
        "smollm2-135m": _LLAMA_2.replace(
            vocab_size=49152, context_length=8192, d_model=576, n_layers=30, n_heads=9, n_kv_heads=3, d_ff=1536,
            rope_base=100000.0, tied_embeddings=True, initializer_std=1 / 24,
        ),
    }
)  # fmt: skip


def names() -> list[str]:
    """The names :func:`get` knows."""
    return list(PRESETS)


def get(name: str) -> TransformerConfig:
    """The config of that name; ValueError naming all for any other. Vary it with :meth:`TransformerConfig.replace`."""
    if name not in PRESETS:
        raise ValueError(f"the preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
