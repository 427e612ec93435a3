"""What ZeRO-Offload saves and loads: the names and the layout of one process, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minillm.distributed.offload_bucket import OffloadBucket
from minillm.distributed.tensor_collectives import all_gather_tensor
from minillm.distributed.zero_mics import Ranks


class StateOnHost:
    """Puts together what the ranks' hosts hold, and divides it.

    Args:
        optimizer: the user's, whose groups hold the model's parameters.
        divided: the names of its state that has a number for each number of a parameter ("exp_avg").
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        buckets: Sequence[OffloadBucket],
        ranks: Ranks,
        divided: frozenset[str],
    ) -> None:
        self.model, self.optimizer, self.ranks, self.divided = model, optimizer, ranks, divided
        self.buckets = list(buckets)
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def give(self, steps: int, *, shown: bool) -> dict[str, Any]:
        """The whole; see :meth:`minillm.distributed.Offload.state_dict`."""
        masters: dict[str, Tensor] = {}
        for bucket in self.buckets:
            masters.update(self._whole(bucket, bucket.master))
        model = {}
        for name, value in self.model.state_dict(keep_vars=True).items():
            first = self._names.get(value, name) if isinstance(value, Tensor) else name  # tied ones have two names
            model[name] = masters.get(first, value.detach().cpu().clone() if isinstance(value, Tensor) else value)
        seen = {name: p.detach().cpu().clone() for p, name in self._names.items() if name in masters}
        return {
            "model": model,
            "optimizer": self._optimizer_state(),
            "offload": {"steps": steps, "shown": seen if shown else None},
        }

    def _optimizer_state(self) -> dict[str, Any]:
        singles: dict[str, dict[str, Any]] = {}
        dtypes: dict[str, dict[str, torch.dtype]] = {}
        for bucket in self.buckets:
            for piece, weight in zip(bucket.pieces, bucket.weights, strict=True):
                for key, value in bucket.optimizer.state.get(weight, {}).items():
                    if key in self.divided and isinstance(value, Tensor):
                        dtypes.setdefault(piece.place.name, {})[key] = value.dtype
                    else:
                        single = value.clone() if isinstance(value, Tensor) else value
                        singles.setdefault(piece.place.name, {})[key] = single
        if self.ranks.n_parts > 1:  # a rank knows of the parameters that it owns a piece of
            known: list[Any] = [None] * self.ranks.n_parts
            dist.all_gather_object(known, (singles, dtypes), group=self.ranks.partition)
            singles = {name: state for from_rank, _ in known for name, state in from_rank.items()}
            dtypes = {name: kinds for _, from_rank in known for name, kinds in from_rank.items()}
        states: dict[str, dict[str, Any]] = {name: dict(state) for name, state in singles.items()}
        for bucket in self.buckets:
            names = [piece.place.name for piece in bucket.pieces]
            kinds = {key: dtype for name in names for key, dtype in dtypes.get(name, {}).items()}
            for key in sorted(kinds):
                part = torch.zeros(bucket.flat.part_size, dtype=kinds[key])
                for piece, weight in zip(bucket.pieces, bucket.weights, strict=True):
                    own = bucket.optimizer.state.get(weight, {}).get(key)
                    if own is not None:
                        part[piece.in_part] = own
                for name, value in self._whole(bucket, part).items():
                    if key in dtypes.get(name, {}):
                        states.setdefault(name, {})[key] = value
        groups, state, number = [], {}, 0
        for group in self.optimizer.param_groups:
            settings = {key: value for key, value in group.items() if key != "params"}
            groups.append({**settings, "params": list(range(number, number + len(group["params"])))})
            for parameter in group["params"]:
                if self._names[parameter] in states:
                    state[number] = states[self._names[parameter]]
                number += 1
        return {"state": state, "param_groups": groups}

    def _whole(self, bucket: OffloadBucket, part: Tensor) -> dict[str, Tensor]:
        """Every rank's `part` (part_size,) of something put together: each parameter's, by name, in its shape."""
        full = part
        if self.ranks.n_parts > 1:
            own = part.to(bucket.link.device)
            gathered = own.new_empty(bucket.flat.size)
            all_gather_tensor(gathered, own, group=self.ranks.partition)
            full = gathered.cpu()
        return {place.name: full[place.start : place.stop].view(place.shape).clone() for place in bucket.flat.places}

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Take over the model's and the optimizer's state.

        Raises:
            ValueError: it does not fit, in words.
        """
        saved_groups = state["optimizer"]["param_groups"]
        own_groups = self.optimizer.param_groups
        sizes = [[len(group["params"]) for group in groups] for groups in (saved_groups, own_groups)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"state must have optimizer groups of {sizes[1]} parameters, got {sizes[0]}")
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise ValueError(f"state does not fit the model: {error}") from error
        for bucket in self.buckets:
            for piece, weight in zip(bucket.pieces, bucket.weights, strict=True):
                weight.copy_(state["model"][piece.place.name].reshape(-1)[piece.start : piece.stop])
        learnt: dict[str, dict[str, Any]] = {}
        for saved, own in zip(saved_groups, own_groups, strict=True):
            own.update({key: value for key, value in saved.items() if key != "params"})
            for number, parameter in zip(saved["params"], own["params"], strict=True):
                if number in state["optimizer"]["state"]:
                    learnt[self._names[parameter]] = state["optimizer"]["state"][number]
        self.divide(learnt)

    def show(self, parameters: dict[str, Tensor]) -> None:
        """Give the device these parameters, by name, whatever the host has."""
        for parameter, name in self._names.items():
            if name in parameters:
                parameter.copy_(parameters[name])

    def divide(self, learnt: dict[str, dict[str, Any]]) -> None:
        """Give this rank's host its pieces of what an optimizer has learnt about whole parameters, by name."""
        for bucket in self.buckets:
            bucket.optimizer.state.clear()
            for piece, weight in zip(bucket.pieces, bucket.weights, strict=True):
                if piece.place.name not in learnt or not weight.numel():
                    continue
                for key, value in learnt[piece.place.name].items():
                    if key in self.divided and isinstance(value, Tensor):
                        own = value.reshape(-1)[piece.start : piece.stop].to("cpu", weight.dtype, copy=True)
                    else:
                        own = value.to("cpu", copy=True) if isinstance(value, Tensor) else value
                    bucket.optimizer.state[weight][key] = own
