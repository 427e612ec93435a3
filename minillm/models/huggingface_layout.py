"""A Hugging Face layout as data, read in both directions: config fields, and where each parameter lies."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minillm.models.config import TransformerConfig


@dataclass(frozen=True)
class Source:
    """Where a parameter lies in the foreign layout: tensors one below the other, each transposed there or not.

    ``rows`` are those that each has; or, ``stacked``, each is one of the parameter's matrices.
    """

    names: tuple[str, ...]
    rows: list[int]
    transposed: bool = False
    stacked: bool = False

    def parts(self, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(foreign name, the view of the parameter that it is)."""
        views = parameter.unbind() if self.stacked else torch.split(parameter, self.rows)
        return zip(self.names, views, strict=True)


@dataclass(frozen=True)
class Layout:
    """One architecture. ``prefix`` stands before every name but ``lm_head.weight`` in a model with an output head.

    ``from_memory`` and ``to_memory`` translate names and tensors where the library's own are not those of its files.
    """

    architecture: str
    prefix: str
    ignored: re.Pattern[str]  # buffers that old files carry, without the prefix
    read_config: Callable[[Mapping[str, Any]], TransformerConfig]
    write_config: Callable[[TransformerConfig], dict[str, Any]]
    sources: Callable[[TransformerConfig], dict[str, Source]]
    from_memory: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict
    to_memory: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict


def head_source(config: TransformerConfig) -> dict[str, Source]:
    """Where the output head lies: nowhere if it is the embedding."""
    return {} if config.tied_embeddings else {"lm_head.weight": Source(("lm_head.weight",), [config.vocab_size])}


def get(fields: Mapping[str, Any], name: str, default: Any) -> Any:
    """The field, or its default where it is absent or null, as published config files leave out what is usual."""
    value = fields.get(name)
    return default if value is None else value


def require(fields: Mapping[str, Any], **allowed: Any) -> None:
    """Refuse a foreign field that is there and not ``allowed``."""
    for name, value in allowed.items():
        if get(fields, name, value) != value:
            raise ValueError(f"{name} must be {value!r}: minillm's Transformer has no other, got {fields[name]!r}")


def require_fields(layout: str, config: object, **needed: Any) -> None:
    """Refuse a config of ours that the layout cannot hold, naming every field that is in the way."""
    wrong = [f"{name}={value!r} (got {getattr(config, name)!r})" for name, value in needed.items()
             if getattr(config, name) != value]  # fmt: skip
    if wrong:
        raise ValueError(f"Hugging Face's {layout} layout needs {', '.join(wrong)}")
