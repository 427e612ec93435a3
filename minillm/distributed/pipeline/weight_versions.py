"""Several versions of a stage's weights at once: PipeDream's weight stashing.

A micro-batch that went forward with some weights must go backward with the same, although updates have been made in
between. (Narayanan et al. 2019, "PipeDream", section 3.3.)
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn


class WeightVersions:
    """The weights of one piece of a model, as they were at some updates and as they are now.

    A pass works with leaves that share the parameters' memory. At an update the parameters move to new memory if a pass
    to come still needs the old values, and else are changed where they are: exactly the versions that are needed are
    alive. Without stashing they never move, and passes to come find the new values, which autograd does not notice,
    because a leaf has a version counter of its own.

    Buffers (running statistics) have one version, the newest.

    Args:
        module: the piece; its parameters are what the optimizer changes.
        uses: version -> how many backward passes will work with it.
        stashing: keep what is needed.

    Attributes:
        most_versions: so many were alive at once since the last `begin`.
    """

    def __init__(self, module: nn.Module, uses: Counter[int], *, stashing: bool = True) -> None:
        self._parameters = dict(module.named_parameters())
        self._all_uses, self._stashing = uses, stashing
        self.begin()

    def begin(self) -> None:
        """Start a run, in which the weights of now are version 0."""
        self._uses = Counter(self._all_uses)
        self._current = 0
        self._leaves: dict[int, dict[str, Tensor]] = {}
        self.most_versions = 1

    @property
    def n_versions(self) -> int:
        """How many are alive: the newest, and those that passes to come need."""
        return len({*self._leaves, self._current}) if self._stashing else 1

    @property
    def n_bytes(self) -> int:
        """Bytes of memory of all of them; what is frozen is there once."""
        tensors = [*self._parameters.values(), *(leaf for leaves in self._leaves.values() for leaf in leaves.values())]
        return sum({s.data_ptr(): s.nbytes() for tensor in tensors for s in [tensor.untyped_storage()]}.values())

    def leaves(self, version: int) -> dict[str, Tensor]:
        """Parameter name -> leaf tensor with that version's values, for `torch.func.functional_call`.

        Raises:
            LookupError: that version is not there.
        """
        version = version if self._stashing else 0
        if version not in self._leaves:
            if self._stashing and version != self._current:
                raise LookupError(f"the weights of version {version} are gone: version {self._current} is the newest")
            self._leaves[version] = {
                name: parameter.data.requires_grad_(parameter.requires_grad)
                for name, parameter in self._parameters.items()
            }
        return self._leaves[version]

    def collect(self, version: int) -> None:
        """After a backward pass: add what the leaves have gathered to the parameters' ``.grad``, and let go of the
        version if it was the last that needed it."""
        self._uses[version] -= 1
        key = version if self._stashing else 0
        for name, leaf in self._leaves[key].items():
            if leaf.grad is not None:
                parameter = self._parameters[name]
                parameter.grad = leaf.grad if parameter.grad is None else parameter.grad + leaf.grad
                leaf.grad = None
        if self._stashing and not self._uses[version]:
            del self._leaves[version]

    @torch.no_grad()
    def update(self) -> None:
        """The optimizer is about to change the parameters, which makes the next version."""
        if self._stashing and self._uses[self._current]:
            self.leaves(self._current)  # for passes that have not begun
            for parameter in self._parameters.values():
                if parameter.requires_grad:
                    parameter.data = parameter.data.clone()
        self._current += 1
        self.most_versions = max(self.most_versions, self.n_versions)
