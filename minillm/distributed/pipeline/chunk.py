"""One piece of a model on its stage: the passes of its micro-batches, and what is kept between them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from minillm.distributed.pipeline.deferred import DeferredGradients, deferring
from minillm.distributed.pipeline.transport import Tensors
from minillm.distributed.pipeline.weight_versions import WeightVersions

Loss = Callable[[Tensors], Tensor]
"""What the last piece gave -> a scalar."""


class Chunk:
    """Runs passes through a piece, and keeps a graph for each micro-batch from its forward to its backward pass.

    Args:
        module: the piece: a tensor, or several, to a tensor or a tuple of them.
        recompute: keep only what a forward pass was given, and run it again before its backward pass (Huang et al.
            2019, "GPipe", section 2.3).
        split: the micro-batches whose backward pass comes in two halves.
        context: entered around each forward pass, for autocast.
        versions: of the weights, where updates come between the passes of one run; None: there are none.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        recompute: bool,
        split: Collection[int],
        context: Callable[[], contextlib.AbstractContextManager[object]],
        versions: WeightVersions | None,
    ) -> None:
        self.module, self.versions = module, versions
        self._recompute, self._split, self._context = recompute, split, context
        self._kept: dict[int, tuple[Tensors, Tensors]] = {}  # micro-batch -> inputs and outputs, with the graph
        self._deferred: dict[int, DeferredGradients] = {}

    def clear(self) -> None:
        """Forget what a run that was broken off has left."""
        if self.versions is not None:
            self.versions.begin()
        self._kept.clear()
        self._deferred.clear()

    def forward(self, micro_batch: int, inputs: Tensors, version: int, loss: Loss | None, *, first: bool) -> Tensors:
        """The pass, and with `loss` that of its outputs.

        Args:
            first: nobody waits for the gradient of the inputs.

        Raises:
            TypeError: the piece gives something else than tensors.
        """
        if not first:
            inputs = tuple(x.detach().requires_grad_(x.is_floating_point() or x.is_complex()) for x in inputs)
        deferred = DeferredGradients() if micro_batch in self._split else None
        leaves = None if self.versions is None else self.versions.leaves(version)

        def run(*inputs: Tensor) -> Tensors:
            with deferring(deferred), self._context():
                outputs = _tensors(self._call(inputs, leaves), self.module)
                return outputs if loss is None else (loss(outputs),)

        if self._recompute:
            outputs: Tensors = checkpoint(run, *inputs, use_reentrant=False)
        else:
            outputs = run(*inputs)
        self._kept[micro_batch] = inputs, outputs
        if deferred is not None:
            self._deferred[micro_batch] = deferred
        return tuple(output.detach() for output in outputs)

    def evaluate(self, inputs: Tensors, loss: Loss | None) -> Tensors:
        """A forward pass of which nothing is kept."""
        with torch.no_grad(), self._context():
            outputs = _tensors(self._call(inputs, None), self.module)
            return outputs if loss is None else (loss(outputs),)

    def expected(self, micro_batch: int) -> Tensors:
        """Buffers for the gradients of what the forward pass gave: of its floating-point tensors."""
        return tuple(torch.empty_like(y, memory_format=torch.contiguous_format) for y in self._outputs(micro_batch))

    def backward(self, micro_batch: int, grads: Tensors | None, version: int) -> Tensors:
        """Gradients of the inputs (of the floating-point ones), zero where an input had no part in the result.

        The parameters' are added to ``.grad``; where the backward pass is split, those of linear layers wait for
        `backward_weight`.

        Args:
            grads: of what the forward pass gave; None: it gave the loss.
        """
        outputs = self._outputs(micro_batch)
        inputs, _ = self._kept.pop(micro_batch)
        pairs = list(zip(outputs, [None] * len(outputs) if grads is None else grads, strict=True))
        pairs = [(output, grad) for output, grad in pairs if output.requires_grad]
        if pairs:
            torch.autograd.backward(*map(list, zip(*pairs, strict=True)))  # type: ignore[arg-type]
        if self.versions is not None:
            self.versions.collect(version)
        wanted = [x for x in inputs if x.requires_grad and x.is_leaf]
        return tuple(torch.zeros_like(x) if x.grad is None else x.grad for x in wanted)

    def backward_weight(self, micro_batch: int) -> None:
        """Add the rest of the parameters' gradients."""
        self._deferred.pop(micro_batch).run()

    def _outputs(self, micro_batch: int) -> Tensors:
        return tuple(y for y in self._kept[micro_batch][1] if y.is_floating_point() or y.is_complex())

    def _call(self, inputs: Tensors, leaves: dict[str, Tensor] | None) -> Any:
        return self.module(*inputs) if leaves is None else functional_call(self.module, leaves, inputs)


def _tensors(outputs: Any, module: nn.Module) -> Tensors:
    found = outputs if isinstance(outputs, tuple) else (outputs,)
    if not found or not all(isinstance(output, Tensor) for output in found):
        raise TypeError(
            f"a piece gives a tensor or a tuple of tensors, {type(module).__name__} gave {type(outputs).__name__}"
        )
    return found
