"""Many ranks: a cluster in a cell, real processes, collectives, and training that is spread over them.

Everything is plain `torch.distributed`: the same function runs on simulated ranks (`simulate_ranks`), on real processes
of this machine (`run_ranks`) and under `torchrun`.
"""

from minillm.distributed.collectives import ring_all_gather, ring_all_reduce, ring_reduce_scatter
from minillm.distributed.collectives_all_to_all import all_to_all
from minillm.distributed.collectives_broadcast import broadcast, chain_broadcast
from minillm.distributed.collectives_server import server_all_reduce
from minillm.distributed.collectives_tree import recursive_halving_all_reduce, tree_all_reduce
from minillm.distributed.data_parallel import DataParallel
from minillm.distributed.errors import DeadlockError, MismatchError, RankError
from minillm.distributed.labels import annotate
from minillm.distributed.memory import Memory, measure_memory
from minillm.distributed.mesh import Mesh, init_mesh
from minillm.distributed.mesh_layout import MeshLayout
from minillm.distributed.offload import Offload
from minillm.distributed.overlap import Overlap, overlap
from minillm.distributed.parameter_server import ParameterServer
from minillm.distributed.processes import run_ranks
from minillm.distributed.simulator import (
    Message,
    Network,
    Simulation,
    Span,
    compute,
    is_simulated,
    now,
    simulate_ranks,
    start,
)
from minillm.distributed.startup import Started, StartupError, initialize
from minillm.distributed.traffic import Traffic, TrafficEvent, count_traffic
from minillm.distributed.zero import Zero
from minillm.distributed.zero_mics import mics_groups

__all__ = [
    "DataParallel",
    "DeadlockError",
    "Memory",
    "Mesh",
    "MeshLayout",
    "Message",
    "MismatchError",
    "Network",
    "Offload",
    "Overlap",
    "ParameterServer",
    "RankError",
    "Simulation",
    "Span",
    "Started",
    "StartupError",
    "Traffic",
    "TrafficEvent",
    "Zero",
    "all_to_all",
    "annotate",
    "broadcast",
    "chain_broadcast",
    "compute",
    "count_traffic",
    "init_mesh",
    "initialize",
    "is_simulated",
    "measure_memory",
    "mics_groups",
    "now",
    "overlap",
    "recursive_halving_all_reduce",
    "ring_all_gather",
    "ring_all_reduce",
    "ring_reduce_scatter",
    "run_ranks",
    "server_all_reduce",
    "simulate_ranks",
    "start",
    "tree_all_reduce",
]
