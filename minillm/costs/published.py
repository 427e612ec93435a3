"""The attention of published models as data: what their KV caches cost follows from six numbers each."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class PublishedModel:
    """A published decoder's attention; ``kv_cache_bytes`` and ``attention_flops`` take it in place of a config.

    Attributes: ``context_length``, the longest text by the source, in tokens (a released config may say more);
    ``window``, tokens that a token sees (None: all before it); ``source``, where the numbers are printed.
    """

    name: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    context_length: int
    source: str
    window: int | None = None

    @property
    def variant(self) -> str:
        """MHA, GQA or MQA."""
        if self.n_kv_heads == self.n_heads:
            return "MHA"
        return "MQA" if self.n_kv_heads == 1 else "GQA"


_LLAMA_2 = 'Touvron et al. 2023, "Llama 2", table 1; released config'
_LLAMA_3 = 'Grattafiori et al. 2024, "The Llama 3 Herd of Models", table 3'
_FALCON = 'Almazrouei et al. 2023, "The Falcon Series of Open Language Models"; released config'

PUBLISHED_MODELS: Mapping[str, PublishedModel] = MappingProxyType(
    {
        model.name: model
        for model in (
            PublishedModel("GPT-2 XL", 48, 1600, 25, 25, 64, 1024, "Radford et al. 2019, table 2; released config"),
            PublishedModel("GPT-3 175B", 96, 12288, 96, 96, 128, 2048, "Brown et al. 2020, table 2.1; all dense here"),
            PublishedModel("OPT-13B", 40, 5120, 40, 40, 128, 2048, "Zhang et al. 2022, table 1"),
            PublishedModel("OPT-175B", 96, 12288, 96, 96, 128, 2048, "Zhang et al. 2022, table 1"),
            PublishedModel("BLOOM 176B", 70, 14336, 112, 112, 128, 2048, "Le Scao et al. 2022, table 3"),
            PublishedModel("PaLM 540B", 118, 18432, 48, 1, 256, 2048, "Chowdhery et al. 2022, table 1 and section 2"),
            PublishedModel("Llama 2 7B", 32, 4096, 32, 32, 128, 4096, _LLAMA_2),
            PublishedModel("Llama 2 70B", 80, 8192, 64, 8, 128, 4096, _LLAMA_2),
            PublishedModel("Falcon-7B", 32, 4544, 71, 1, 64, 2048, _FALCON),
            PublishedModel("Falcon-40B", 60, 8192, 128, 8, 64, 2048, _FALCON),
            PublishedModel("Falcon-180B", 80, 14848, 232, 8, 64, 2048, _FALCON),
            PublishedModel("Mistral 7B", 32, 4096, 32, 8, 128, 8192, "Jiang et al. 2023, table 1", window=4096),
            PublishedModel("Llama 3 8B", 32, 4096, 32, 8, 128, 8192, _LLAMA_3),
            PublishedModel("Llama 3 70B", 80, 8192, 64, 8, 128, 8192, _LLAMA_3),
            PublishedModel("Llama 3.1 405B", 126, 16384, 128, 8, 128, 131072, _LLAMA_3),
        )
    }
)
