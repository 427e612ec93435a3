"""How Hugging Face writes rotary positions and their scaling into a config, against ours."""

from collections.abc import Mapping
from typing import Any

from minillm.layers.positions import LinearScaling, Llama3Scaling, NTKScaling, RopeScaling, YarnScaling
from minillm.models.config import TransformerConfig
from minillm.models.huggingface_layout import get, require


def read_rope(fields: Mapping[str, Any], context_length: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from the newer ``rope_parameters`` or the older ``rope_theta`` and ``rope_scaling``.

    ``context_length`` is the config's max_position_embeddings, which stands in for what scalings leave out.
    """
    rope = {**(fields.get("rope_scaling") or {}), **(fields.get("rope_parameters") or {})}
    base = float(get(rope, "rope_theta", get(fields, "rope_theta", 10000.0)))
    require(fields, partial_rotary_factor=1.0)
    require(rope, partial_rotary_factor=1.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    original = get(fields, "original_max_position_embeddings", rope.get("original_max_position_embeddings"))
    original = context_length if original is None else original
    if kind == "default":
        return base, None
    if kind == "linear":
        return base, LinearScaling(float(rope["factor"]))
    if kind == "llama3":
        return base, Llama3Scaling(
            float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"]), original
        )
    if kind == "yarn":
        require(rope, mscale=None, mscale_all_dim=None)
        attention_factor = rope.get("attention_factor")
        return base, YarnScaling(
            context_length / original if rope["factor"] is None else float(rope["factor"]),
            original,
            beta_fast=float(get(rope, "beta_fast", 32.0)),
            beta_slow=float(get(rope, "beta_slow", 1.0)),
            attention_factor=None if attention_factor is None else float(attention_factor),
            truncate=get(rope, "truncate", True),
        )
    raise ValueError(f"rope_type must be one of default, linear, llama3, yarn, got {kind!r}")


def write_rope(config: TransformerConfig) -> dict[str, Any]:
    """The ``rope_parameters`` of a config of ours.

    NTK-aware scaling is written as the larger base that it amounts to, since transformers knows its dynamic form only:
    the same function, and read back it is a base without a scaling.
    """
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_theta": config.rope_base, "rope_type": "default"}
    if isinstance(scaling, NTKScaling):
        rope["rope_theta"] = scaling.scaled_base(config.rope_base, config.head_dim)
    elif scaling is not None:
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if isinstance(scaling, Llama3Scaling):
        rope["low_freq_factor"] = scaling.low_freq_factor
        rope["high_freq_factor"] = scaling.high_freq_factor
        rope["original_max_position_embeddings"] = scaling.original_context_length
    if isinstance(scaling, YarnScaling):
        rope["beta_fast"] = scaling.beta_fast
        rope["beta_slow"] = scaling.beta_slow
        rope["truncate"] = scaling.truncate
        rope["original_max_position_embeddings"] = scaling.original_context_length
        if scaling.attention_factor is not None:
            rope["attention_factor"] = float(scaling.attention_factor)
    return rope
