"""Many ranks: a cluster in a cell, real processes, collectives, and training that is spread over them.

Everything is plain `torch.distributed`: the same function runs on simulated ranks (`simulate_ranks`), on real processes
of this machine (`run_ranks`) and under `torchrun`.
"""

from minillm.distributed.data_parallel import DataParallel
from minillm.distributed.errors import DeadlockError, MismatchError, RankError
from minillm.distributed.labels import annotate
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

__all__ = [
    "DataParallel",
    "DeadlockError",
    "Message",
    "MismatchError",
    "Network",
    "RankError",
    "Simulation",
    "Span",
    "annotate",
    "compute",
    "is_simulated",
    "now",
    "simulate_ranks",
    "start",
]
