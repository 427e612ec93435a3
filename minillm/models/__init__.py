"""Models: the decoder-only transformer, its config, named configs, and exchange with Hugging Face's layouts."""

from minillm.models import huggingface, presets
from minillm.models.block import TransformerBlock
from minillm.models.config import TransformerConfig
from minillm.models.modes import evaluation_mode
from minillm.models.moe_config import MoEConfig
from minillm.models.transformer import Transformer
from minillm.models.uptraining import convert_kv_heads

__all__ = [
    "MoEConfig",
    "Transformer",
    "TransformerBlock",
    "TransformerConfig",
    "convert_kv_heads",
    "evaluation_mode",
    "huggingface",
    "presets",
]
