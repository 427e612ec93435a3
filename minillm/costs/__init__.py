"""Closed forms: parameters, FLOPs and bytes of a model, from its config alone. Nothing here needs torch."""

from minillm.costs.parameters import parameters, parameters_by_part

__all__ = ["parameters", "parameters_by_part"]
