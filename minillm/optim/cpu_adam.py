"""CPU Adam: AdamW on the host, for parameters that live in low precision on a device (ZeRO-Offload).

Source: Ren et al. 2021, "ZeRO-Offload: Democratizing Billion-Scale Model Training" (arXiv 2101.06840), section 5.1 and
Algorithm 1. The formula and its SIMD loops are PyTorch's (`minillm.kernels.adamw_step`); what is added here is the one
pass over mixed precision: each tile of a 16-bit gradient is widened, used, and the new parameter rounded to 16 bits
while the tile is still in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from minillm.kernels import adamw_step
from minillm.optim.adamw import AdamW


class CPUAdam(AdamW):
    """AdamW over master weights in the host's memory, whose gradients and rounded copies may have another dtype.

        masters = [p.detach().float().cpu() for p in model.parameters()]           # the model is in bfloat16
        optimizer = CPUAdam(masters, lr=1e-4)
        optimizer.step(gradients=dict(zip(masters, gradients)), copies=dict(zip(masters, rounded)))

    With float32 masters and 16-bit gradients and copies a parameter costs 28 bytes of memory traffic: 14 read (gradient
    2, master 4, moments 8) and 14 written (master 4, moments 8, copy 2). Widening all gradients first and rounding all
    parameters last would be 12 more.

    The state has the names and the layout of `AdamW` and `torch.optim.AdamW`.

    Args:
        params: the masters, contiguous and on the CPU, or groups of them.
        lr, betas, eps, weight_decay: as in `AdamW`.
        tile: how many numbers are updated at a time, at least 1. 2^18 of them with all that
            belongs to them are some 5 MB, about what a core has in its caches.

    Raises:
        ValueError: a hyperparameter outside its range; at the step, a parameter that is not contiguous or not on the
            CPU (until then any may stand for it: :class:`minillm.distributed.Offload` puts its own masters in place).
        TypeError: a parameter that is not real floating point, or a sparse gradient.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        tile: int = 2**18,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, fused=True)
        if not isinstance(tile, int) or isinstance(tile, bool):
            raise TypeError(f"tile must be an integer, got {tile!r}")
        if tile < 1:
            raise ValueError(f"tile must be at least 1, got {tile}")
        # Among the groups' settings, so that a copy of the optimizer has it too.
        self.defaults["tile"] = tile
        for group in self.param_groups:
            group["tile"] = tile

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        gradients: Mapping[Tensor, Tensor] | None = None,
        copies: Mapping[Tensor, Tensor] | None = None,
    ) -> float | None:
        """Update every parameter that has a gradient; returns the closure's loss where one is given.

        Args:
            closure: as in every optimizer of PyTorch.
            gradients: of the masters, by master, in any floating dtype; without it their `grad` is taken. A master that
                is not in it is left as it is.
            copies: by master, contiguous tensors of as many numbers in any floating dtype: they receive the updated
                master, rounded. A copy may be the gradient itself: each tile is read before it is written.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad if gradients is None else gradients.get(parameter)
                if gradient is None:
                    continue
                if gradient.is_sparse:
                    raise TypeError("CPUAdam needs dense gradients, and a parameter has a sparse one")
                if parameter.device.type != "cpu" or not parameter.is_contiguous():
                    raise ValueError(
                        f"params must be contiguous and on the CPU, got one of shape {tuple(parameter.shape)} and "
                        f"strides {parameter.stride()} on {parameter.device}"
                    )
                if not self.state[parameter]:
                    self._start(parameter, group)
                copy = None if copies is None else copies.get(parameter)
                self._update_by_tiles(parameter, gradient, copy, group)
        return loss

    def _update_by_tiles(self, parameter: Tensor, gradient: Tensor, copy: Tensor | None, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        state["step"] += 1
        step = int(state["step"].item())
        flat = [parameter.view(-1), gradient.reshape(-1), state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)]
        rounded = None if copy is None else copy.view(-1)
        size = group.get("tile", self.defaults["tile"])  # a state that another AdamW has saved has none
        for start in range(0, parameter.numel(), size):
            tile = slice(start, start + size)
            master, part, exp_avg, exp_avg_sq = (tensor[tile] for tensor in flat)
            adamw_step(
                master,
                part.to(master.dtype),
                exp_avg,
                exp_avg_sq,
                step=step,
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                backend="torch",
            )
            if rounded is not None:
                rounded[tile] = master
