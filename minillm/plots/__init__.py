"""Pictures of results: plain data in, a matplotlib Figure out. Nothing here needs a display or torch."""

from minillm.plots.attention import attention_map
from minillm.plots.bars import bars, format_bytes, memory_bars
from minillm.plots.curves import loss_curve
from minillm.plots.expert_preferences import preference_map, routing_map
from minillm.plots.experts import expert_load, expert_load_over_time
from minillm.plots.mesh import mesh_table
from minillm.plots.patterns import pattern_grid
from minillm.plots.pipeline import Play, pipeline_timeline, play
from minillm.plots.ring import ring_steps
from minillm.plots.roofline import roofline
from minillm.plots.style import COLOURS, save, visible
from minillm.plots.tiles import tile_order
from minillm.plots.timeline import timeline
from minillm.plots.tokens import token_strip

__all__ = [
    "COLOURS",
    "Play",
    "attention_map",
    "bars",
    "expert_load",
    "expert_load_over_time",
    "format_bytes",
    "loss_curve",
    "memory_bars",
    "mesh_table",
    "pattern_grid",
    "pipeline_timeline",
    "play",
    "preference_map",
    "ring_steps",
    "roofline",
    "routing_map",
    "save",
    "tile_order",
    "timeline",
    "token_strip",
    "visible",
]
