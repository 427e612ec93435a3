"""The state of a training run as flat named tensors and plain JSON values, and back.

A checkpoint must hold everything the next update depends on: the parameters, the optimizer's moments and the state of
the random number generators (dropout). Tensors get flat names, as safetensors files need them; nothing is pickled.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def model_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of `model.state_dict()` with each tied one once.

    Returns:
        (tensors, aliases): tensors by name, and for every further name of a tied tensor the name it is kept under.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_name: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in first_name:
            aliases[name] = first_name[id(tensor)]
        else:
            first_name[id(tensor)] = name
            tensors[name] = tensor.detach().contiguous()
    return tensors, aliases


@dataclass(frozen=True)
class SavedState:
    """A model and its optimizer as a checkpoint holds them.

    Attributes:
        tensors, tied: see `model_tensors`.
        moments: the optimizer's tensors, under names such as `blocks.0.norm.weight/exp_avg`.
        scalars: what is not a tensor in it, under the same kind of names.
    """

    tensors: dict[str, Tensor]
    tied: dict[str, str]
    moments: dict[str, Tensor]
    scalars: dict[str, Any]


def saved_state(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> SavedState:
    """Read a model and its optimizer.

    Raises:
        ValueError: the optimizer holds a parameter that is not the model's.
    """
    if optimizer is None:
        return SavedState(*model_tensors(model), {}, {})
    names = parameter_names(optimizer, model)
    return SavedState(*model_tensors(model), *optimizer_tensors(optimizer.state_dict()["state"], names))


def optimizer_tensors(
    state: Mapping[int, Mapping[str, Any]], names: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`SavedState`'s moments and scalars, from the part "state" of an optimizer's state dict and the names of its
    parameters."""
    moments: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, values in state.items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                moments[f"{names[index]}/{key}"] = value.detach().contiguous()
            else:
                scalars[f"{names[index]}/{key}"] = value
    return moments, scalars


def restore_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor], scalars: dict[str, Any]
) -> None:
    """Give each parameter its moments back. The hyperparameters stay those that `optimizer` was made with.

    Raises:
        ValueError: the optimizer holds a parameter that is not the model's, or there is state for a parameter that the
            optimizer does not hold.
    """
    state = plain_optimizer_state(parameter_names(optimizer, model), tensors, scalars)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def plain_optimizer_state(
    names: Sequence[str], tensors: dict[str, Tensor], scalars: dict[str, Any]
) -> dict[int, dict[str, Any]]:
    """The part "state" of an optimizer's state dict, from `SavedState`'s moments and scalars.

    Raises:
        ValueError: there is state for a parameter that is not in `names`.
    """
    indices = {name: index for index, name in enumerate(names)}
    state: dict[int, dict[str, Any]] = {}
    for flat_name, value in (*tensors.items(), *scalars.items()):
        name, _, key = flat_name.rpartition("/")
        if name not in indices:
            raise ValueError(f"the checkpoint holds optimizer state for {name!r}, which this optimizer does not train")
        # A clone, for the tensors read from a file are a view of the file.
        state.setdefault(indices[name], {})[key] = value.clone() if isinstance(value, Tensor) else value
    return state


def rng_state(device: torch.device) -> dict[str, str]:
    """The state of PyTorch's random number generators, of the CPU and of `device`, as base64 text."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return {name: base64.b64encode(state.numpy().tobytes()).decode("ascii") for name, state in states.items()}


def restore_rng_state(states: dict[str, str], device: torch.device) -> None:
    """Set the generators from `rng_state`'s result; one of a device that is not used now is left out."""
    for name, text in states.items():
        state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if name == "cpu":
            torch.set_rng_state(state)
        elif name == "cuda" and device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        elif name == "mps" and device.type == "mps":
            torch.mps.set_rng_state(state)


def parameter_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """The name of each of the optimizer's parameters, in the order of its state dict's numbers.

    Raises ValueError if it holds one that is not the model's.
    """
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(id(parameter) not in name_of for parameter in parameters):
        raise ValueError("the optimizer holds a parameter that is not one of the model's")
    return [name_of[id(parameter)] for parameter in parameters]
