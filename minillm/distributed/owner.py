"""Who takes care of a parameter's gradients: two that both take them away would find nothing, or half of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn


class _Owner:
    """Stands on a parameter for as long as its owner lives; a pickled copy of the parameter belongs to nobody."""

    def __init__(self, alive: Callable[[], object | None] = lambda: None, kind: str = "") -> None:
        self.alive, self.kind = alive, kind

    def __reduce__(self) -> Any:
        return _Owner, ()


def claim(parameters: Iterable[nn.Parameter], owner: object, kind: str) -> None:
    """Say on the parameters that `owner`, a `kind` such as "Zero", takes their gradients, until it is gone."""
    for parameter in parameters:
        parameter._owner = _Owner(weakref.ref(owner), kind)  # type: ignore[attr-defined]


def release(parameters: Iterable[nn.Parameter]) -> None:
    """Say that they belong to nobody."""
    for parameter in parameters:
        parameter._owner = _Owner()  # type: ignore[attr-defined]


def check_unclaimed(model: nn.Module) -> None:
    """Raise a ValueError, with the name, if a parameter of the model belongs to somebody."""
    for name, parameter in model.named_parameters():
        owner = getattr(parameter, "_owner", _Owner())
        if owner.alive() is not None:
            freed = "; unwrap() that first" if owner.kind == "DataParallel" else ""
            raise ValueError(f"model must not be wrapped twice: {name!r} belongs to a {owner.kind}{freed}")
