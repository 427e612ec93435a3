"""Closed forms: parameters, FLOPs and bytes of a model, from its config alone. Nothing here needs torch."""

from minillm.costs.attention import (
    attention_activation_bytes,
    attention_activation_bytes_by_part,
    attention_flops,
    attention_flops_by_part,
    live_fraction,
    live_pairs,
)
from minillm.costs.communication import (
    bytes_sent_by_ring,
    communication_bytes,
    communication_seconds,
    communication_steps,
    data_parallel_step_seconds,
    ring_chunks,
)
from minillm.costs.flash import (
    AttentionSize,
    Traffic,
    arithmetic_intensity,
    flash_1_tiles,
    flash_1_traffic,
    flash_2_traffic,
    flash_backward_traffic,
    flash_extra_elements,
    flash_flops,
    live_tiles,
    standard_attention_backward_traffic,
    standard_attention_traffic,
)
from minillm.costs.flops import (
    attention_flops_per_pair,
    decode_flops_per_token,
    dense_weights,
    forward_flops,
    forward_flops_per_token,
    training_flops,
)
from minillm.costs.kv_cache import kv_cache_bytes, kv_cache_bytes_per_token
from minillm.costs.mics import MiCSTraffic, mics_bytes_per_rank, mics_communication_bytes
from minillm.costs.moe import expert_parameters, moe_layers
from minillm.costs.moe_card import PublishedMoE
from minillm.costs.offload import offload_device_bytes, offload_host_bytes, offload_link_bytes
from minillm.costs.parameters import active_parameters, parameters, parameters_by_part
from minillm.costs.pipeline import (
    pipedream_staleness,
    pipedream_versions,
    pipeline_bubble,
    pipeline_bytes_sent,
    pipeline_in_flight,
    zero_bubble_seconds,
)
from minillm.costs.published import PUBLISHED_MODELS, PublishedModel
from minillm.costs.published_moe import PUBLISHED_MOE_MODELS, MoEFigures, moe_figures
from minillm.costs.zero import (
    ZeroMemory,
    zero_bytes_by_kind,
    zero_bytes_per_rank,
    zero_communication_bytes,
    zero_largest_model,
    zero_table,
)

__all__ = [
    "PUBLISHED_MODELS",
    "PUBLISHED_MOE_MODELS",
    "AttentionSize",
    "MiCSTraffic",
    "MoEFigures",
    "PublishedMoE",
    "PublishedModel",
    "Traffic",
    "ZeroMemory",
    "active_parameters",
    "arithmetic_intensity",
    "attention_activation_bytes",
    "attention_activation_bytes_by_part",
    "attention_flops",
    "attention_flops_by_part",
    "attention_flops_per_pair",
    "bytes_sent_by_ring",
    "communication_bytes",
    "communication_seconds",
    "communication_steps",
    "data_parallel_step_seconds",
    "decode_flops_per_token",
    "dense_weights",
    "expert_parameters",
    "flash_1_tiles",
    "flash_1_traffic",
    "flash_2_traffic",
    "flash_backward_traffic",
    "flash_extra_elements",
    "flash_flops",
    "forward_flops",
    "forward_flops_per_token",
    "kv_cache_bytes",
    "kv_cache_bytes_per_token",
    "live_fraction",
    "live_pairs",
    "live_tiles",
    "mics_bytes_per_rank",
    "mics_communication_bytes",
    "moe_figures",
    "moe_layers",
    "offload_device_bytes",
    "offload_host_bytes",
    "offload_link_bytes",
    "parameters",
    "parameters_by_part",
    "pipedream_staleness",
    "pipedream_versions",
    "pipeline_bubble",
    "pipeline_bytes_sent",
    "pipeline_in_flight",
    "ring_chunks",
    "standard_attention_backward_traffic",
    "standard_attention_traffic",
    "training_flops",
    "zero_bubble_seconds",
    "zero_bytes_by_kind",
    "zero_bytes_per_rank",
    "zero_communication_bytes",
    "zero_largest_model",
    "zero_table",
]
