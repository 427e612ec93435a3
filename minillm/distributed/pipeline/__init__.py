"""Pipeline parallelism: schedules as data, and what reads them."""

from minillm.distributed.pipeline.actions import Action, Kind
from minillm.distributed.pipeline.breadth_first import breadth_first
from minillm.distributed.pipeline.chimera import chimera
from minillm.distributed.pipeline.dualpipe import dualpipe
from minillm.distributed.pipeline.durations import Durations
from minillm.distributed.pipeline.gpipe import gpipe
from minillm.distributed.pipeline.interleaved import interleaved
from minillm.distributed.pipeline.naive import naive
from minillm.distributed.pipeline.one_f_one_b import one_f_one_b
from minillm.distributed.pipeline.partition import partition
from minillm.distributed.pipeline.pipedream import pipedream
from minillm.distributed.pipeline.pipedream_2bw import pipedream_2bw
from minillm.distributed.pipeline.pipeline import Pipeline
from minillm.distributed.pipeline.registry import SCHEDULES, make_schedule
from minillm.distributed.pipeline.routes import ScheduleError, loop_route, v_route
from minillm.distributed.pipeline.schedule import Schedule, dependencies, schedule_of
from minillm.distributed.pipeline.simulate import simulate
from minillm.distributed.pipeline.split import Split, split
from minillm.distributed.pipeline.timeline import Timeline
from minillm.distributed.pipeline.validate import Proof, validate
from minillm.distributed.pipeline.zero_bubble import zero_bubble

__all__ = [
    "SCHEDULES",
    "Action",
    "Durations",
    "Kind",
    "Pipeline",
    "Proof",
    "Schedule",
    "ScheduleError",
    "Split",
    "Timeline",
    "breadth_first",
    "chimera",
    "dependencies",
    "dualpipe",
    "gpipe",
    "interleaved",
    "loop_route",
    "make_schedule",
    "naive",
    "one_f_one_b",
    "partition",
    "pipedream",
    "pipedream_2bw",
    "schedule_of",
    "simulate",
    "split",
    "v_route",
    "validate",
    "zero_bubble",
]
