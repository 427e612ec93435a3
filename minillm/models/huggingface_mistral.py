"""How Hugging Face lays out Mistral (Jiang et al. 2023; model_type "mistral"): Llama's weights, a sliding window."""

from collections.abc import Mapping
from typing import Any

from minillm.models.config import TransformerConfig
from minillm.models.huggingface_layout import Layout, require, require_fields
from minillm.models.huggingface_llama import LLAMA, decoder_fields

# Where they differ from Llama's, for config files that leave out what is usual.
_DEFAULTS = {"num_key_value_heads": 8, "intermediate_size": 14336, "max_position_embeddings": 131072}


def _read_mistral(fields: Mapping[str, Any]) -> TransformerConfig:
    require(fields, layer_types=None)
    config = LLAMA.read_config({**_DEFAULTS, **fields})
    # Left out it is 4096, null is none (as in Mistral 7B v0.2 and later). It counts the token itself, as ours does.
    return config.replace(window=fields.get("sliding_window", 4096))


def _write_mistral(config: TransformerConfig) -> dict[str, Any]:
    require_fields("Mistral", config, moe=None)
    return {"model_type": "mistral", **decoder_fields("Mistral", config), "sliding_window": config.window}


MISTRAL = Layout("MistralForCausalLM", LLAMA.prefix, LLAMA.ignored, _read_mistral, _write_mistral, LLAMA.sources)
