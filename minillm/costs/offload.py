"""What ZeRO-Offload keeps on the device and on the host, and what goes between them.

The optimizer and its state are on the host, forward and backward on the device (Ren et al. 2021, "ZeRO-Offload:
Democratizing Billion-Scale Model Training", arXiv 2101.06840, sections 3 and 4). For Psi
parameters in mixed precision, per rank of N:

    device    2 Psi             the 16-bit parameters; gradients only until they are sent, a bucket at a time
    host     14 Psi / N         12 of optimizer state and 2 of gradients: what stage 2 of ZeRO gives the rank
    link      4 Psi / N a step  gradients down and parameters up
"""

from minillm.costs.arguments import at_least


def offload_device_bytes(n_parameters: float, *, parameter_bytes: float = 2) -> float:
    """Bytes of model state on the device: 2 Psi, the 16-bit parameters alone.

    Gradients are there only until they are sent to the host, a bucket at a time.
    """
    at_least(0, n_parameters=n_parameters, parameter_bytes=parameter_bytes)
    return n_parameters * parameter_bytes


def offload_host_bytes(
    n_parameters: float, world_size: int = 1, *, gradient_bytes: float = 2, optimizer_bytes: float = 12
) -> float:
    """Bytes that each rank keeps on the host: (12 + 2) Psi / N, the optimizer state and the gradients.

    With N ranks each has the part that stage 2 gives it.
    """
    at_least(0, n_parameters=n_parameters, gradient_bytes=gradient_bytes, optimizer_bytes=optimizer_bytes)
    at_least(1, world_size=world_size)
    return n_parameters * (optimizer_bytes + gradient_bytes) / world_size


def offload_link_bytes(
    n_parameters: float,
    world_size: int = 1,
    *,
    parameter_bytes: float = 2,
    gradient_bytes: float = 2,
    micro_batches: int = 1,
) -> float:
    """Bytes between one device and the host in one step: 4 Psi / N, gradients to the host and parameters back.

    It is the least that any cut of the data flow with the optimizer on the host moves. Every micro-batch sends its
    gradients; the parameters come back once, and each of N ranks moves its part.
    """
    at_least(0, n_parameters=n_parameters, parameter_bytes=parameter_bytes, gradient_bytes=gradient_bytes)
    at_least(1, world_size=world_size, micro_batches=micro_batches)
    return n_parameters * (micro_batches * gradient_bytes + parameter_bytes) / world_size
