"""The links of a simulated cluster: what a message costs, and which port it waits for.

The alpha-beta model (Hockney 1994, "The communication challenge for MPP"): a message of b bytes takes
latency + b / bandwidth. Each rank has, for each kind of link, one port to send and one to receive, which carry one
message at a time (single-port, full duplex), in the order in which the messages were ready: one that waits for its
sender's port keeps its receiver's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minillm.costs.arguments import at_least, positive


@dataclass(frozen=True)
class Network:
    """Links between ranks.

    Args:
        latency: seconds before the first byte of a message, at least 0.
        bandwidth: bytes per second of each direction of a link, above 0.
        ranks_per_node: ranks of one node (0 ... k-1, k ... 2k-1, ...) talk over faster links inside it; None: every
            rank stands alone.
        inside_latency, inside_bandwidth: of the links inside a node.

    Raises:
        ValueError: a value out of range.
    """

    latency: float = 5e-6
    bandwidth: float = 25e9
    ranks_per_node: int | None = None
    inside_latency: float = 2e-6
    inside_bandwidth: float = 300e9

    def __post_init__(self) -> None:
        at_least(0, latency=self.latency, inside_latency=self.inside_latency)
        positive(bandwidth=self.bandwidth, inside_bandwidth=self.inside_bandwidth)
        if self.ranks_per_node is not None:
            at_least(1, ranks_per_node=self.ranks_per_node)

    def inside(self, ranks: Sequence[int]) -> bool:
        """Whether all of these ranks stand in one node."""
        return self.ranks_per_node is not None and len({rank // self.ranks_per_node for rank in ranks}) == 1

    def link(self, ranks: Sequence[int]) -> tuple[float, float]:
        """(latency, bandwidth) of the slowest link of a ring through these ranks."""
        if self.inside(ranks):
            return self.inside_latency, self.inside_bandwidth
        return self.latency, self.bandwidth


class Ports:
    """When each port of each rank is free again."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._free: dict[tuple[int, str, bool], float] = {}

    def occupy(self, senders: Sequence[int], receivers: Sequence[int], ready: float, seconds: float) -> float:
        """Take all these ports for `seconds` from the first moment, not before `ready`, at which all are free; when."""
        inside = self._network.inside([*senders, *receivers])
        ports = [(rank, "send", inside) for rank in senders] + [(rank, "receive", inside) for rank in receivers]
        begin = max([ready, *(self._free.get(port, 0.0) for port in ports)])
        for port in ports:
            self._free[port] = begin + seconds
        return begin
