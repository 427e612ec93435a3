"""Lets a simulated rank's clock run by the matrix products that it really does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from minillm.distributed.labels import current_label
from minillm.distributed.simulator.clock import compute


class FlopClock(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Moves the rank's clock by the floating-point operations of each matrix product and attention, as
    `torch.utils.flop_counter` counts them; all else is free."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        count: Callable[..., int] | None = flop_registry.get(func.overloadpacket)
        if count is not None:
            compute(flops=count(*args, **kwargs, out_val=result), name=current_label() or "compute")
        return result
