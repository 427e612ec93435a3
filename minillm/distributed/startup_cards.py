"""What each rank says of itself before the group is made, and whether ranks that say so can work together."""

import socket
from collections.abc import Mapping
from dataclasses import dataclass

import torch

import minillm
from minillm.distributed.errors import named_ranks


@dataclass(frozen=True)
class Card:
    """What each rank says of itself before the group is made."""

    torch: str
    minillm: str
    backend: str
    world_size: int
    host: str
    trouble: str | None  # why this rank cannot start


def card_of(backend: str, world_size: int, device: torch.device) -> Card:
    """This process' own card."""
    trouble = None
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        trouble = f"needs GPU {device.index} and sees {torch.cuda.device_count()}: start fewer ranks on this machine"
    return Card(
        torch=torch.__version__,
        minillm=minillm.__version__,
        backend=backend,
        world_size=world_size,
        host=socket.gethostname(),
        trouble=trouble,
    )


def verdict(cards: Mapping[int, Card], world_size: int, timeout: float) -> str:
    """What is wrong with the ranks that came within `timeout` seconds, and the cure; "" if they can start."""
    troubles = []
    missing = [rank for rank in range(world_size) if rank not in cards]
    if missing:
        hosts: dict[str, list[int]] = {}
        for rank, card in cards.items():
            hosts.setdefault(card.host, []).append(rank)
        here = "; ".join(f"{named_ranks(ranks)} on {host}" for host, ranks in hosts.items())
        troubles.append(
            f"{named_ranks(missing)} of {world_size} did not come within {timeout:g} s (here: {here}). Start every "
            "rank with the same WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or see in its output why it ended"
        )
    troubles += [f"rank {rank} on {card.host} {card.trouble}" for rank, card in cards.items() if card.trouble]
    install = "install the same version on all machines"
    for name, said, cure in (
        ("world_size", "WORLD_SIZE", "start all with the same one"),
        ("torch", "torch", install),
        ("minillm", "minillm", install),
        (
            "backend",
            "backend",
            "NCCL needs a GPU for each rank: start all with backend='gloo', or see why torch sees none",
        ),
    ):
        values: dict[str, list[int]] = {}
        for rank, card in cards.items():
            values.setdefault(str(getattr(card, name)), []).append(rank)
        if len(values) > 1:
            found = ", ".join(f"{value} on {named_ranks(ranks)}" for value, ranks in values.items())
            troubles.append(f"the ranks differ in {said}: {found}; {cure}")
    return "; ".join(troubles)
