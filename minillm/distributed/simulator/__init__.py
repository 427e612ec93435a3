"""A cluster in one process: `simulate_ranks`, its virtual clock and its records."""

from minillm.distributed.labels import annotate
from minillm.distributed.simulator.clock import Pending, compute, is_simulated, now, start, subscribe
from minillm.distributed.simulator.network import Network
from minillm.distributed.simulator.records import CallRecord, Message, Span
from minillm.distributed.simulator.simulation import Simulation, simulate_ranks

__all__ = [
    "CallRecord",
    "Message",
    "Network",
    "Pending",
    "Simulation",
    "Span",
    "annotate",
    "compute",
    "is_simulated",
    "now",
    "simulate_ranks",
    "start",
    "subscribe",
]
